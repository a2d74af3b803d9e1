"""Task priorities within the number: strict bands below all times, and FIFO in each. Pure functions.

A ready task waits under ``(100 - task priority) * 10**14 + milliseconds since 1970``: the higher its task
priority the lower the number, and in one band the older first. Those numbers are below every time after 2010.
A deferred task waits under its time, and comes into its band when that has come.
"""

from __future__ import annotations

import datetime as dt

from modelqueue.status import State, Status, priority_to_datetime

__all__ = ["FIRST_DEFERRED", "HIGHEST", "in_band", "next_priority", "promoted"]

HIGHEST = 100
_BAND = 10**14
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc)
_MILLISECOND = dt.timedelta(milliseconds=1)
#: From here on a time can be told from a number of a band.
FIRST_DEFERRED = dt.datetime(2010, 1, 1, tzinfo=dt.timezone.utc)


def in_band(task_priority: int, moment: dt.datetime) -> int:
    """Return the number under which a task waits that is ready since a moment."""
    return (HIGHEST - task_priority) * _BAND + max(0, (moment - _EPOCH) // _MILLISECOND)


def next_priority(task_priority: int, at: dt.datetime, now: dt.datetime) -> int | dt.datetime:
    """Return the number, or the time, under which a task waits that may run at a moment."""
    is_deferred = at > now and at >= FIRST_DEFERRED
    return _whole(at) if is_deferred else in_band(task_priority, at)


def _whole(moment: dt.datetime) -> dt.datetime:
    """Return a time in whole milliseconds, as the number has them, and none too early."""
    rest = moment.microsecond % 1000
    try:
        return moment + dt.timedelta(microseconds=1000 - rest) if rest else moment
    except OverflowError:  # the last millisecond there is
        return moment


def promoted(status: Status, task_priority: int) -> Status:
    """Return the waiting status, in its band, of a deferred task whose time has come."""
    moment = priority_to_datetime(status.priority) or FIRST_DEFERRED
    return Status.combine(State.waiting, in_band(task_priority, moment), status.attempts)
