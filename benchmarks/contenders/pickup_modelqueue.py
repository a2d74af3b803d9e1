"""The worker, of several queues that share a table."""

from __future__ import annotations

import django

from benchmarks.contenders import feed as feeding
from benchmarks.contenders.worker import make_table, make_trigger, work

__all__ = ["create", "feed", "listen", "work"]


def create() -> None:
    django.setup()
    from benchmarks.shared.models import Task

    make_table(Task)


def listen() -> None:
    """Let a trigger tell of each task (PostgreSQL)."""
    django.setup()
    from benchmarks.shared.models import Task

    make_trigger(Task)


def feed() -> None:
    django.setup()
    from benchmarks.shared.models import Task

    feeding.feed(lambda number: Task.objects.create(queue=number))
