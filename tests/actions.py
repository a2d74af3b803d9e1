"""Actions that several tests share, and what a test wants to know of a row."""

from __future__ import annotations

import datetime as dt
from contextlib import contextmanager

from modelqueue import Status, signals
from tests.testapp.models import Ledger

SECOND = dt.timedelta(seconds=1)
MILLISECOND = dt.timedelta(milliseconds=1)
LONG_AGO = dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)


def succeed(task):
    """The action that has nothing to do."""


def unexpected(task):
    raise AssertionError(f"{task!r} was run")


def raising(error):
    """An action that raises."""

    def action(task):
        raise error

    return action


def write_down(task):
    """Note in the ledger that the task was run."""
    Ledger.objects.using(task._state.db).create(task=task.pk)


def stored(task, field="status", using=None):
    """The status in the row of a task; None where the row is gone."""
    rows = type(task)._base_manager.using(using or task._state.db).filter(pk=task.pk)
    value = rows.values_list(field, flat=True).first()
    return None if value is None else Status(value)


def row(task):
    """The row of a task as it is stored."""
    return type(task)._base_manager.using(task._state.db).get(pk=task.pk)


@contextmanager
def heard(*names):
    """What the named signals (all by default) tell: pairs of their name and their arguments."""
    events = []
    receivers = []
    for name in names or signals.__all__:

        def receive(sender, signal, name=name, **arguments):
            events.append((name, {"sender": sender, **arguments}))

        getattr(signals, name).connect(receive)
        receivers.append((name, receive))
    try:
        yield events
    finally:
        for name, receive in receivers:
            getattr(signals, name).disconnect(receive)


class Clock:
    """A clock that stands still until it is moved; for `modelqueue.clock.use`.

    In the past, so that what a test takes from the real clock by mistake is never due, whenever it runs.
    """

    def __init__(self, moment=dt.datetime(2026, 1, 2, 12, 0, 0, tzinfo=dt.timezone.utc)):
        self.moment = moment

    def __call__(self):
        return self.moment

    def move(self, by):
        self.moment += by
