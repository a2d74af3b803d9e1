"""Following the clock of the database, since leases are compared across machines."""

from __future__ import annotations

import logging
import time

from modelqueue import clock
from modelqueue.engines import engine_for

__all__ = ["DatabaseClock"]

logger = logging.getLogger("modelqueue")

#: Seconds between two looks at it.
_INTERVAL = 60.0
#: Seconds: a smaller difference is left alone, a larger one is told.
_SMALL, _LARGE = 0.05, 1.0


class DatabaseClock:
    """The clock of one database, that this process follows from the first look on."""

    def __init__(self, using: str) -> None:
        self.using = using
        self._next = 0.0

    def follow(self) -> None:
        """Set the clock of this process by that of the database, if the last time was long ago."""
        if time.monotonic() < self._next:
            return
        offset = engine_for(self.using).clock_offset()
        if offset is None:  # next time, perhaps
            return
        self._next = time.monotonic() + _INTERVAL
        seconds = offset.total_seconds()
        if abs(seconds) >= _LARGE:
            logger.warning(
                "The clock of this machine is %.1f s %s that of the database %r, which the worker follows. "
                "Keep the clocks synchronized.",
                abs(seconds),
                "behind" if seconds > 0 else "ahead of",
                self.using,
            )
        clock.shift(offset if abs(seconds) >= _SMALL else offset * 0)
