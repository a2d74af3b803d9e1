"""dramatiq, on Redis."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from benchmarks.actions import action

broker = RedisBroker(url=f"unix://{os.environ['BENCHMARK_REDIS']}")
dramatiq.set_broker(broker)
act = action()


@dramatiq.actor
def task(number: int) -> None:
    act(number)


def create() -> None:
    broker.flush_all()


def enqueue_singly(count: int) -> None:
    for number in range(count):
        task.send(number)


enqueue = enqueue_singly  # it has no way to add many at once


def work() -> None:
    command = str(Path(sys.executable).parent / "dramatiq")
    processes = os.environ["BENCHMARK_PROCESSES"]
    os.execv(command, [command, __name__, "--processes", processes, "--threads", "8"])
