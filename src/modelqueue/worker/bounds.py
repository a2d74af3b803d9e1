"""Where to begin to read a queue, so that what has ended is not read again and again.

As long as a transaction is open that is older than them, the entries that ended tasks have left in the index
can not be removed. They pile up where each claim begins: 100,000 of them cost it some 10 ms (PostgreSQL 18,
two cores, Intel Xeon, 26 November 2026). So who has just been there begins a little before the last key that
it has seen, at a *bound*.

What comes to wait below a bound is right there, too: it was committed late, has a number for a priority, is
made waiting again under an old time, or comes from a machine whose clock is behind. So now and then there is
a *sweep*: all is read once, from the very first on, and what comes next goes on from what that has found. So
nothing waits longer than until the next sweep, a second or so. It is the same with several workers, each with
bounds of its own: each one sweeps.

No database in here: only what is decided.
"""

from __future__ import annotations

import datetime as dt
import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from modelqueue.status import Status, datetime_to_int, priority_to_datetime, shifted

__all__ = ["Bounds", "Sweeps"]

#: How far before the last key a bound is: who enqueues takes the time first, and commits a little later.
_OVERLAP = dt.timedelta(milliseconds=250)
#: The same for a number, as those that hold a time count milliseconds.
_OVERLAP_OF_NUMBERS = 250
#: A band are the keys with the same first three digits. Of how many the bounds are known: each may take a
#: claim one statement more.
_BAND, _MOST_BANDS = 10**16, 4

#: Seconds from one sweep to the next while there is much to do.
_PERIOD = 1.0
#: The same in times of what one takes, so that they take a tenth of the time at most, as long as that is not
#: more than so many seconds.
_REST, _LONGEST = 10, 10.0
#: Seconds that it has to take to read all, and how many times as long as from a bound, until bounds are used.
#: Where it was 1.5 times, the session that claims came to take 0.47 s of the processor a second instead of
#: 0.2, and a fifth of the rate was gone (300,000 tasks under an open snapshot, two cores, 27 November 2026).
_WORTH_IT, _SEVERAL = 0.001, 1.2
#: How many measurements are kept. The least of them counts, as each may have been held up by something else.
_KEPT = 4
#: Seconds from one trial of a bound to the next, while all is read each time, as that is cheap.
_TRIAL = 0.25


class Bounds:
    """Those of one queue: for each band of keys where to begin.

    There are several, as numbers for priorities are in bands below that of the times. One bound for both
    would either hide the numbers until the next sweep, or have the times read from their first on.
    """

    def __init__(self) -> None:
        #: The last key of each band that was seen; the latest one comes last.
        self._by_band: dict[int, int] = {}

    def note(self, keys: Iterable[int]) -> None:
        """These keys were seen, in their order: in each band the last one is where to begin next time."""
        for band, key in {key // _BAND: key for key in keys}.items():
            self._by_band.pop(band, None)
            self._by_band[band] = key
        while len(self._by_band) > _MOST_BANDS:
            del self._by_band[next(iter(self._by_band))]

    def ranges(self) -> list[tuple[int, int]]:
        """Return what to read, one range of keys after the other; none: nothing is known yet."""
        bands = sorted(self._by_band)
        begins = [max(_a_little_before(Status(self._by_band[band])), band * _BAND) for band in bands]
        ends = [band * _BAND - 1 for band in bands[1:]] + [_last_of_state(band) for band in bands[-1:]]
        return list(zip(begins, ends, strict=True))


def _a_little_before(key: Status) -> int:
    moment = priority_to_datetime(key.priority)
    if moment is None:
        priority = max(key.priority - _OVERLAP_OF_NUMBERS, 0)
    else:
        priority = datetime_to_int(shifted(moment, -_OVERLAP))
    return Status.combine(key.state, priority, 0)


def _last_of_state(band: int) -> int:
    return Status.maximum(Status(band * _BAND).state)


class _Cost(NamedTuple):
    seconds: float
    #: How many were found.
    tasks: int

    def of(self, tasks: int) -> float:
        """Return what so many tasks would have cost, at most."""
        if tasks <= self.tasks:
            return self.seconds
        return self.seconds * tasks / self.tasks if self.tasks else math.inf


class Sweeps:
    """Says, of claims or of looks, whether the next one is to begin at its bounds, or to read all.

    It begins at bounds only while to read all takes much longer: mostly nothing has piled up, and all tasks
    are taken in their order. Times are of the monotonic clock.
    """

    def __init__(self) -> None:
        self._whole: deque[_Cost] = deque(maxlen=_KEPT)
        self._bounded: deque[_Cost] = deque(maxlen=_KEPT)
        #: What it costs to read all; nothing, before that was measured often enough.
        self._least = 0.0
        self._swept_at = self._bounded_at = -math.inf

    def is_due(self, now: float, was_idle: bool = False) -> bool:
        """Say whether to read all.

        Args:
            was_idle: the last one has found less than it could take. Then all is read as soon as that takes
                little of the time.
        """
        if self._least < _WORTH_IT:
            return True
        pause = min(_REST * self._least, _LONGEST)
        if now >= self._swept_at + (pause if was_idle else max(pause, _PERIOD)):
            return True
        # What a bound would save is only known by trying.
        return not self.pays and now < self._bounded_at + _TRIAL

    @property
    def pays(self) -> bool:
        """Whether to begin at bounds saves much, as far as is known."""
        return self._least >= _WORTH_IT and all(
            any(whole.seconds > _SEVERAL * bounded.of(whole.tasks) for bounded in self._bounded)
            for whole in self._whole
        )

    def note(self, was_whole: bool, now: float, seconds: float, tasks: int = 0) -> None:
        """One has just ended: it has taken so long, and has found so many."""
        cost = _Cost(seconds, tasks)
        if was_whole:
            self._whole.append(cost)
            if len(self._whole) == _KEPT:
                self._least = min(one.seconds for one in self._whole)
            self._swept_at = now
        else:
            self._bounded.append(cost)
            self._bounded_at = now
