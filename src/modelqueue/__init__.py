"""ModelQueue: any Django model is a task queue, by one 64-bit integer field.

The row is the task. Its status, one integer, says in which state it is, when it may run, and how
often it was tried::

    import modelqueue
    from django.db import models

    class Photo(models.Model):
        file = models.ImageField()
        status = modelqueue.StatusField()          # a new row is waiting, from now

    def make_thumbnail(photo):
        ...

    task = modelqueue.run(Photo.objects.all(), "status", make_thumbnail)

`run` claims the next due row, calls the function with it, and records the outcome; it returns None
when nothing is due. Call it in a loop, in as many processes and threads as you like: no task is
lost, and none has two owners at a time, whatever dies.

The number can be read by people and by any database shell:

>>> from modelqueue import State, Status
>>> status = Status.combine("waiting", 20270326144325759, 1)
>>> status
Status(2202703261443257591)
>>> status.state, status.attempts
(State(2, 'waiting'), 1)
>>> status.parse()[1].isoformat()
'2027-03-26T14:43:25.759000+00:00'
>>> print(Status.waiting(priority=0))
waiting; 0 priority; 0 attempts
>>> Status.filter("status", State.waiting)
{'status__gte': 2000000000000000000, 'status__lte': 2999999999999999999}

What is here:

* the number: `State`, `Status`, `now`, `datetime_to_int`, `ONE_HOUR`, `ZERO_SECS`;
* for your models: `StatusField`, `ErrorField`, `QueueIndex`;
* running tasks: `run`, `arun`, `enqueue`; `Retry`, `Abort`, `Cancel` for an action to raise; `backoff`;
* declaring queues: `queue`, `Queue`, `declared_queues`; `current` inside an action;
* watching: the signals `task_claimed`, `task_finished`, `task_recovered`, `lease_lost`; the logger
  ``modelqueue``;
* for your own admin: `admin_actions`, `admin_list_filter`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelqueue import backoff
from modelqueue import log as log  # begins to log
from modelqueue.exceptions import Abort, Cancel, Retry
from modelqueue.execution import Current, arun, current, run
from modelqueue.fields import ErrorField, StatusField
from modelqueue.indexes import QueueIndex
from modelqueue.queues import Queue, declared_queues, queue
from modelqueue.signals import lease_lost, task_claimed, task_finished, task_recovered
from modelqueue.status import ONE_HOUR, ZERO_SECS, State, Status, datetime_to_int, now
from modelqueue.verbs import enqueue

if TYPE_CHECKING:
    from modelqueue.admin import admin_actions, admin_list_filter

__title__ = "modelqueue"
__version__ = "3.0.0.dev0"

__all__ = [
    "ONE_HOUR",
    "ZERO_SECS",
    "Abort",
    "Cancel",
    "Current",
    "ErrorField",
    "Queue",
    "QueueIndex",
    "Retry",
    "State",
    "Status",
    "StatusField",
    "admin_actions",
    "admin_list_filter",
    "arun",
    "backoff",
    "current",
    "datetime_to_int",
    "declared_queues",
    "enqueue",
    "lease_lost",
    "now",
    "queue",
    "run",
    "task_claimed",
    "task_finished",
    "task_recovered",
]

_FROM_ADMIN = ("admin_actions", "admin_list_filter")


def __getattr__(name: str) -> Any:
    # Only who uses the admin parts imports django.contrib.admin.
    if name in _FROM_ADMIN:
        from modelqueue import admin

        return getattr(admin, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM_ADMIN})
