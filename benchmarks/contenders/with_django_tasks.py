"""`modelqueue.task_backend`: Django tasks that are enqueued by Django's API, and run by our worker."""

from __future__ import annotations

import os

import django
from django.core.management import call_command

os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.project.settings_of_tasks"
#: Tasks that are added by one call.
_MANY = 10_000


def create() -> None:
    django.setup()
    call_command("migrate", verbosity=0)
    from modelqueue.task_backend.models import QueuedTask

    QueuedTask.objects.all().delete()


def enqueue(count: int) -> None:
    django.setup()
    from benchmarks.project.django_tasks import work_on

    backend = work_on.get_backend()
    for first in range(0, count, _MANY):
        last = min(first + _MANY, count)
        backend.enqueue_many((work_on, (number,), {}) for number in range(first, last))


def enqueue_singly(count: int) -> None:
    django.setup()
    from benchmarks.project.django_tasks import work_on

    for number in range(count):
        work_on.enqueue(number)


def work() -> None:
    django.setup()
    call_command(
        "modelqueue",
        "worker",
        *(["--drain"] if os.environ["BENCHMARK_DRAIN"] == "1" else []),
        f"--processes={os.environ['BENCHMARK_PROCESSES']}",
        f"--threads={os.environ['BENCHMARK_THREADS']}",
    )
