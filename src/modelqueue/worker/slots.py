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
from modelqueue.worker.bell import Bell
from modelqueue.worker.bounds import Bounds, Sweeps
from modelqueue.worker.ears import Ears
from modelqueue.worker.options import ASYNC_SLOTS

__all__ = ["Lane", "Slots", "Turn", "most_at_a_time"]

#: Tasks of an async queue that one claim takes at most, so that the others get their turn.
_MOST = 48
#: Tasks of a queue that may be claimed beyond the free slots, and for how many seconds they may last at most,
#: as other processes would not have them wait.
_MOST_AHEAD, _LONGEST_AHEAD = 1024, 0.05
#: Tasks that one claim takes at most: while it is under way those of the last ones are run, and written.
_BATCH = 256
#: Seconds of an action below which its slot counts as taken until its outcome is written with others: to wake
#: the claimer for each of thousands takes longer than they do.
_SHORT = 0.001
#: Seconds for which nothing is claimed ahead of a queue in which such a task was that is never retried.
_NOT_AHEAD = 2.0
#: Up to here a claim may take any number.
_SMALL = 8
#: How much the newest measurement counts.
_WEIGHT = 0.1


class Lane:
    """A queue in this process."""

    def __init__(self, queue: Queue[Any], threads: int, alone: bool = False) -> None:
        self.queue = queue
        self.source = queue.alone if alone else queue.shared
        self.is_async = queue.is_async
        if queue.is_async:
            self.slots = queue.slots or ASYNC_SLOTS
        else:
            self.slots = min(queue.slots or threads, threads)
        #: Tasks in hand, until their outcomes are written; of these such as have left their slots already.
        self.running = self.left = 0
        #: Tasks that may be claimed beyond the slots: as many as are run while the next ones are claimed.
        self.ahead = 0
        #: What one task costs: that is not known before the first has ended.
        self._seconds: float | None = None
        #: Not where the first attempt is the last: the death of a machine would cancel what has not begun.
        self._may_be_ahead = (
            not (queue.is_async or alone or queue.policy.retry == 0) and self.slots == threads
        )
        #: Is there perhaps something due?
        self.is_wanted = True
        #: Where its claims begin, and whether the last one has found less than it might have taken.
        self.bounds, self.sweeps, self.was_idle = Bounds(), Sweeps(), True
        #: Until when nothing is claimed ahead, by the monotonic clock.
        self.not_ahead_until = 0.0
        #: When it may have its next turn, by the monotonic clock, as the last one has failed.
        self.not_before = 0.0

    @property
    def busy(self) -> int:
        """How many tasks have a slot, or wait for one."""
        return self.running - self.left

    @property
    def free(self) -> int:
        return self.slots - self.busy

    @property
    def is_short(self) -> bool:
        """Say whether its tasks take less time than to look after each of them by itself."""
        return self._seconds is not None and self._seconds < _SHORT

    def note_task(self, seconds: float) -> None:
        """An action has taken so long."""
        known = seconds if self._seconds is None else self._seconds
        self._seconds = known + (seconds - known) * _WEIGHT

    def note_wait(self) -> None:
        """What was claimed ahead was not begun in time: claim no more ahead until tasks are short again."""
        self.note_task(1.0)
        self.ahead = 0

    def note_once(self) -> None:
        """A task was claimed ahead that may be tried only once: claim nothing ahead for a while."""
        self.not_ahead_until = time.monotonic() + _NOT_AHEAD
        self.ahead = 0

    def note_claim(self, seconds: float) -> None:
        """A claim has taken so long: decide how many tasks it takes to be busy during two such."""
        if time.monotonic() < self.not_ahead_until:
            self.ahead = 0
        elif self._may_be_ahead and self._seconds is not None:
            each = max(self._seconds / self.slots, 1e-6)
            wanted = 2 * seconds / each
            if wanted >= 1:
                # The next claim waits until half of all that may be in hand has ended. With fewer than one
                # for each slot some threads had nothing by then (a quarter of the rate of 10 ms of sleep).
                wanted = max(wanted, self.slots)
            self.ahead = int(min(wanted, _LONGEST_AHEAD / each, _MOST_AHEAD))


@dataclass(frozen=True)
class Turn:
    """What to do next: claim up to `limit` tasks of a queue."""

    lane: Lane
    limit: int


