"""What a process is working on: each task from its claim until its outcome is written."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any, NamedTuple

from modelqueue.attempts import Attempt
from modelqueue.engines import Candidate
from modelqueue.status import Status
from modelqueue.worker.slots import Lane, Slots

__all__ = ["Left", "Register", "Running"]


class Running:
    """A task that was claimed, and what is known of it."""

    def __init__(self, lane: Lane, attempt: Attempt[Any]) -> None:
        self.lane = lane
        self.attempt = attempt

    def __str__(self) -> str:
        return f"{self.lane.queue.name} {self.attempt.claim.row.pk}"


class Left(NamedTuple):
    """A task that a process could not bring to its end: what it takes to give it back."""

    queue: str
    row: Candidate
    leases: set[Status]


class Register:
    """All that a process is working on, and how what it had before has ended."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._running: set[Running] = set()
        self._changed = threading.Condition()
        #: Attempts by outcome since the last report.
        self._ended: Counter[str] = Counter()

    def add(self, lane: Lane, attempt: Attempt[Any]) -> Running:
        running = Running(lane, attempt)
        with self._changed:
            self._running.add(running)
        return running

    def end(self, running: Running, how: str) -> None:
        """The outcome of a task is written (or, with `how` "lost", never will be by us)."""
        with self._changed:
            self._running.discard(running)
            self._ended[how] += 1
            self._changed.notify_all()
        self._slots.freed(running.lane)

    def report(self) -> Counter[str]:
        """Return how the attempts since the last report have ended."""
        with self._changed:
            ended, self._ended = self._ended, Counter()
            return ended

    def wait_for_all(self, seconds: float) -> bool:
        """Wait until nothing is left; return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, max(0.0, seconds))

    def left(self, seconds: float) -> list[Left]:
        """Return what is still under way, and will be for ever: its leases are not renewed any more.

        Args:
            seconds: how long to wait at most, all in all, for renewals that are under way.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            running = list(self._running)
        for one in running:
            if one.attempt.renewal is not None:
                one.attempt.renewal.end(max(0.0, deadline - time.monotonic()))
        return [Left(one.lane.queue.name, one.attempt.claim.row, set(one.attempt.leases)) for one in running]
