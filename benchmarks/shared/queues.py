"""Queues, as many as BENCHMARK_QUEUES says, which tell when a task has begun; a single one has all rows."""

from __future__ import annotations

import os

import modelqueue
from benchmarks.moments import tell
from benchmarks.shared.models import Task


def note(task: Task) -> None:
    tell()


count = int(os.environ["BENCHMARK_QUEUES"])
for number in range(count):
    tasks = Task.objects.filter(queue=number) if count > 1 else Task.objects.all()
    modelqueue.queue(tasks, "status", name=f"queue{number}")(note)
