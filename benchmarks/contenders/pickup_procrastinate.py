"""procrastinate as its documentation recommends: psycopg, async functions, and the command of its worker."""

from __future__ import annotations

import os
import sys

from procrastinate import App, PsycopgConnector

from benchmarks.contenders import feed as feeding
from benchmarks.contenders.with_procrastinate import create
from benchmarks.moments import tell

__all__ = ["app", "create", "feed", "tasks", "work"]

app = App(connector=PsycopgConnector())


async def _note() -> None:
    tell()


tasks = [
    app.task(queue=f"queue{number}", name=f"note{number}")(_note)
    for number in range(int(os.environ["BENCHMARK_QUEUES"]))
]


def feed() -> None:
    app.open()  # which makes a synchronous connector, with a pool
    feeding.feed(lambda number: tasks[number].defer())


def work() -> None:
    command = "-m", "procrastinate", f"--app={__name__}.app", "worker"
    os.execv(sys.executable, [sys.executable, *command])
