"""Tasks of procrastinate, run by its worker as its documentation recommends: psycopg, and async functions."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from procrastinate import App, PsycopgConnector

from benchmarks.moments import tell

app = App(connector=PsycopgConnector())


async def note() -> None:
    tell()


tasks = [
    app.task(queue=f"queue{number}", name=f"note{number}")(note)
    for number in range(int(os.environ["BENCHMARK_QUEUES"]))
]


def enqueuer() -> Callable[[int], Any]:
    app.open()  # which makes a synchronous connector, with a pool
    return lambda number: tasks[number].defer()
