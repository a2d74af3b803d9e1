"""What the claimer of a worker's only process hears: new tasks, on the sessions by which it claims them.

Else the supervisor hears of them, see `modelqueue.worker.listener`, and wakes a claimer. Before that one has
its turn another process of ours and another session of the server have to wake up: 0.4 of the 1.4 ms from the
commit of a task to its action (`make peers`, two cores of an AMD EPYC, 27 November 2026). With several
processes all of them would wake up for each task, so there the supervisor chooses one.

It is a help and no more. A session that has come to an end is closed here; as somebody may have told of a
task meanwhile there is a claim at once, which opens the next one, however often it has to try.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from django.db import connections

from modelqueue.engines.notify import Hearing
from modelqueue.queues import Queue
from modelqueue.worker.listener import Tables
from modelqueue.worker.questions import Questions

__all__ = ["Ears"]

logger = logging.getLogger("modelqueue")

#: Seconds from one claim for what was heard to the next, or of a thousand tasks each would have its own; and
#: how many times as long as it has taken to ask which queues are meant.
_INTERVAL, _REST = 0.01, 3
#: Seconds from one word to the supervisor to the next, and until the first one, as the thread of the action
#: has to wait as long as the claimer is busy.
_TELL_INTERVAL, _TELL_PAUSE = 0.1, 0.01
#: Seconds until the next try to listen after one that has failed.
_PAUSE = 5.0


class Ears:
    """Of the claimer's thread, but for `listen_to`.

    Args:
        queues: of this process.
        tell: called now and then after something was heard, as a task may be due a moment later by our clock.
    """

    def __init__(self, queues: Iterable[Queue[Any]], tell: Callable[[], None] = lambda: None) -> None:
        self._queues = {queue.name: queue for queue in queues}
        self._tell = tell
        self._tables: dict[str, Tables] = {}
        self._hearings: dict[str, Hearing] = {}
        #: By database the names of queues that are to be passed on.
        self._told: dict[str, set[str]] = {}
        self._questions = Questions()
        self._not_before = 0.0
        #: From when on to try to listen again, by database.
        self._listen_from: dict[str, float] = {}
        #: When to tell; infinity: there is nothing to tell.
        self._tell_at, self._told_at = math.inf, 0.0

    def listen_to(self, tables: dict[str, Tables]) -> None:
        """Listen to these databases; called by any thread.

        Args:
            tables: by database the queues on each table that tells, as notifications call it.
        """
        self._tables = tables

    @property
    def files(self) -> list[Hearing]:
        """Return what is ready to be read when something is told."""
        return list(self._hearings.values())

    @property
    def pause(self) -> float:
        """Return in how many seconds `heard` is to be called whatever is told; infinity: not at all."""
        moment = min(self._tell_at, self._not_before if self._told else math.inf)
        return max(0.0, moment - time.monotonic())

    def heard(self) -> list[str]:
        """Return of which queues tasks are perhaps due, as was told; sometimes a little later."""
        self._perhaps_tell()
        for using in self._tables:
            self._listen(using)
        began = time.monotonic()
        if not self._told or began < self._not_before:
            return []
        told, self._told = self._told, {}
        names = [name for using, some in told.items() for name in self._perhaps_due(using, some)]
        now = time.monotonic()
        self._not_before = max(began + _INTERVAL, now + _REST * (now - began))
        self._tell_at = min(self._tell_at, max(now + _TELL_PAUSE, self._told_at + _TELL_INTERVAL))
        return names

    def _perhaps_tell(self) -> None:
        if (now := time.monotonic()) >= self._tell_at:
            self._tell_at, self._told_at = math.inf, now
            self._tell()

    def _listen(self, using: str) -> None:
        """Read what was told by a database; listen where that is not done yet, or not any more."""
        hearing = self._hearings.get(using)
        if hearing is not None and not hearing.has_ended:
            try:
                for table in hearing.read():
                    self._note(using, self._tables[using].get(table, []))
                return
            except Exception as error:
                logger.debug("The session that listens to %r has ended: %s", using, error)
                with suppress(Exception):  # of one that is dead
                    connections[using].close()
        if hearing is not None:
            del self._hearings[using]
            self._note_all(using)
        self._begin_to_listen(using)

    def _begin_to_listen(self, using: str) -> None:
        connection = connections[using]
        # Whoever opens a connection waits where nobody answers: that is left to the claim.
        if connection.connection is None or time.monotonic() < self._listen_from.get(using, 0.0):
            return
        try:
            self._hearings[using] = Hearing(connection)
        except Exception as error:  # the claim tells whether the database is away
            logger.debug("The claimer can not listen to %r: %s", using, error)
            self._listen_from[using] = time.monotonic() + _PAUSE
        else:
            self._note_all(using)  # nobody has heard what was told before

    def _note_all(self, using: str) -> None:
        for names in self._tables[using].values():
            self._note(using, names)

    def _note(self, using: str, names: Iterable[str]) -> None:
        if known := self._queues.keys() & names:
            self._told.setdefault(using, set()).update(known)

    def _perhaps_due(self, using: str, names: set[str]) -> Iterable[str]:
        """Return those that have due tasks; a single one, as its claim asks, too."""
        if len(names) < 2 or connections[using].connection is None:
            return names
        try:
            return self._questions.perhaps_due(using, [self._queues[name] for name in names])
        except Exception as error:  # which the claim will tell
            logger.debug("Nobody knows whether something is due in %s: %s", ", ".join(names), error)
            return names
