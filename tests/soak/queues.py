"""What the workers of a soak run: three kinds of tasks, which take some time and leave traces.

A task says what it is in `data`: its kind, the seconds it takes, and perhaps that it is to be canceled.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import modelqueue
from modelqueue import exceptions
from tests.soak.signs import FOLDER
from tests.testapp.models import Ledger, Task

LEASE = dt.timedelta(seconds=4)
#: The database in which actions that are not atomic write that they run.
LEDGER = os.environ.get("MODELQUEUE_SOAK_LEDGER", "default")


def tasks(kind):
    return Task.objects.filter(data__startswith=kind)


@modelqueue.queue(tasks("plain"), "status", retry=None, lease=LEASE)
def plain(task):
    with acting(task):
        seconds, is_canceled = what(task)
        Ledger.objects.using(LEDGER).create(task=task.pk, worker="plain")
        time.sleep(seconds)
        if is_canceled:
            raise exceptions.Cancel


@modelqueue.queue(tasks("atomic"), "status", retry=None, lease=LEASE, atomic=True)
def atomic(task):
    with acting(task):
        seconds, is_canceled = what(task)
        Ledger.objects.create(task=task.pk, worker="atomic")
        time.sleep(seconds)
        if is_canceled:
            raise exceptions.Cancel


@modelqueue.queue(tasks("async"), "status", retry=None, lease=LEASE, slots=5)
async def asynchronous(task):
    with acting(task):
        seconds, is_canceled = what(task)
        await Ledger.objects.using(LEDGER).acreate(task=task.pk, worker="async")
        await asyncio.sleep(seconds)
        if is_canceled:
            raise exceptions.Cancel


def what(task: Task) -> tuple[float, bool]:
    _, seconds, *word = task.data.split()
    return float(seconds), word == ["cancel"]


@contextmanager
def acting(task: Task) -> Iterator[None]:
    """Note that an action runs and, where it ends in order, that it has.

    And, if another one of the same task runs in a living process, or has ended there, that.
    """
    folder, me = Path(os.environ[FOLDER]), os.getpid()
    running, ended = folder / "running" / str(task.pk), folder / "ended" / str(task.pk)
    for sign in (running, ended):
        if (other := pid_of(sign)) and is_alive(other):
            (folder / "twice" / f"{task.pk} {sign.parent.name} {other} {me}").touch()
    running.write_text(str(me))
    try:
        yield
    except exceptions.Cancel:
        ended.write_text(str(me))
        raise
    else:
        ended.write_text(str(me))
    finally:
        if pid_of(running) == me:
            running.unlink()


def pid_of(sign: Path) -> int:
    try:
        return int(sign.read_text() or 0)
    except FileNotFoundError:
        return 0


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
