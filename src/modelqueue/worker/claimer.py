"""The claimer: the one thread of a process that takes tasks, of its own queues in turns, and recovers others.

It survives any outage of the database: it waits with backoff, says so once, and goes on by itself.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from contextlib import suppress
from typing import Any

from django.db import connections
from django.db.utils import Error

from modelqueue import verbs
from modelqueue.attempts import AsyncAttempt, AtomicAttempt
from modelqueue.engines import Claim
from modelqueue.exceptions import Interrupted
from modelqueue.leases import keeper_for
from modelqueue.worker.completer import Completer
from modelqueue.worker.database_clock import INTERVAL, DatabaseClock, harmless
from modelqueue.worker.loop import Loop
from modelqueue.worker.running import Register, Running
from modelqueue.worker.slots import Lane, Slots, Turn
from modelqueue.worker.threads import Threads

__all__ = ["Claimer"]

logger = logging.getLogger("modelqueue")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
#: Seconds after which the clock is looked at, if there is nothing to claim.
_CLOCK_INTERVAL = 60.0


class Claimer:
    def __init__(
        self, slots: Slots, register: Register, threads: Threads, loop: Loop, completer: Completer
    ) -> None:
        self._slots = slots
        self._register = register
        self._threads = threads
        self._loop = loop
        self._completer = completer
        self._thread = threading.Thread(target=self._work, name="modelqueue-claimer", daemon=True)
        self._troubles = _Troubles()
        self._clock: DatabaseClock | None = None
        #: Until when nothing is recovered, as the time has jumped.
        self._recover_from = 0.0

    def start(self) -> None:
        self._thread.start()

    @property
    def is_started(self) -> bool:
        return self._thread.ident is not None

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Claim no more. What is being claimed just now is run."""
        self._slots.stop()

    def join(self, seconds: float) -> None:
        self._thread.join(max(0.0, seconds))

    def _work(self) -> None:
        try:
            while not self._slots.is_stopped:
                turn = self._slots.next(_CLOCK_INTERVAL)
                self._follow_the_clock(turn)
                if turn is not None:
                    self._recover(turn) if turn.is_recovery else self._claim(turn)
        finally:
            connections.close_all()

    def _follow_the_clock(self, turn: Turn | None) -> None:
        """Do so also while all slots are taken: leases are renewed meanwhile, by the same clock."""
        if self._clock is None and turn is not None:
            with suppress(Exception):  # of what gives the queryset, which the claim will tell
                self._clock = DatabaseClock(turn.lane.queue.using)
        if self._clock is not None and (jump := abs(self._clock.follow())):
            self._hold_back(jump)

    def _hold_back(self, jump: float) -> None:
        """Recover nothing after the time has jumped, until other processes have seen it, and renewed."""
        queues = [lane.queue for lane in self._slots.lanes if jump > harmless(lane.queue)]
        if queues:
            wait = max(queue.lease for queue in queues).total_seconds() + INTERVAL
            self._recover_from = time.monotonic() + wait

    def _claim(self, turn: Turn) -> None:
        lane = turn.lane
        try:
            source = lane.queue.source()
            keeper_for(source.using).reserve()
            claims: list[Claim[Any]] = verbs.claim(source, turn.limit)
        except Exception as error:
            self._slots.failed(turn, self._troubles.begun(lane, "claimed", error))
            return
        self._troubles.ended(lane, "claimed")
        self._slots.claimed(turn, len(claims))
        for claim in claims:
            running = self._register.add(lane, lane.queue.attempt(claim, source))
            try:
                self._begin(lane, running)
            except Exception as error:  # the system gives no more threads, for example
                logger.exception("%s can not be begun, and is given back.", running)
                self._completer.put(running, Interrupted(str(error)))
                lane.not_before = time.monotonic() + 1.0

    def _begin(self, lane: Lane, running: Running) -> None:
        attempt = running.attempt
        attempt.waits = isinstance(attempt, AtomicAttempt)  # in its thread, where nobody waits for it
        lost = (lambda: self._loop.cancel(running)) if lane.is_async else None
        seconds = lane.queue.lease.total_seconds()
        attempt.renewal = keeper_for(attempt.source.using).hold(attempt, seconds, lost)
        if not isinstance(attempt, AsyncAttempt):
            self._threads.submit(running)
            return
        attempt.start()
        if attempt.error is None:
            self._loop.submit(running)
        else:
            self._completer.put(running, attempt.error)

    def _recover(self, turn: Turn) -> None:
        lane = turn.lane
        if time.monotonic() < self._recover_from:
            return
        lane.suspects.begin()
        try:
            verbs.recover(lane.queue.source(), lane.queue.recovery(), is_certain=lane.suspects.confirm)
        except Exception as error:
            lane.suspects.forget()
            self._slots.failed(turn, self._troubles.begun(lane, "recovered", error))
        else:
            self._troubles.ended(lane, "recovered")
            self._slots.look_twice(lane)


class _Troubles:
    """Queues of which nothing can be claimed, or recovered: that is told once, and tried ever less often.

    The database is away, or a queue alone is broken: its table is missing, perhaps.
    """

    def __init__(self) -> None:
        self._pause: dict[tuple[str, str], float] = {}

    def begun(self, lane: Lane, what: str, error: Exception) -> float:
        """Note an error; return for how many seconds to wait."""
        name = lane.queue.name
        pause = self._pause.get((name, what))
        if pause is None:
            fault = None if isinstance(error, Error) else error
            logger.warning("%s: its tasks can not be %s, trying again: %s", name, what, error, exc_info=fault)
        pause = min(2 * pause, _LONGEST_PAUSE) if pause else _FIRST_PAUSE
        self._pause[name, what] = pause
        return random.uniform(pause / 2, pause)  # noqa: S311  (jitter)

    def ended(self, lane: Lane, what: str) -> None:
        """Note that there is none any more."""
        name = lane.queue.name
        if self._pause.pop((name, what), None) is not None:
            logger.warning("%s: its tasks can be %s again.", name, what)
