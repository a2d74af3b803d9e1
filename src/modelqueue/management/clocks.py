"""Going by the clocks of databases: an operator's machine may have another than the workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from modelqueue import clock
from modelqueue.worker.database_clock import DatabaseClock

__all__ = ["Clocks"]


class Clocks:
    """Of each database its clock, which is asked now and then."""

    def __init__(self) -> None:
        self._clocks: dict[str, DatabaseClock] = {}
        self._anchors: dict[str, clock.Anchor | None] = {}

    @contextmanager
    def of(self, using: str) -> Iterator[None]:
        """Go by the clock of a database, as workers do, until the block ends.

        Not for longer, as who calls a command from a program of theirs has another. The clock that a test has
        set is left alone.
        """
        if clock.is_replaced():
            yield
            return
        before = clock.anchor()
        clock.go_by(self._anchors.get(using, before))
        self._clocks.setdefault(using, DatabaseClock(using)).follow()
        self._anchors[using] = clock.anchor()
        try:
            yield
        finally:
            clock.go_by(before)
