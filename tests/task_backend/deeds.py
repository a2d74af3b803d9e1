"""Django tasks that real workers run. What one does is said by a word, as of an errand of the test app.

To be imported where the setting TASKS has a default backend of ours: see the fixture `deeds` and `SERVED`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from importlib import import_module

import modelqueue
from modelqueue.task_backend import apis, policy
from tests.faults import halts
from tests.testapp.models import Ledger

task = import_module(apis.default().package).task


def enter(number):
    """Write down that a task has begun: which, and in which process."""
    Ledger.objects.create(task=number, worker=str(os.getpid()))


@task
def do(words="", number=None):
    """Do what the words say, and write it down under a number, or under the key of the row."""
    enter(modelqueue.current().task.pk if number is None else number)
    word, _, argument = words.partition(" ")
    halts.act(word)
    if word == "fail":
        raise ValueError(argument)
    if word == "die":
        os.killpg(0, signal.SIGKILL) if argument else os.kill(os.getpid(), signal.SIGKILL)
    if word == "doze":  # as code that can be interrupted
        until = time.monotonic() + float(argument)
        while time.monotonic() < until:
            time.sleep(0.01)
    while word == "watch" and not modelqueue.current().cancel_requested:
        time.sleep(0.01)
    return f"did {words}"


@policy(retry=1, timeout=1)
@task
def hang(number):
    """Take longer than its own timeout, whatever is raised in it, but for the first time."""
    enter(number)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        time.sleep(0.01)


@policy(retry=0, timeout=1)
@task
def swallow(number):
    """Go on for ever, whatever is raised in it."""
    enter(number)
    while True:
        with suppress(BaseException):
            time.sleep(0.01)


@policy(retry=0, timeout=1)
@task
async def linger():
    """Await longer than its own timeout, and clean up."""
    await clean_up_after(-3)


@task
async def linger_long():
    """Await longer than a worker waits for it when it is to stop, and clean up."""
    await clean_up_after(-4)


async def clean_up_after(number):
    try:
        await Ledger.objects.acreate(task=number, worker="began")
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.05)
        await Ledger.objects.acreate(task=number, worker="cleaned up")


@task(takes_context=True)
async def tell(context, number):
    """Return what it is told of its attempt; a coroutine."""
    return {"number": number, "id": context.task_result.id, "attempt": context.attempt}


@policy(retry=None, atomic=True)
@task
def book(number, seconds):
    """Have an effect that is to be there once, whoever dies."""
    enter(number)
    time.sleep(seconds)


@task
def clock_in(seconds):
    """Return when it begins, by the clock that the worker claims by."""
    began = modelqueue.clock.now().isoformat()
    time.sleep(seconds)
    return began
