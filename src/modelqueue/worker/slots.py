"""What a process may claim: for each queue in turn, as many tasks as it has free slots for.

Promises that no queue takes turns from another: whoever has had one comes last, and free threads are shared
among all queues that want some.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from modelqueue.queues import Queue
from modelqueue.worker.options import ASYNC_SLOTS
from modelqueue.worker.suspects import Suspects

__all__ = ["Lane", "Slots", "Turn"]

#: Tasks of an async queue that one claim takes at most, so that the others get their turn.
_MOST = 50


class Lane:
    """A queue in this process."""

    def __init__(self, queue: Queue[Any], threads: int) -> None:
        self.queue = queue
        self.is_async = queue.is_async
        if queue.is_async:
            self.slots = queue.slots or ASYNC_SLOTS
        else:
            self.slots = min(queue.slots or threads, threads)
        self.running = 0
        #: Is there perhaps something due?
        self.is_wanted = True
        #: From when on to look for something to recover, by the monotonic clock.
        self.recover_at = math.inf
        self.suspects = Suspects()
        #: When it may have its next turn, by the monotonic clock, as the last one has failed.
        self.not_before = 0.0

    @property
    def free(self) -> int:
        return self.slots - self.running


@dataclass(frozen=True)
class Turn:
    """What to do next: recover tasks of a queue, or claim up to `limit` of them."""

    lane: Lane
    limit: int
    """0: recover."""

    @property
    def is_recovery(self) -> bool:
        return self.limit == 0


class Slots:
    """The slots of a process, shared by its claimer and those who run and complete tasks."""

    def __init__(self, lanes: list[Lane], threads: int, most_tasks: int | None = None) -> None:
        self._lanes = lanes
        #: How many more tasks may be claimed at all: less what a claim under way may take, and as it is.
        self._left = self._unclaimed = math.inf if most_tasks is None else most_tasks
        self._by_name = {lane.queue.name: lane for lane in lanes}
        self._was_recovery = False
        self._threads = self._free_threads = threads
        self._changed = threading.Condition()
        self._is_stopped = False

    @property
    def lanes(self) -> list[Lane]:
        with self._changed:
            return list(self._lanes)

    def want(self, names: Iterable[str]) -> None:
        """Note that these queues may have due tasks."""
        with self._changed:
            for lane in self._known(names):
                lane.is_wanted = True
            self._changed.notify()

    def recover(self, names: Iterable[str]) -> None:
        """Note that these queues may have abandoned tasks."""
        with self._changed:
            for lane in self._known(names):
                lane.recover_at = 0.0
            self._changed.notify()

    def look_twice(self, lane: Lane) -> None:
        """After a recovery: have another, if it has seen something for the first time."""
        with self._changed:
            lane.recover_at = min(lane.recover_at, lane.suspects.look_at)

    def _known(self, names: Iterable[str]) -> list[Lane]:
        # A queue may be gone from the code since the supervisor has read it.
        return [self._by_name[name] for name in names if name in self._by_name]

    def stop(self) -> None:
        """There is no further turn."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    def next(self, seconds: float = math.inf) -> Turn | None:
        """Wait for the next turn, and reserve its slots; None: there is none, or none so soon."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._is_stopped:
                if (turn := self._choose()) is not None:
                    self._was_recovery = turn.is_recovery
                    return turn
                now = time.monotonic()
                if now >= deadline:
                    return None
                moments = [lane.not_before for lane in self._lanes if lane.not_before > now]
                looks = [max(lane.recover_at, lane.not_before) for lane in self._lanes]
                moment = min([deadline, *moments, *looks])
                self._changed.wait(None if moment == math.inf else moment - now)
        return None

    def _choose(self) -> Turn | None:
        now = time.monotonic()
        ready = [lane for lane in self._lanes if lane.not_before <= now]
        # In turns: there may be very many to recover, and very many due.
        choices = [self._choose_recovery, self._choose_claim]
        for choose in reversed(choices) if self._was_recovery else choices:
            if (turn := choose(ready)) is not None:
                return turn
        return None

    def _choose_recovery(self, ready: list[Lane]) -> Turn | None:
        for lane in ready:
            if lane.recover_at <= time.monotonic():
                lane.recover_at = math.inf
                return Turn(lane, 0)
        return None

    def _choose_claim(self, ready: list[Lane]) -> Turn | None:
        if self._left <= 0:
            return None
        wanted = [lane for lane in ready if lane.is_wanted and lane.free > 0]
        able = [lane for lane in wanted if lane.is_async or self._free_threads > 0]
        if not able:
            return None
        sharing = sum(not one.is_async for one in wanted)
        share = -(-self._threads // max(sharing, 1))
        below = [lane for lane in able if lane.is_async or lane.running < share]
        lane = (below or able)[0]
        self._lanes.remove(lane)
        self._lanes.append(lane)
        most = _MOST if lane.is_async else min(max(share - lane.running, 1), self._free_threads)
        limit = int(min(lane.free, most, self._left))
        lane.is_wanted = False  # unless somebody says so meanwhile
        self._take(lane, limit)
        self._left -= limit
        return Turn(lane, limit)

    def claimed(self, turn: Turn, count: int) -> None:
        """Give back the slots of a turn that were not needed; a turn that was used up is not the last."""
        with self._changed:
            self._take(turn.lane, count - turn.limit)
            self._left += turn.limit - count
            self._unclaimed -= count
            if count == turn.limit:
                turn.lane.is_wanted = True
            self._changed.notify()

    def failed(self, turn: Turn, pause: float) -> None:
        """Put a turn off that has failed, by so many seconds; other queues have theirs meanwhile.

        A claim is tried again then. A recovery only when its supervisor says so, who holds it back after an
        outage: then all leases have expired.
        """
        with self._changed:
            self._take(turn.lane, -turn.limit)
            self._left += turn.limit
            turn.lane.not_before = time.monotonic() + pause
            if not turn.is_recovery:
                turn.lane.is_wanted = True
            self._changed.notify()

    @property
    def is_used_up(self) -> bool:
        """Whether as many tasks were claimed as may be at all."""
        with self._changed:
            return self._unclaimed <= 0

    def freed(self, lane: Lane) -> None:
        """A task has ended."""
        with self._changed:
            self._take(lane, -1)
            self._changed.notify()

    def _take(self, lane: Lane, count: int) -> None:
        lane.running += count
        if not lane.is_async:
            self._free_threads -= count

    @property
    def running(self) -> int:
        """How many slots are taken, by tasks or by a claim that is under way."""
        with self._changed:
            return sum(lane.running for lane in self._lanes)
