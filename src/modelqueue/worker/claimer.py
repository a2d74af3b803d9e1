"""The claimer: the one thread of a process that takes tasks, of its queues in turns.

It survives any outage of the database: it waits with backoff, says so once, and goes on by itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, cast

from django.db import connections

from modelqueue import verbs
from modelqueue.attempts import AsyncAttempt
from modelqueue.engines import Claim, Engine, engine_for
from modelqueue.exceptions import Interrupted
from modelqueue.leases import OnLoss, OnRenewal, keeper_for
from modelqueue.source import Source
from modelqueue.worker.completer import Completer
from modelqueue.worker.database_clock import DatabaseClock
from modelqueue.worker.loop import Loop
from modelqueue.worker.running import Register, Running
from modelqueue.worker.slots import Lane, Slots, Turn
from modelqueue.worker.threads import Threads
from modelqueue.worker.troubles import Troubles

__all__ = ["Claimer", "take"]

logger = logging.getLogger("modelqueue")

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
        self._troubles = Troubles("claimed")
        self._clock: DatabaseClock | None = None
        self._engines: dict[str, Engine] = {}
        #: Databases with a connection for renewals.
        self._kept: set[str] = set()

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
                    self._claim(turn)
        finally:
            connections.close_all()

    def _follow_the_clock(self, turn: Turn | None) -> None:
        """Do so also while all slots are taken: leases are renewed meanwhile, by the same clock."""
        if self._clock is None and turn is not None:
            with suppress(Exception):  # of what gives the queryset, which the claim will tell
                self._clock = DatabaseClock(turn.lane.queue.using)
        if self._clock is not None:
            self._clock.follow()

    def _claim(self, turn: Turn) -> None:
        lane = turn.lane
        with self._register.claim():
            try:
                source = lane.source()
                self._keep(source.using)
                began = time.monotonic()
                engine = self._engine_for(source.using)
                claims = take(lane, source, turn.limit, engine)
            except Exception as error:
                self._slots.failed(turn, self._troubles.begun(lane.queue, error))
                return
            self._troubles.ended(lane.queue)
            self._completer.reserve(source.using)  # not before: where nobody answers it would wait, too
            self._slots.claimed(turn, len(claims), time.monotonic() - began)
            attempts = [lane.queue.attempt(claim, source, engine) for claim in claims]
            for attempt in attempts:
                attempt.waits = False  # others wait for who completes them
            added = self._register.add(lane, attempts)
        if added:
            self._or_give_back(added, partial(self._begin, lane))

    def _keep(self, using: str) -> None:
        if using not in self._kept:
            keeper_for(using).reserve()
            self._kept.add(using)

    def _engine_for(self, using: str) -> Engine:
        if using not in self._engines:
            self._engines[using] = engine_for(using)
        self._engines[using].forget()
        return self._engines[using]

    def _or_give_back(self, some: list[Running], begin: Callable[[list[Running]], None]) -> None:
        try:
            begin(some)
        except Exception as error:  # the system gives no more threads, for example
            for running in some:
                logger.exception("%s can not be begun, and is given back.", running)
                self._completer.put(running, Interrupted(str(error)))
                running.lane.not_before = time.monotonic() + 1.0

    def _begin(self, lane: Lane, added: list[Running]) -> None:
        """Keep the leases of what one claim has taken, and start it."""
        source, seconds = added[0].attempt.source, lane.queue.lease.total_seconds()
        kept = [(running.attempt, self._on_loss(running), self._on_renewal(running)) for running in added]
        for running, lease in zip(
            added, keeper_for(source.using).hold_all(source, kept, seconds), strict=True
        ):
            running.attempt.renewal = lease
        again = [running for running in added if running.attempt.claim.lease.attempts > 0]
        for running in again:
            # It may be what killed its process. Then what has ended here before is not to be charged, too.
            self._completer.call_after_the_others(partial(self._or_give_back, [running], self._start))
        fresh = [running for running in added if running not in again] if again else added
        if lane.queue.retry_field is not None and not lane.is_async:
            fresh = self._without_once_ahead(lane, fresh)
        if fresh:
            self._or_give_back(fresh, self._start)

    def _without_once_ahead(self, lane: Lane, some: list[Running]) -> list[Running]:
        """Give back those that are never retried and would wait for a thread: return the others.

        The death of a machine charges what it has claimed, and one attempt is all that they have.
        """
        once = [running for running in some[self._threads.idle :] if running.attempt.policy.retry == 0]
        for running in once:
            running.take()
            self._completer.put(running, Interrupted("It has one attempt alone, and no thread was free."))
        if once:
            lane.note_once()
        return [running for running in some if running not in once] if once else some

    def _on_loss(self, running: Running) -> OnLoss | None:
        return partial(self._loop.cancel, running) if running.lane.is_async else None

    def _on_renewal(self, running: Running) -> OnRenewal:
        return partial(self._register.renew, running)

    def _start(self, some: list[Running]) -> None:
        if not some[0].lane.is_async:
            self._threads.submit(some)
            return
        for running in some:
            self._or_give_back([running], self._start_async)

    def _start_async(self, some: list[Running]) -> None:
        (running,) = some
        self._register.begin(running)  # as the receivers of a signal are called next
        error = cast("AsyncAttempt[Any]", running.attempt).start().error
        if error is None:
            self._loop.submit(running)
        else:
            self._completer.put(running, error)


def take(lane: Lane, source: Source[Any], limit: int, engine: Engine | None = None) -> list[Claim[Any]]:
    """Claim up to `limit` tasks, from the bounds on unless it is time to look at all of the queue."""
    began = time.monotonic()
    ranges = [] if lane.sweeps.is_due(began, lane.was_idle) else lane.bounds.ranges()
    parts = [source.between(*ends) for ends in ranges] or [source]
    claims: list[Claim[Any]] = []
    try:
        for part in parts:
            claims += verbs.claim(part, limit - len(claims), engine)
            if len(claims) == limit:
                break
    except Exception as error:
        if not claims:
            raise
        # What is claimed already is committed, and nobody else would run it.
        logger.warning("%s: fewer are claimed: %s", lane.queue.name, error)
    lane.bounds.note(claim.row.status for claim in claims)
    lane.was_idle = len(claims) < limit
    now = time.monotonic()
    lane.sweeps.note(not ranges, now, now - began, len(claims))
    return claims
