"""`manage.py modelqueue worker` on one queue of an ordinary model."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import django
from django.core.management import call_command
from django.db import connection

from benchmarks.actions import teller_into

__all__ = [
    "create",
    "enqueue",
    "enqueue_singly",
    "history",
    "listen",
    "make_table",
    "make_trigger",
    "produce",
    "work",
]

os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.project.settings"


def create() -> None:
    django.setup()
    from benchmarks.project.models import Task

    make_table(Task)
    with connection.schema_editor() as editor:
        for index in range(int(os.environ.get("BENCHMARK_INDEXES", "0"))):
            editor.execute(f"CREATE INDEX further_{index} ON {Task._meta.db_table} (data)")


def enqueue(count: int) -> None:
    django.setup()
    from benchmarks.project.models import Task

    for first in range(0, count, 10_000):
        Task.objects.bulk_create([Task(data="new") for _ in range(min(10_000, count - first))], 1000)


def enqueue_singly(count: int) -> None:
    """Add so many tasks, each committed by itself."""
    django.setup()
    from benchmarks.project.models import Task

    for _ in range(count):
        Task.objects.create(data="new")


def history(count: int) -> None:
    """Add so many tasks that were finished long ago (PostgreSQL)."""
    django.setup()
    from benchmarks.project.models import Task
    from modelqueue import Status

    finished = int(Status.finished(10**16, 1))
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {Task._meta.db_table} (data, status) "
            "SELECT 'history', %s + 10 * n FROM generate_series(1, %s) AS n",
            [finished, count],
        )


def listen() -> None:
    """Let a trigger tell of each task (PostgreSQL)."""
    django.setup()
    from benchmarks.project.models import Task

    make_trigger(Task)


def produce(number: int) -> None:
    """Add one task after the other, each committed by itself; note when the answer to its commit came.

    It begins when BENCHMARK_BEGIN says, goes on for BENCHMARK_SECONDS, and adds BENCHMARK_RATE tasks a second
    at random moments, or (0) as many as it can.
    """
    django.setup()
    from benchmarks.project.models import Task

    begin, seconds, rate = (float(os.environ[f"BENCHMARK_{name}"]) for name in ("BEGIN", "SECONDS", "RATE"))
    tell = teller_into(f"{os.environ['BENCHMARK_PRODUCED']}-{number}")
    chance = random.Random(number)
    connection.ensure_connection()
    time.sleep(max(0.0, begin - time.time()))
    due = time.time()
    while due < begin + seconds:
        tell(Task.objects.create(data="new").pk)
        # What comes late is made up for: who enqueues does not wait for the queue.
        due = due + chance.expovariate(rate) if rate else time.time()
        time.sleep(max(0.0, due - time.time()))


def work() -> None:
    django.setup()
    call_command(
        "modelqueue",
        "worker",
        *(["--drain"] if os.environ["BENCHMARK_DRAIN"] == "1" else []),
        f"--processes={os.environ['BENCHMARK_PROCESSES']}",
        f"--threads={os.environ['BENCHMARK_THREADS']}",
    )


# The parts of it that do not depend on the model


def make_table(model: type[Any]) -> None:
    """Make it anew, empty."""
    with connection.schema_editor() as editor:
        if model._meta.db_table in connection.introspection.table_names():
            editor.delete_model(model)
        editor.create_model(model)


def make_trigger(model: type[Any]) -> None:
    from modelqueue.engines import engine_for

    with connection.schema_editor() as editor:
        for sql in engine_for("default").create_notify_trigger(model._meta.db_table, "status"):
            editor.execute(sql, None)
