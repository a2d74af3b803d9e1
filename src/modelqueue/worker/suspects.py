"""Expired tasks that were seen once: only what is seen again a moment later is taken back.

A lease can have run out although its worker lives: a transaction had locked the row for longer than that, an
outage has just ended. In the moment in which the row is free again its worker, who tries twice a second, is
to be faster than who would take it away.
"""

from __future__ import annotations

import math
import time
from typing import Any

from modelqueue.engines import Candidate
from modelqueue.status import Status

__all__ = ["Suspects"]

#: Seconds from the first look to the one that counts, at least and at most.
_SHORTEST, _LONGEST = 1.5, 10.0


class Suspects:
    """Those of one queue."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, Status], float] = {}
        #: When to look again, by the monotonic clock; infinity: nothing waits for its second look.
        self.look_at = math.inf

    def confirm(self, row: Candidate) -> bool:
        """Note that a row is expired and free; return whether it was so a moment ago, too."""
        now = time.monotonic()
        look_at = self._seen.setdefault((row.key, row.status), now) + _SHORTEST
        if now < look_at:
            self.look_at = min(self.look_at, look_at)
        return now >= look_at

    def begin(self) -> None:
        """Before each look: what was seen long ago says nothing of now."""
        self.look_at = math.inf
        oldest = time.monotonic() - _LONGEST
        self._seen = {row: seen for row, seen in self._seen.items() if seen >= oldest}

    def forget(self) -> None:
        """After a look that has failed: the database was away, perhaps."""
        self._seen.clear()
        self.look_at = math.inf
