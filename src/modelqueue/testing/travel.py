"""Time travel: another clock for the library, which goes on and can be moved."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator
from contextlib import contextmanager

from modelqueue import clock
from modelqueue.status import ZERO_SECS, shifted

__all__ = ["MovableClock", "moment_of", "moving_clock", "travel"]


class MovableClock:
    """The clock that the library asks inside of `travel`.

    It goes on by itself, as a lease is a time that must not come twice, and as what is written for now is
    due a millisecond later: in a time that stands still nothing would ever be due again.
    """

    def __init__(self, moment: dt.datetime) -> None:
        self._moment = moment
        #: Since when, by the clock that nobody sets; None while it is moved.
        self._since: float | None = time.monotonic()

    def __call__(self) -> dt.datetime:
        """Return the time, as an aware UTC `datetime.datetime`."""
        seconds = 0.0 if self._since is None else time.monotonic() - self._since
        return shifted(self._moment, dt.timedelta(seconds=seconds))

    def move(self, to: dt.datetime | dt.timedelta) -> None:
        """Move to a time (a naive one is UTC), or on by so much; back, too.

        Raises:
            TypeError: `to` is neither.
        """
        self._moment, self._since = self(), None
        try:
            # By a difference, as another clock may be in use inside.
            self._moment = shifted(self._moment, moment_of(to) - clock.now())
        finally:
            self._since = time.monotonic()


@contextmanager
def travel(to: dt.datetime | dt.timedelta = ZERO_SECS) -> Iterator[MovableClock]:
    """Give the library a clock of its own until the block ends, in every thread of this process.

    All that asks `modelqueue.now` has that time: what is due, when leases run out, and the default of a
    `StatusField`. Other clocks, `django.utils.timezone.now` among them, are left alone. It is a decorator,
    too.

    Args:
        to: where it begins: a time (a naive one is UTC), or how long from now.

    Yields:
        The clock, which can be moved.

    Raises:
        TypeError: `to` is neither.
    """
    movable = MovableClock(clock.in_use()())
    with clock.use(movable):
        movable.move(to)
        yield movable


@contextmanager
def moving_clock() -> Iterator[MovableClock]:
    """Give the clock of the innermost `travel`, or one that is put away afterwards."""
    current = clock.in_use()
    if isinstance(current, MovableClock):
        yield current
    else:
        with travel() as movable:
            yield movable


def moment_of(to: object) -> dt.datetime:
    """Return the time that is meant, aware.

    Raises:
        TypeError: it is neither a time nor a duration.
    """
    if isinstance(to, dt.timedelta):
        return shifted(clock.now(), to)
    if isinstance(to, dt.datetime):
        return to.replace(tzinfo=dt.timezone.utc) if to.tzinfo is None else to
    raise TypeError(f"A time is a datetime.datetime or, from now on, a datetime.timedelta, not {to!r}.")
