"""Queues, as many as the benchmark says, which tell when a task has begun."""

from __future__ import annotations

import os

import modelqueue
from benchmarks.latency.models import Task
from benchmarks.moments import tell


def note(task: Task) -> None:
    tell()


count = int(os.environ["BENCHMARK_QUEUES"])
for number in range(count):
    tasks = Task.objects.filter(queue=number) if count > 1 else Task.objects.all()
    modelqueue.queue(tasks, "status", name=f"queue{number}")(note)
