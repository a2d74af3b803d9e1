"""django-tasks-db: its worker, with a connection that stays open."""

from __future__ import annotations

import json
import os

import django
from django.conf import settings
from django.core.management import call_command

from benchmarks.actions import action

settings.configure(
    DATABASES={"default": {**json.loads(os.environ["BENCHMARK_DATABASE"]), "CONN_MAX_AGE": None}},
    INSTALLED_APPS=["django_tasks", "django_tasks_db"],
    TASKS={"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}},
    USE_TZ=True,
    SECRET_KEY="benchmark",
    LOGGING={"version": 1, "loggers": {"django_tasks": {"level": "WARNING"}}},
)
django.setup()

from django_tasks import task  # noqa: E402

act = action()


@task()
def work_on(number: int) -> None:
    act(number)


def create() -> None:
    call_command("migrate", verbosity=0)
    from django_tasks_db.models import DBTaskResult

    DBTaskResult.objects.all().delete()


def enqueue_singly(count: int) -> None:
    for number in range(count):
        work_on.enqueue(number)


enqueue = enqueue_singly  # it has no way to add many at once


def work() -> None:
    call_command("db_worker", batch=os.environ["BENCHMARK_DRAIN"] == "1", verbosity=0, startup_delay=False)
