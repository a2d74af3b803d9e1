"""A loop of `modelqueue.run`, one task at a time: of this checkout, or of the release of its environment."""

from __future__ import annotations

import django

from benchmarks.actions import action
from benchmarks.contenders.worker import create, enqueue, enqueue_singly

__all__ = ["create", "enqueue", "enqueue_singly", "work"]


def work() -> None:
    django.setup()
    import modelqueue
    from benchmarks.project.models import Task

    act = action()
    while True:
        try:
            task = modelqueue.run(Task.objects.all(), "status", lambda task: act(task.pk))
        except Exception:
            continue
        if task is None:
            return
