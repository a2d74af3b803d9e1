"""Django tasks for those who change from one backend to another.

To be imported where the setting TASKS has a backend `default`, of whatever kind.
"""

from __future__ import annotations

import os
import time
from importlib import import_module

from modelqueue.task_backend import apis, policy
from tests.testapp.models import Ledger

task = import_module(apis.default().package).task


@task
def sweep(number, seconds=0.0):
    """Write down that it has run, and return what JSON can hold."""
    Ledger.objects.create(task=number, worker=str(os.getpid()))
    time.sleep(seconds)
    return {"number": number, "rooms": ["hall", None]}


@policy(retry=5)
@task(takes_context=True)
def water(context, *, plant):
    return f"{plant} by {context.attempt}"


@task
def drop(what):
    raise ValueError(f"the {what} is broken:\nin two")


class MishapError(Exception):
    """One whose name has a module before it."""


@task
def stumble():
    raise MishapError
