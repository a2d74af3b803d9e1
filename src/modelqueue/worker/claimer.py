"""The claimer: the one thread of a process that takes tasks, of its own queues in turns, and recovers others.

It survives any outage of the database: it waits with backoff, says so once, and goes on by itself.
"""

from __future__ import annotations

import logging
import random
import threading
from typing import Any

from django.db import connections
from django.db.utils import Error

from modelqueue import verbs
from modelqueue.attempts import AsyncAttempt, AtomicAttempt
from modelqueue.engines import Claim
from modelqueue.exceptions import Interrupted
from modelqueue.leases import keeper_for
from modelqueue.worker.completer import Completer
from modelqueue.worker.database_clock import DatabaseClock
from modelqueue.worker.loop import Loop
from modelqueue.worker.running import Register, Running
from modelqueue.worker.slots import Lane, Slots, Turn
from modelqueue.worker.threads import Threads

__all__ = ["Claimer"]

logger = logging.getLogger("modelqueue")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


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
        self._is_stopped = threading.Event()
        self._outage = _Outage()
        self._clock: DatabaseClock | None = None

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
        self._is_stopped.set()
        self._slots.stop()

    def join(self, seconds: float) -> None:
        self._thread.join(max(0.0, seconds))

    def _work(self) -> None:
        try:
            while (turn := self._slots.next()) is not None:
                self._follow_the_clock(turn.lane)
                if turn.limit:
                    self._claim(turn)
                else:
                    self._recover(turn.lane)
        finally:
            connections.close_all()

    def _follow_the_clock(self, lane: Lane) -> None:
        try:
            if self._clock is None:
                self._clock = DatabaseClock(lane.queue.using)
            self._clock.follow()
        except Exception:  # which the claim will tell
            logger.debug("The clock of the database can not be read.", exc_info=True)

    def _claim(self, turn: Turn) -> None:
        lane, claims = turn.lane, list[Claim[Any]]()
        try:
            source = lane.queue.source()
            claims = verbs.claim(source, turn.limit)
            self._outage.ended(lane)
        except Error as away:
            self._wait(lane, away)
            self._slots.want([lane.queue.name])
        except Exception:
            logger.exception("%s: its tasks can not be claimed.", lane.queue.name)
            self._is_stopped.wait(1)
        self._slots.claimed(turn, len(claims))
        for claim in claims:
            running = self._register.add(lane, lane.queue.attempt(claim, source))
            try:
                self._begin(lane, running)
            except Exception as error:  # the system gives no more threads, for example
                logger.exception("%s can not be begun, and is given back.", running)
                self._completer.put(running, Interrupted(str(error)))
                self._is_stopped.wait(1)

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

    def _recover(self, lane: Lane) -> None:
        try:
            verbs.recover(lane.queue.source(), lane.queue.recovery())
        except Error as away:
            self._wait(lane, away)
        except Exception:
            logger.exception("%s: its abandoned tasks can not be recovered.", lane.queue.name)
            self._is_stopped.wait(1)

    def _wait(self, lane: Lane, away: Error) -> None:
        self._is_stopped.wait(self._outage.begun(lane, away))


class _Outage:
    """What is known of the database being away, so that it is told once and asked ever less often."""

    def __init__(self) -> None:
        self._pause: dict[str, float] = {}

    def begun(self, lane: Lane, error: Error) -> float:
        """Note that the database did not answer; return for how many seconds to wait."""
        name = lane.queue.name
        pause = self._pause.get(name)
        if pause is None:
            logger.warning("%s: the database does not answer, trying again: %s", name, error)
        pause = min(2 * pause, _LONGEST_PAUSE) if pause else _FIRST_PAUSE
        self._pause[name] = pause
        return random.uniform(pause / 2, pause)  # noqa: S311  (jitter)

    def ended(self, lane: Lane) -> None:
        """Note that it does answer."""
        name = lane.queue.name
        if self._pause.pop(name, None) is not None:
            logger.warning("%s: the database answers again.", name)
