"""Sample Django tasks, of the API that a project of this Django uses.

No model is imported before a task needs it: a test imports this module before `django.setup`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import os
from importlib import import_module

import modelqueue
from modelqueue.task_backend import apis, policy

api = apis.default()
task = import_module(api.package).task


def write_down(text):
    from tests.testapp.models import Ledger

    Ledger.objects.create(task=os.getpid(), worker=text)


def times(text):
    """How often that was written down."""
    from tests.testapp.models import Ledger

    return Ledger.objects.filter(worker=text).count()


@task
def add(a, b=0):
    return a + b


@task
async def add_later(a, b=0):
    await asyncio.sleep(0)
    return a + b


@task
async def count_later(text):
    from tests.testapp.models import Ledger

    return await Ledger.objects.filter(worker=text).acount()


@policy(retry=0)
@task
def cancel_inside():
    raise asyncio.CancelledError


@policy(retry=0)
@task
async def cancel_inside_later():
    raise asyncio.CancelledError


@task
def note(text):
    write_down(text)
    return text


@policy(retry=0)
@task
def fail(text="no"):
    raise ValueError(text)


@policy(retry=0)
@task
async def fail_later(text="no"):
    await asyncio.sleep(0)
    raise LookupError(text)


@policy(retry=2)
@task
def fail_at_first(text, times_to_fail=1):
    """Fail so often, and then no more."""
    write_down(text)
    if times(text) <= times_to_fail:
        raise ValueError(f"{text}, attempt {times(text)}")
    return "at last"


@policy(retry=0)
@task
def give(kind):
    """Return what JSON has not, or not quite."""
    itself = []
    itself.append(itself)
    return {
        "object": object(),
        "set": {1, 2},
        "time": dt.datetime(2026, 1, 2),
        "nan": float("nan"),
        "NUL": "a\x00b",
        "itself": itself,
        "nested": {"list": [1, [2, {"three": 3}]], "none": None, "text": "ü\U0001f600"},
        "tuple": (1, 2),
        "none": None,
        "false": False,
    }[kind]


@policy(retry=0)
@task
def nest(levels):
    """Return as many lists, one in the other."""
    made = []
    for _ in range(levels - 1):
        made = [made]
    return made


@task(takes_context=True)
def tell(context, *args, **kwargs):
    result = context.task_result
    return {
        "id": result.id,
        "status": str(result.status),
        "attempt": context.attempt,
        "args": args,
        "kwargs": kwargs,
        "workers": len(result.worker_ids),
    }


@task(takes_context=True)
async def tell_later(context):
    return context.task_result.id


@policy(retry=2)
@task(takes_context=True)
def cancel_itself(context):
    """As somebody may, while it runs."""
    write_down("canceled")
    if times("canceled") == 1:
        context.task_result.task.get_backend().cancel(context.task_result.id)
    return "returned"


@task
def snooze(text):
    """Ask for another attempt, once."""
    write_down(text)
    if times(text) == 1:
        raise modelqueue.Retry
    return "awake"


@task
def takes_nothing(): ...


@policy(retry=1, delay=7200)
@task
def fail_for_hours():
    raise ValueError("no")


@policy(atomic=True, retry=0)
@task
def note_and_fail(text):
    write_down(text)
    raise ValueError(text)


@policy(atomic=True)
@task
def note_at_once(text):
    write_down(text)
    return text


@task(queue_name="red", backend="other")
def note_elsewhere(text):
    write_down(text)
    return text


# No tasks


def plain(*args, **kwargs):
    write_down("called")


class Plain:
    def __init__(self, *args, **kwargs):
        write_down("called")

    def __call__(self, *args, **kwargs):
        write_down("called")


class Lookalike:
    """Has all that a task has."""

    func = plain
    takes_context = False

    def call(self, *args, **kwargs):
        write_down("called")

    def using(self, **kwargs):
        write_down("called")
        return self


lookalike = Lookalike()
