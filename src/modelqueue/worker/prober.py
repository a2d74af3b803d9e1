"""The prober: looks for due and abandoned tasks of all queues, in one statement for each database.

One thread for the whole worker, so that an idle one costs ten cheap statements a second at most, however many
queues and processes it has, and one when it was idle for long.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from django.db import connections
from django.db.utils import Error, InterfaceError, OperationalError

from modelqueue import clock
from modelqueue.engines import engine_for
from modelqueue.queues import Queue
from modelqueue.worker.database_clock import DatabaseClock

__all__ = ["Found", "Outage", "Prober"]

logger = logging.getLogger("modelqueue")

#: Seconds from one look to the next while there was work lately, and how long "lately" is.
_SHORTEST, _LATELY = 0.1, 5.0
#: How much longer each next pause is after that.
_GROWTH = 1.2
#: Seconds for which a queue is left out whose tasks can not be looked for.
_LEFT_OUT = 5.0

#: Names of the queues that have due tasks, and of those that have abandoned ones; None: not known.
Found = Callable[["list[str] | None", "list[str]"], None]


class Prober:
    def __init__(self, queues: list[Queue[Any]], poll: float, found: Found) -> None:
        self._queues = queues
        self._poll = poll
        self._found = found
        self._again = threading.Event()
        self._is_stopped = False
        self._outages: dict[str, Outage] = {}
        #: Queues that can not be looked at, and when to try again.
        self._left_out: dict[str, float] = {}
        #: Until when no lease is to count as expired, as this worker stood still, or was cut off.
        self._recover_from = 0.0
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
        self._is_stopped = True
        self._again.set()

    def _work(self) -> None:
        pause = waited = _SHORTEST
        try:
            while not self._is_stopped:
                began = time.monotonic()
                due = self._look(waited)
                if due:
                    self.look_again()
                is_active = time.monotonic() < self._active_until
                pause = min(_SHORTEST if is_active else pause * _GROWTH, max(self._poll, _SHORTEST))
                # From one beginning to the next, but never without a rest, however long a look takes.
                jittered = random.uniform(0.95, 1.05) * pause  # noqa: S311
                waited = max(jittered - (time.monotonic() - began), pause / 2)
                self._again.wait(waited)
        finally:
            connections.close_all()

    def _look(self, waited: float = 0.0) -> list[str]:
        """Look at each database, and pass on what was found; return the names of queues with due tasks.

        Args:
            waited: how many seconds the last look is to be ago.
        """
        due, expired, is_known = list[str](), list[str](), True
        for using, queues in self._by_database().items():
            outage = self._outages.setdefault(using, Outage(using))
            try:
                if self._clock is None:
                    self._clock = DatabaseClock(using)
                if using == self._clock.using:
                    self._clock.follow()
                found = self._look_at(using, queues)
            except Exception as away:
                outage.begun(away)
                is_known = False
                continue
            outage.ended(_longest_lease(queues))
            due += found[0]
            if not outage.is_too_fresh_to_recover:
                expired += found[1]
        if self._stood_still(waited):
            self._recover_from = time.monotonic() + _longest_lease(self._queues)
        self._found(
            due if is_known or due else None, expired if time.monotonic() >= self._recover_from else []
        )
        return due

    def _stood_still(self, waited: float) -> bool:
        """Say whether this look has ended so late that leases of our own may have expired meanwhile.

        The machine was suspended, the processes were, the database has let us wait, or a clock was set. Those
        who renew the leases wake up in this moment, too.
        """
        last, self._last_look = self._last_look, (time.time(), time.monotonic())
        if last is None:
            return False
        seconds = max(abs(now - then) for now, then in zip(self._last_look, last, strict=True))
        return seconds - waited > min(queue.lease for queue in self._queues).total_seconds() / 3

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
            questions.append((queue.name, False, source.due(moment)))
            if cutoff is not None:
                questions.append((queue.name, True, source.expired(cutoff)))
        answers = engine_for(using).probe([rows for _, _, rows in questions])
        for queue in queues:
            self._left_out.pop(queue.name, None)
        found = [one for one, answer in zip(questions, answers, strict=True) if answer]
        due = [name for name, is_expired, _ in found if not is_expired]
        return due, [name for name, is_expired, _ in found if is_expired]


class Outage:
    """What is known of a database being away, so that it is told once, and no living worker is robbed.

    After an outage that was longer than the lease all leases have expired, those of the living too: who was
    cut off has nothing recovered until everybody has had the time to renew.
    """

    def __init__(self, using: str) -> None:
        self._using = using
        self._is_away = False
        self._recover_from = 0.0

    def begun(self, error: Exception) -> None:
        if not self._is_away:
            logger.warning("The database %r does not answer, trying again: %s", self._using, error)
        self._is_away = True

    def ended(self, lease: float) -> None:
        if self._is_away:
            logger.warning("The database %r answers again.", self._using)
            self._recover_from = time.monotonic() + lease
        self._is_away = False

    @property
    def is_too_fresh_to_recover(self) -> bool:
        return time.monotonic() < self._recover_from


def _longest_lease(queues: list[Queue[Any]]) -> float:
    return max(queue.lease for queue in queues).total_seconds()
