"""The prober: looks for due and abandoned tasks of all queues, in one statement for each database.

One thread for the whole worker, so that an idle one costs ten cheap statements a second at most, however many
queues and processes it has, and one when it was idle for long.
"""

from __future__ import annotations

import datetime as dt
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from django.db import connections
from django.db.utils import Error, InterfaceError, OperationalError

from modelqueue import clock
from modelqueue.engines import engine_for
from modelqueue.fields import declared_on
from modelqueue.queues import Queue
from modelqueue.worker.database_clock import INTERVAL, DatabaseClock, harmless

__all__ = ["Found", "Outage", "Prober"]

logger = logging.getLogger("modelqueue")

#: Seconds from one look to the next while there was work lately, and how long "lately" is.
_SHORTEST, _LATELY = 0.1, 5.0
#: How much longer each next pause is after that.
_GROWTH = 1.2
#: How long it may take to put a question: what becomes due meanwhile is to be found, too.
_TO_ASK = dt.timedelta(milliseconds=10)
#: Seconds for which a queue is left out whose tasks can not be looked for.
_LEFT_OUT = 5.0

#: Names of the queues that have due tasks, and of those that have abandoned ones; None: not known.
Found = Callable[["list[str] | None", "list[str]"], None]


class Prober:
    def __init__(self, queues: list[Queue[Any]], poll: float, found: Found) -> None:
        self._queues = queues
        self._poll = poll
        self._found = found
        self._is_stopped = threading.Event()
        self._outages: dict[str, Outage] = {}
        #: Queues that can not be looked at, and when to try again.
        self._left_out: dict[str, float] = {}
        #: Until when no lease of a queue is to count as expired, as somebody stood still, or was cut off.
        self._held_back: dict[str, float] = {}
        #: Of which something has expired that is held back.
        self.holds_back: list[str] = []
        self._expired: list[str] = []
        self._last_look: tuple[float, float] | None = None
        self._active_until = time.monotonic() + _LATELY
        #: That of the first database: a process has one clock.
        self._clock: DatabaseClock | None = None
        self._thread = threading.Thread(target=self._work, name="modelqueue-prober", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def look_again(self) -> None:
        """There was work a moment ago: look often."""
        self._active_until = time.monotonic() + _LATELY

    def stop(self) -> None:
        self._is_stopped.set()

    def _work(self) -> None:
        pause = waited = _SHORTEST
        try:
            while not self._is_stopped.is_set():
                began = time.monotonic()
                self._look(waited)
                is_active = time.monotonic() < self._active_until
                pause = min(_SHORTEST if is_active else pause * _GROWTH, max(self._poll, _SHORTEST))
                # From one beginning to the next, but never without a rest, however long a look takes.
                jittered = random.uniform(0.95, 1.05) * pause  # noqa: S311
                waited = max(jittered - (time.monotonic() - began), pause / 2)
                self._is_stopped.wait(waited)
        finally:
            connections.close_all()

    def _look(self, waited: float = 0.0) -> None:
        """Look at each database, and pass on what was found.

        Args:
            waited: how many seconds the last look is to be ago.
        """
        due, expired, is_known = list[str](), list[str](), True
        for using, queues in self._by_database().items():
            outage = self._outages.setdefault(using, Outage(using))
            try:
                self._follow_the_clock(using)
                found = self._look_at(using, queues)
            except Exception as away:
                outage.begun(away)
                is_known = False
                continue
            if outage.ended():
                # Longer than the lease, and all have expired, those of the living, too.
                self._hold_back(queues)
            due += found[0]
            expired += found[1]
        stood_still = self._stood_still(waited)
        self._hold_back(queue for queue in self._queues if stood_still > harmless(queue))
        self.holds_back = [name for name in expired if time.monotonic() < self._held_back.get(name, 0.0)]
        expired = [name for name in expired if name not in self.holds_back]
        has_more_expired = not set(expired) <= set(self._expired)  # which is looked at twice, see `Suspects`
        if due or has_more_expired:
            self.look_again()
        self._expired = expired
        self._found(due if is_known or due else None, expired)

    def _follow_the_clock(self, using: str) -> None:
        if self._clock is None:
            self._clock = DatabaseClock(using)
        if using == self._clock.using:
            jump = abs(self._clock.follow())
            # Others may not have seen yet that the clock of the database was set, or that it is another one.
            self._hold_back((queue for queue in self._queues if jump > harmless(queue)), INTERVAL)

    def _hold_back(self, queues: Iterable[Queue[Any]], more: float = 0.0) -> None:
        """Recover nothing of these queues until everybody has had time to renew, and so many seconds more."""
        for queue in queues:
            lease = max(one.lease for one in [queue, *declared_on(queue.field)])  # the one that counts
            until = time.monotonic() + lease.total_seconds() + more
            self._held_back[queue.name] = max(until, self._held_back.get(queue.name, 0.0))

    def _stood_still(self, waited: float) -> float:
        """Return by how many seconds this look has ended too late.

        The machine was suspended, the processes were, the database has let us wait, or a clock was set. The
        same may have befallen those who renew the leases.
        """
        last, self._last_look = self._last_look, (time.time(), time.monotonic())
        if last is None:
            return 0.0
        seconds = max(abs(now - then) for now, then in zip(self._last_look, last, strict=True))
        return seconds - waited

    def look(self) -> tuple[list[str], list[str]]:
        """Return the names of the queues that have due tasks, and of those that have abandoned ones.

        Raises:
            django.db.Error: a database does not answer.
        """
        due, expired = list[str](), list[str]()
        for using, queues in self._by_database().items():
            found = self._look_at(using, queues)
            due += found[0]
            expired += found[1]
        return due, expired

    def _by_database(self) -> dict[str, list[Queue[Any]]]:
        by_database: dict[str, list[Queue[Any]]] = {}
        for queue in self._queues:
            if time.monotonic() < self._left_out.get(queue.name, 0.0):
                continue
            try:
                by_database.setdefault(queue.using, []).append(queue)
            except Exception as error:  # of the callable that makes its queryset
                self._leave_out(queue, error)
        return by_database

    def _leave_out(self, queue: Queue[Any], error: Exception) -> None:
        if queue.name not in self._left_out:
            logger.error(
                "%s: its tasks can not be looked for; other queues go on. Are all migrations applied?",
                queue.name,
                exc_info=error,
            )
        self._left_out[queue.name] = time.monotonic() + _LEFT_OUT

    @property
    def left_out(self) -> list[str]:
        """The names of queues whose tasks can not be looked for."""
        return list(self._left_out)

    def _look_at(self, using: str, queues: list[Queue[Any]]) -> tuple[list[str], list[str]]:
        try:
            return self._probe(using, queues)
        except Exception as error:
            if isinstance(error, Error) and self._meets_everybody(using, error):
                with suppress(Exception):  # so that the next look opens another connection
                    connections[using].close()
                raise
            # Of a single queue: its table is missing, perhaps.
            if len(queues) == 1:
                self._leave_out(queues[0], error)
                return [], []
            found = [self._look_at(using, [queue]) for queue in queues]
            return [name for due, _ in found for name in due], [name for _, old in found for name in old]

    def _meets_everybody(self, using: str, error: Error) -> bool:
        """Say whether an error is not of one queue's statement: the database is away, or locked."""
        if not isinstance(error, (InterfaceError, OperationalError)):
            return False
        engine = engine_for(using)
        return engine.is_try_again(error) or not engine.is_connected()

    def _probe(self, using: str, queues: list[Queue[Any]]) -> tuple[list[str], list[str]]:
        moment = clock.now()
        questions: list[tuple[str, bool, Any]] = []
        for queue in queues:
            source, cutoff = queue.source(), queue.recovery().cutoff(moment)
            questions.append((queue.name, False, source.due(moment + _TO_ASK)))
            if cutoff is not None:
                questions.append((queue.name, True, source.expired(cutoff)))
        answers = engine_for(using).probe([rows for _, _, rows in questions])
        for queue in queues:
            self._left_out.pop(queue.name, None)
        found = [one for one, answer in zip(questions, answers, strict=True) if answer]
        due = [name for name, is_expired, _ in found if not is_expired]
        return due, [name for name, is_expired, _ in found if is_expired]


class Outage:
    """What is known of a database being away, so that it is told once."""

    def __init__(self, using: str) -> None:
        self._using = using
        self._is_away = False

    def begun(self, error: Exception) -> None:
        if not self._is_away:
            logger.warning("The database %r does not answer, trying again: %s", self._using, error)
        self._is_away = True

    def ended(self) -> bool:
        """Note that it answers; return whether it did not the last time."""
        was_away, self._is_away = self._is_away, False
        if was_away:
            logger.warning("The database %r answers again.", self._using)
        return was_away
