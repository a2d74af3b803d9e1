"""huey, on SQLite or on Redis: its consumer with processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from huey import RedisHuey, SqliteHuey

from benchmarks.actions import action

if "BENCHMARK_REDIS" in os.environ:
    huey = RedisHuey("benchmark", url=f"unix://{os.environ['BENCHMARK_REDIS']}", results=False)
else:
    fsync = os.environ["BENCHMARK_FSYNC"] == "1"
    huey = SqliteHuey("benchmark", filename=os.environ["BENCHMARK_FILE"], fsync=fsync, results=False)
act = action()


@huey.task()
def task(number: int) -> None:
    act(number)


def create() -> None:
    huey.flush()


def enqueue_singly(count: int) -> None:
    for number in range(count):
        task(number)


enqueue = enqueue_singly  # it has no way to add many at once


def work() -> None:
    consumer = str(Path(sys.executable).parent / "huey_consumer")
    processes = os.environ["BENCHMARK_PROCESSES"]
    options = "--worker-type", "process", "--workers", processes, "--no-periodic", "--quiet"
    os.execv(consumer, [consumer, f"{__name__}.huey", *options])
