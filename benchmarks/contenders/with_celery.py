"""Celery, on Redis: its prefork pool."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from celery import Celery

from benchmarks.actions import action

app = Celery("benchmark", broker=f"redis+socket://{os.environ['BENCHMARK_REDIS']}")
app.conf.task_ignore_result = True
app.conf.worker_prefetch_multiplier = 64
act = action()


@app.task(name="task")
def task(number: int) -> None:
    act(number)


def create() -> None:
    app.control.purge()


def enqueue_singly(count: int) -> None:
    for number in range(count):
        task.delay(number)


enqueue = enqueue_singly  # it has no way to add many at once


def work() -> None:
    command = str(Path(sys.executable).parent / "celery")
    processes = os.environ["BENCHMARK_PROCESSES"]
    options = f"--app={__name__}", "worker", f"--concurrency={processes}"
    fast = "--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=ERROR"
    os.execv(command, [command, *options, *fast])
