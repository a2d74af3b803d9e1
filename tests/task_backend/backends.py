"""The setting TASKS of these tests, the sample tasks under it, and what tests do with them."""

from __future__ import annotations

from importlib import import_module

from django.test import override_settings

from modelqueue import testing
from modelqueue.task_backend import apis

BACKEND = "modelqueue.task_backend.ModelQueueBackend"


def setting(**options):
    """The setting TASKS; the options are those of the backend ``default``."""
    return {
        "default": {"BACKEND": BACKEND, "QUEUES": [], "OPTIONS": options},
        "other": {"BACKEND": BACKEND, "QUEUES": ["red", "blue"]},
    }


TASKS = setting()

# Tasks are made by the backend that the setting names when their module is imported.
with override_settings(TASKS=TASKS):
    tasks = import_module("tests.task_backend.tasks")

api = apis.default()
handler = import_module(api.package)
States = api.TaskResultStatus


def backend(alias="default"):
    return handler.task_backends[alias]


def row_of(result, using=None):
    from modelqueue.task_backend.models import QueuedTask

    return QueuedTask.objects.using(using).get(result_id=result.id)


def queue_of(name="default"):
    """The declared queue that a worker calls so."""
    from modelqueue.task_backend.queues import task_queues

    return next(one for one in task_queues() if one.name == name)


def run_one(name="default"):
    """Make the next attempt, whatever its function raises."""
    return testing.run_one(queue_of(name), raises=False)


def run_all(*names):
    """Make attempts until nothing is due; return the ids of their results."""
    from modelqueue.task_backend.queues import task_queues

    queues = [queue_of(name) for name in names] or task_queues()
    return [ran.task.result_id for ran in testing.drain(*queues, raises=False)]


def refreshed(result):
    result.refresh()
    return result
