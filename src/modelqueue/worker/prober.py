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
from typing import Any

from django.db import connections
from django.db.utils import Error

from modelqueue import clock
from modelqueue.engines import engine_for
from modelqueue.queues import Queue
from modelqueue.worker.database_clock import DatabaseClock

__all__ = ["Found", "Prober"]

logger = logging.getLogger("modelqueue")

#: Seconds between two looks while there was work lately, and how long "lately" is.
_SHORTEST, _LATELY = 0.1, 5.0
#: How much longer each next pause is after that.
_GROWTH = 1.2

#: Names of the queues that have due tasks, and of those that have abandoned ones; None: not known.
Found = Callable[["list[str] | None", "list[str]"], None]


class Prober:
    def __init__(self, queues: list[Queue[Any]], poll: float, found: Found) -> None:
        self._queues = queues
        self._poll = poll
        self._found = found
        self._again = threading.Event()
        self._is_stopped = False
        self._is_away = False
        self._active_until = time.monotonic() + _LATELY
        self._clock = DatabaseClock(queues[0].using)
        self._thread = threading.Thread(target=self._work, name="modelqueue-prober", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def look_again(self) -> None:
        """There was work a moment ago: look often."""
        self._active_until = time.monotonic() + _LATELY

    def stop(self) -> None:
        self._is_stopped = True
        self._again.set()

    def _work(self) -> None:
        pause = _SHORTEST
        try:
            while not self._is_stopped:
                due = self._look()
                if due:
                    self.look_again()
                is_active = time.monotonic() < self._active_until
                pause = min(_SHORTEST if is_active else pause * _GROWTH, max(self._poll, _SHORTEST))
                self._again.wait(random.uniform(0.95, 1.15) * pause)  # noqa: S311  (jitter)
        finally:
            connections.close_all()

    def _look(self) -> list[str]:
        try:
            self._clock.follow()
            due, expired = self.look()
        except Error as away:
            if not self._is_away:
                logger.warning("The database does not answer, trying again: %s", away)
            self._is_away = True
            self._found(None, [])
            return []
        if self._is_away:
            logger.warning("The database answers again.")
        self._is_away = False
        self._found(due, expired)
        return due

    def look(self) -> tuple[list[str], list[str]]:
        """Return the names of the queues that have due tasks, and of those that have abandoned ones."""
        due, expired = list[str](), list[str]()
        moment = clock.now()
        for using in {queue.using for queue in self._queues}:
            queues = [queue for queue in self._queues if queue.using == using]
            rows = [queue.source().due(moment) for queue in queues]
            with_cutoff = [(queue, queue.recovery().cutoff(moment)) for queue in queues]
            owners = [(queue, cutoff) for queue, cutoff in with_cutoff if cutoff is not None]
            rows += [queue.source().expired(cutoff) for queue, cutoff in owners]
            answers = iter(engine_for(using).probe(rows))
            due += [queue.name for queue in queues if next(answers)]
            expired += [queue.name for queue, _ in owners if next(answers)]
        return due, expired
