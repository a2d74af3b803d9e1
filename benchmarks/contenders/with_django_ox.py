"""django-ox: its worker with as many threads as ours, with a connection that stays open."""

from __future__ import annotations

import json
import os

import django
from django.conf import settings
from django.core.management import call_command

from benchmarks.actions import action

_API = "django.tasks" if django.VERSION >= (6, 0) else "django_tasks"

settings.configure(
    DATABASES={"default": {**json.loads(os.environ["BENCHMARK_DATABASE"]), "CONN_MAX_AGE": None}},
    INSTALLED_APPS=["django_ox"] if _API == "django.tasks" else ["django_tasks", "django_ox"],
    TASKS={
        "default": {
            "BACKEND": "django_ox.backend.OxBackend",
            "OPTIONS": {
                "LOCK_TIMEOUT": float(os.environ.get("BENCHMARK_LEASE", "300")),
            },
        }
    },
    USE_TZ=True,
    SECRET_KEY="benchmark",
    LOGGING={
        "version": 1,
        "loggers": {name: {"level": "WARNING"} for name in (_API, "django_ox")},
    },
)
django.setup()

if _API == "django.tasks":
    from django.tasks import task
else:
    from django_tasks import task

#: Tasks that are added by one call.
_MANY = 10_000

act = action()


@task
def work_on(number: int) -> None:
    act(number)


def create() -> None:
    call_command("migrate", verbosity=0)
    from django_ox.models import OxTask

    OxTask.objects.all().delete()


def enqueue(count: int) -> None:
    from django_ox.bulk import enqueue_many

    for first in range(0, count, _MANY):
        enqueue_many(work_on, [((number,), {}) for number in range(first, min(first + _MANY, count))])


def enqueue_singly(count: int) -> None:
    for number in range(count):
        work_on.enqueue(number)


def work() -> None:
    call_command(
        "ox_worker",
        batch=os.environ["BENCHMARK_DRAIN"] == "1",
        concurrency=int(os.environ["BENCHMARK_THREADS"]),
        verbosity=0,
    )
