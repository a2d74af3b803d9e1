"""The one clock that the library asks, so that a test can set it.

Every time that is written into a row and every "is it due?" goes through `now`.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Clock = Callable[[], dt.datetime]

#: A time, and the count of `steady` at that time.
Anchor = tuple[dt.datetime, float]

#: None: the clock of the machine is asked.
_anchor: Anchor | None = None


def _system_clock() -> dt.datetime:
    if _anchor is None:
        return dt.datetime.now(dt.timezone.utc)
    moment, then = _anchor
    return moment + dt.timedelta(seconds=steady() - then)


_clock: Clock = _system_clock


def now() -> dt.datetime:
    """Return the current time as an aware UTC `datetime.datetime`."""
    return _clock()


def shift(by: dt.timedelta | None) -> None:
    """Let `now` be later than this machine's clock by so much: a worker follows the clock of the database.

    Leases are compared across machines, whose clocks differ. From then on it goes by a count that nobody
    sets: a lease that is stamped by a clock that was just set back is at once another's.

    Args:
        by: zero or negative, too; None: ask the machine's clock again, whatever it says.
    """
    go_by(None if by is None else (dt.datetime.now(dt.timezone.utc) + by, steady()))


def steady() -> float:
    """Return a count of seconds that nobody sets; where that can be, it goes on while the machine sleeps."""
    return _count()


def _counter() -> Callable[[], float]:
    since_boot: int | None = getattr(time, "CLOCK_BOOTTIME", None)  # Linux, whose other one stands still then
    return time.monotonic if since_boot is None else lambda: time.clock_gettime(since_boot)


_count = _counter()


def anchor() -> Anchor | None:
    """Return what `now` goes by since `shift`, for `go_by`."""
    return _anchor


def go_by(known: Anchor | None) -> None:
    """Let `now` go by what `anchor` has returned."""
    global _anchor  # noqa: PLW0603
    _anchor = known


def in_use() -> Clock:
    """Return the clock that `now` asks: that of the innermost `use`, else that of the system."""
    return _clock


def is_replaced() -> bool:
    """Say whether a test has set the clock, by `use`."""
    return _clock is not _system_clock


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
