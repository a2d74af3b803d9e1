"""Following the clock of the database, since leases are compared across machines."""

from __future__ import annotations

import logging
import time
from contextlib import suppress

from django.db import connections

from modelqueue import clock
from modelqueue.engines import engine_for

__all__ = ["INTERVAL", "DatabaseClock"]

logger = logging.getLogger("modelqueue")

#: Seconds between two looks at it, and when the last one has failed.
INTERVAL, _SOON = 60.0, 5.0
#: Seconds: a smaller difference is left alone, a larger one is told.
_SMALL, _LARGE = 0.05, 1.0
#: Seconds by which the clock of the machine was set, or the machine stood still, since the last look.
_STEP = 0.05


class DatabaseClock:
    """The clock of one database, that this process follows from the first look on."""

    def __init__(self, using: str) -> None:
        self.using = using
        self._next = 0.0
        #: By how much the clock of the machine was ahead of the steady count.
        self._ahead = 0.0
        self._is_told = False

    def follow(self) -> float:
        """Set the clock of this process by that of the database, if the last time was long ago.

        Or at once if the clock of the machine was set since, as the machine was asleep then, perhaps.

        Returns:
            By how many seconds the time of this process has jumped, more than it went on. At the first look,
            from the clock of the machine on: perhaps that of the database was set a moment ago.

        Raises nothing: who can not read it goes on by the last look.
        """
        ahead = time.time() - clock.steady()
        if time.monotonic() < self._next and abs(ahead - self._ahead) < _STEP:
            return 0.0
        self._next, self._ahead = time.monotonic() + _SOON, ahead
        before, then = clock.now(), clock.steady()
        self._look()
        return (clock.now() - before).total_seconds() - (clock.steady() - then)

    def _look(self) -> None:
        try:
            offset = engine_for(self.using).clock_offset()
        except Exception as error:
            logger.debug("The clock of the database %r can not be read: %s", self.using, error)
            with suppress(Exception):  # so that who comes next opens another
                connections[self.using].close()
            return
        if offset is None:
            level = logging.DEBUG if self._is_told else logging.WARNING
            logger.log(
                level,
                "The database %r takes too long to answer to tell the time, so that of this machine "
                "counts. Keep the clocks synchronized.",
                self.using,
            )
            self._is_told = True
            return
        self._next = time.monotonic() + INTERVAL
        self._is_told = False
        seconds = offset.total_seconds()
        if abs(seconds) >= _LARGE:
            logger.warning(
                "The clock of this machine is %.1f s %s that of the database %r, which counts. "
                "Keep the clocks synchronized.",
                abs(seconds),
                "behind" if seconds > 0 else "ahead of",
                self.using,
            )
        clock.shift(offset if abs(seconds) >= _SMALL else offset * 0)
