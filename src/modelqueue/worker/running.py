"""What a process is working on: each task from its claim until its outcome is written."""

from __future__ import annotations

import datetime as dt
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from modelqueue.attempts import Attempt
from modelqueue.engines import Candidate
from modelqueue.exceptions import TimedOut
from modelqueue.status import Status
from modelqueue.worker.board import Blank, Board
from modelqueue.worker.slots import Lane, Slots

__all__ = ["Claimed", "Register", "Running"]


class Running:
    """A task that was claimed, and what is known of it."""

    __slots__ = (
        "_began",
        "_turn",
        "attempt",
        "has_left",
        "interrupted_at",
        "is_overdue",
        "lane",
        "limit",
        "number",
        "place",
        "seconds",
        "waits_since",
    )

    def __init__(self, lane: Lane, attempt: Attempt[Any], number: int, place: int | None = None) -> None:
        self.lane = lane
        self.attempt = attempt
        #: By which its supervisor knows it.
        self.number = number
        #: Where it stands on the board; None: that is full.
        self.place = place
        #: Since when it waits for a thread, by the monotonic clock; infinity: it does not.
        self.waits_since = math.inf
        #: Is its slot free already?
        self.has_left = False
        self._turn = threading.Lock()
        #: When its action will have taken too long, by the monotonic clock; infinity: it is not under way.
        self.limit = math.inf
        self._began: float | None = None
        #: How long its action has taken.
        self.seconds: float | None = None
        #: When it was interrupted because of that.
        self.interrupted_at: float | None = None
        #: Did it go on for long in spite of that?
        self.is_overdue = False

    @property
    def timeout(self) -> dt.timedelta:
        return self.attempt.policy.timeout

    def take(self) -> bool:
        """Say to one alone, and once, that it may begin with it, or give it back."""
        return self._turn.acquire(blocking=False)

    def action_begins(self) -> None:
        """From here on it takes time."""
        self._began = time.monotonic()
        self.limit = self._began + self.timeout.total_seconds()

    def action_has_ended(self) -> None:
        self.limit = math.inf
        if self._began is not None:
            self.seconds = time.monotonic() - self._began

    def timed_out(self) -> TimedOut:
        """Return what its attempt has failed with if its action was interrupted as it took too long."""
        return TimedOut(f"the action took longer than its timeout of {self.timeout}")

    def __str__(self) -> str:
        return f"{self.lane.queue.name} {self.attempt.claim.row.pk}"


class Claimed(NamedTuple):
    """What a process says of a task that its board can not name: what it takes to give it back."""

    place: int
    number: int
    queue: str
    row: Candidate
    """As it was before the claim."""


class Register:
    """All that a process is working on, and how what it had before has ended."""

    def __init__(self, slots: Slots, board: Board, tell: Callable[[Sequence[Claimed | Blank]], None]) -> None:
        self._slots = slots
        self._board = board
        self._tell = tell
        self._numbers = itertools.count(1)
        self._running: set[Running] = set()
        self._changed = threading.Condition()
        #: Attempts by outcome since the last report.
        self._ended: Counter[str] = Counter()

    def claim(self) -> AbstractContextManager[None]:
        """Return what is to be around a claim, and around the `add` of what it took."""
        return self._board.claim()

    def add(self, lane: Lane, attempts: list[Attempt[Any]]) -> list[Running]:
        """Note that these tasks are claimed, where the supervisor can read it, or tell him."""
        added, told = list[Running](), list[Claimed]()
        for attempt in attempts:
            number, queue, claim = next(self._numbers), lane.queue.name, attempt.claim
            named = claim.row if self._can_name(claim.row) else None
            place = self._board.take(number, claim.lease, queue, named)
            if place is not None and named is None:
                told.append(Claimed(place, number, queue, claim.row))
            added.append(Running(lane, attempt, number, place))
        with self._changed:
            self._running.update(added)
        if told:
            self._tell(told)
        return added

    def _can_name(self, row: Candidate) -> bool:
        if not self._board.can_name(row) and (blank := self._board.new_blank(row)) is not None:
            self._tell([blank])
        return self._board.can_name(row)

    def begin(self, running: Running) -> None:
        """The action of a task is called next: from here on its attempt is charged if this process dies."""
        if running.place is not None:
            self._board.begin(running.place)

    def renew(self, running: Running, stored: Status, renewed: Status) -> None:
        """The lease of a task is about to become another."""
        if running.place is not None:
            self._board.renew(running.place, stored, renewed)

    def leave(self, running: Running) -> None:
        """Its action has ended, so its slot is free; its outcome is still to be written."""
        running.has_left = self._slots.leave(running.lane)

    def end(self, ended: Sequence[tuple[Running, str]]) -> None:
        """The outcomes of tasks are written, each by how it has ended ("lost": never will be by us)."""
        for running, _ in ended:
            if running.place is not None:
                self._board.free(running.place)
            # The lease knows its attempt: without this the task, and all that it holds open, would live until
            # the garbage collector comes by.
            running.attempt.renewal = None
        with self._changed:
            self._running.difference_update(running for running, _ in ended)
            self._ended.update(how for _, how in ended)
            self._changed.notify_all()
        self._slots.freed([(running.lane, running.seconds, running.has_left) for running, _ in ended])

    def running(self) -> list[Running]:
        """Return all that is claimed and has not ended."""
        with self._changed:
            return list(self._running)

    def report(self) -> Counter[str]:
        """Return how the attempts since the last report have ended."""
        with self._changed:
            ended, self._ended = self._ended, Counter()
            return ended

    def wait_for_all(self, seconds: float) -> bool:
        """Wait until nothing is left; return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, max(0.0, seconds))

    def let_go(self, seconds: float) -> bool:
        """Renew the leases of what is still under way no more; return whether there is something.

        Args:
            seconds: how long to wait at most, all in all, for renewals that are under way.
        """
        deadline = time.monotonic() + seconds
        running = self.running()
        for one in running:
            renewal = one.attempt.renewal  # which goes when the completer is done with it
            if renewal is not None:
                renewal.end(max(0.0, deadline - time.monotonic()))
        return bool(running)
