"""The one clock that the library asks, so that a test can set it.

Every time that is written into a row and every "is it due?" goes through `now`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Clock = Callable[[], dt.datetime]


def _system_clock() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc)


_clock: Clock = _system_clock
_offset = dt.timedelta()


def now() -> dt.datetime:
    """Return the current time as an aware UTC `datetime.datetime`."""
    return _clock() + _offset


def shift(by: dt.timedelta) -> None:
    """Let `now` be later than this machine's clock by so much: a worker follows the clock of the database.

    Leases are compared across machines, whose clocks differ.
    """
    global _offset  # noqa: PLW0603
    _offset = by


def in_use() -> Clock:
    """Return the clock that `now` asks: that of the innermost `use`, else that of the system."""
    return _clock


@contextmanager
def use(clock: Clock) -> Iterator[None]:
    """Let `now` ask `clock`, in every thread of this process, until the block ends.

    Args:
        clock: a callable without arguments that returns an aware `datetime.datetime`.
    """
    global _clock  # noqa: PLW0603  (one clock per process is the point)
    before, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = before