class Slots:
    """The slots of a process, shared by its claimer and those who run and complete tasks."""

    def __init__(
        self,
        lanes: list[Lane],
        threads: int,
        most_tasks: int | None = None,
        alone: bool = False,
        bell: Bell | None = None,
        ears: Ears | None = None,
    ) -> None:
        self._lanes = lanes
        #: How many more tasks may be claimed at all: less what a claim under way may take, and as it is.
        self._left = self._unclaimed = math.inf if most_tasks is None else most_tasks
        self._by_name = {lane.queue.name: lane for lane in lanes}
        self._threads = threads
        #: Does one task run at a time, whatever its queue?
        self._is_alone = alone
        self._lock = threading.RLock()
        #: Wakes who waits for the next turn; the supervisor rings it, too.
        self._bell = bell or Bell([])
        self._ears = ears or Ears([])
        self._is_waiting = False
        self._is_stopped = False

    def want(self, names: Iterable[str]) -> None:
        """Note that these queues may have due tasks."""
        with self._lock:
            self._want(names)
            self._wake()

    def _want(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._by_name:  # it may be gone from the code since the supervisor has read it
                self._by_name[name].is_wanted = True

    def _wake(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self._bell.ring()

    def stop(self) -> None:
        """There is no further turn."""
        with self._lock:
            self._is_stopped = True
            self._wake()

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    def next(self, seconds: float = math.inf) -> Turn | None:
        """Wait for the next turn, and reserve its slots; None: there is none, or none so soon."""
        deadline = time.monotonic() + seconds
        while True:
            told = self._ears.heard()  # without the lock, as it may ask the database
            with self._lock:  # or nobody might ring for a stop that comes just now
                if self._is_stopped:
                    return None
                self._is_waiting = False
                self._want(self._bell.heard())
                self._want(told)
                if (turn := self._choose()) is not None:
                    return turn
                now = time.monotonic()
                if now >= deadline:
                    return None
                moments = [lane.not_before for lane in self._lanes if lane.not_before > now]
                moment = min([deadline, now + self._ears.pause, *moments])
                self._is_waiting = True
            self._bell.wait(None if moment == math.inf else moment - now, self._ears.files)

    def _choose(self) -> Turn | None:
        if self._left <= 0 or (self._is_alone and self.running):
            return None
        now = time.monotonic()
        ready = [lane for lane in self._lanes if lane.not_before <= now]
        wanted = [lane for lane in ready if lane.is_wanted and lane.free + lane.ahead > 0]
        sharing = max(sum(not one.is_async for one in wanted), 1)
        share = -(-self._threads // sharing)
        able = [lane for lane in wanted if self._most(lane, share, sharing) > 0]
        if not able:
            return None
        below = [lane for lane in able if lane.is_async or lane.busy < share]
        lane = (below or able)[0]
        self._lanes.remove(lane)
        self._lanes.append(lane)
        limit = 1 if self._is_alone else _few_sizes(int(min(self._most(lane, share, sharing), self._left)))
        lane.is_wanted = False  # unless somebody says so meanwhile
        self._take(lane, limit)
        self._left -= limit
        return Turn(lane, limit)

    def _most(self, lane: Lane, share: int, sharing: int) -> int:
        """Return how many tasks of a queue that shares the threads with others may be claimed next."""
        if lane.is_async:
            return min(lane.free, _MOST)
        free = self._threads - sum(self._taken(one, share) for one in self._lanes if one is not lane)
        free -= lane.busy
        ahead = lane.ahead // sharing
        # Few at a time would cost as much as many.
        if ahead and free + ahead < min((self._threads + ahead) / 2, _BATCH):
            return 0
        return min(lane.free + ahead, max(share - lane.busy, 1) + ahead, free + ahead, _BATCH)

    def _taken(self, lane: Lane, share: int) -> int:
        """Return how many threads a queue holds up; what is claimed ahead does not take long."""
        if lane.is_async:
            return 0
        return min(lane.busy, share) if lane.ahead else lane.busy

    def claimed(self, turn: Turn, count: int, seconds: float | None = None) -> None:
        """Give back the slots of a turn that were not needed; a turn that was used up is not the last.

        Args:
            seconds: how long the claim has taken.
        """
        with self._lock:
            if seconds is not None:
                turn.lane.note_claim(seconds)
            self._take(turn.lane, count - turn.limit)
            self._left += turn.limit - count
            self._unclaimed -= count
            if count == turn.limit:
                turn.lane.is_wanted = True
            self._wake()

    def failed(self, turn: Turn, pause: float) -> None:
        """Put a turn off that has failed, by so many seconds; other queues have theirs meanwhile."""
        with self._lock:
            self._take(turn.lane, -turn.limit)
            self._left += turn.limit
            turn.lane.not_before = time.monotonic() + pause
            turn.lane.is_wanted = True
            self._wake()

    @property
    def is_used_up(self) -> bool:
        """Whether as many tasks were claimed as may be at all."""
        with self._lock:
            return self._unclaimed <= 0

    def leave(self, lane: Lane) -> bool:
        """An action has ended, so the next task may have its slot while its outcome is written.

        Returns whether that counts, which is to be told when it is written. As many as a queue has slots may
        have left theirs: where outcomes can not be written, no more are claimed at last.
        """
        if lane.is_short:
            return False
        with self._lock:
            if lane.left >= lane.slots:
                return False
            lane.left += 1
            self._wake()
        return True

    def freed(self, ended: Iterable[tuple[Lane, float | None, bool]]) -> None:
        """Outcomes are written: whose, how long the action took, and whether its slot was left already."""
        with self._lock:
            for lane, seconds, has_left in ended:
                self._take(lane, -1)
                lane.left -= has_left
                if seconds is not None:
                    lane.note_task(seconds)
            self._wake()

    def _take(self, lane: Lane, count: int) -> None:
        lane.running += count

    @property
    def running(self) -> int:
        """How many slots are taken, by tasks or by a claim that is under way."""
        with self._lock:
            return sum(lane.running for lane in self._lanes)


def _few_sizes(limit: int) -> int:
    """Return the next smaller one of few sizes of a claim.

    What a claim takes stands in its statement, which is compiled, and planned by the database, once for each.
    That costs as much as the claim itself.
    """
    half = 1 << max(limit.bit_length() - 2, 0)  # 8, 12, 16, 24, 32, 48, ...
    return limit if limit <= _SMALL else limit // half * half


def most_at_a_time(queues: Iterable[Queue[Any]], threads: int) -> int:
    """Return how many tasks a process may have in hand."""
    lanes = [Lane(queue, threads) for queue in queues]
    # Each queue may be ahead: another one may have claimed when this one wanted nothing. Twice the slots, as
    # of those that have left theirs the outcomes are still to be written.
    return threads + sum(2 * lane.slots + (0 if lane.is_async else _MOST_AHEAD) for lane in lanes)
