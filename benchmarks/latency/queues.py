"""Ten queues, which note when a task has begun."""

from __future__ import annotations

import time

import modelqueue
from benchmarks.latency.models import Task


def note(task: Task) -> None:
    task.begun = time.time()


for number in range(10):
    modelqueue.queue(Task.objects.filter(queue=number), "status", name=f"queue{number}")(note)
