"""What the claimer of a worker's only process hears: new tasks, on the sessions by which it claims them.

Else the supervisor hears of them, see `modelqueue.worker.listener`, and wakes a claimer. Before that one has
its turn another process of ours and another session of the server have to wake up: 0.4 of the 1.4 ms from the
commit of a task to its action (`make bench`, two cores of an AMD EPYC, 27 November 2026). With several
processes all of them would wake up for each task, so there the supervisor chooses one.

It is a help and no more. A session that has come to an end is closed here; as somebody may have told of a
task meanwhile there is a claim at once, which opens the next one, however often it has to try.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from django.db import connections

from modelqueue.engines import engine_for
from modelqueue.engines.notify import Hearing
from modelqueue.queues import Queue
from modelqueue.worker.listener import Tables
from modelqueue.worker.questions import Questions

__all__ = ["Ears"]

logger = logging.getLogger("modelqueue")

#: Seconds from one claim for what was heard to the next, or of a thousand tasks each would have its own; and
#: how many times as long as it has taken to ask which queues are meant.
_INTERVAL, _REST = 0.01, 3
#: Seconds from one time that it begins to listen to a database to the next, as something may close the
#: session after each claim; and to the next question after one that took longer than so many seconds, as
#: ended tasks that an old transaction still sees were in its way. Claims begin at their bounds.
_PAUSE, _DEAR = 1.0, 0.01


class Ears:
    """Of the claimer's thread, but for `listen_to` and `has_heard`.

    Args:
        queues: of this process.
    """

    def __init__(self, queues: Iterable[Queue[Any]]) -> None:
        self._queues = {queue.name: queue for queue in queues}
        self._tables: dict[str, Tables] = {}
        self._hearings: dict[str, Hearing] = {}
        #: By database, from when on to try to listen.
        self._listen_from: dict[str, float] = {}
        #: By database the names of queues that are to be passed on, and before when they are not.
        self._told: dict[str, set[str]] = {}
        self._not_before = 0.0
        self._questions = Questions()
        #: From when on to ask again which queues are meant.
        self._ask_from = 0.0
        self._has_heard = False

    def listen_to(self, tables: dict[str, Tables]) -> None:
        """Listen to these databases; called by any thread.

        Args:
            tables: by database the queues on each table that tells, as notifications call it; those of last
                time, and perhaps more.
        """
        self._tables = tables

    def has_heard(self) -> bool:
        """Say whether something was heard since this was asked last; called by any thread.

        Then a task may be due a moment later by our clock, which a claim has not found.
        """
        has_heard, self._has_heard = self._has_heard, False
        return has_heard

    @property
    def files(self) -> list[Hearing]:
        """Return what is ready to be read when something is told, unless nothing is to be passed on yet."""
        return [] if self._told else list(self._hearings.values())

    @property
    def pause(self) -> float:
        """Return in how many seconds `heard` is to be called whatever is told; infinity: not at all."""
        moments = [self._listen_from[using] for using in self._listen_from.keys() - self._hearings.keys()]
        if self._told:
            moments.append(self._not_before)
        return max(0.0, min(moments) - time.monotonic()) if moments else math.inf

    def heard(self) -> list[str]:
        """Return of which queues tasks are perhaps due, as was told; sometimes a little later."""
        self._read()
        began = time.monotonic()
        if not self._told or began < self._not_before:
            return []
        told, self._told = self._told, {}
        names = [name for using, some in told.items() for name in self._perhaps_due(using, some)]
        now = time.monotonic()
        self._not_before = max(began + _INTERVAL, now + _REST * (now - began))
        self._has_heard = True
        return names

    def _read(self) -> None:
        """Read what was told; listen where that is not done yet, or not any more."""
        for using, tables in self._tables.items():
            self._read_from(using, tables)

    def _read_from(self, using: str, tables: Tables) -> None:
        hearing = self._hearings.get(using)
        if hearing is not None and not hearing.has_ended:
            try:
                told = hearing.read()
            except Exception as error:
                logger.debug("The session that listens to %r has ended: %s", using, error)
                _close(using)
            else:
                for table in told & tables.keys():
                    self._note(using, tables[table])
                return
        if hearing is not None:
            del self._hearings[using]
            self._note_all(using, tables)
        self._begin_to_listen(using, tables)

    def _begin_to_listen(self, using: str, tables: Tables) -> None:
        connection = connections[using]
        if connection.connection is None:
            # Whoever opens one waits where nobody answers: that is left to the claim, however long it takes.
            self._listen_from.pop(using, None)
            return
        if time.monotonic() < self._listen_from.get(using, 0.0):
            return
        self._listen_from[using] = time.monotonic() + _PAUSE
        try:
            self._hearings[using] = Hearing(connection)
        except Exception as error:  # the claim tells whether the database is away
            logger.debug("The claimer can not listen to %r: %s", using, error)
        else:
            self._note_all(using, tables)  # nobody has heard what was told before

    def _note_all(self, using: str, tables: Tables) -> None:
        for names in tables.values():
            self._note(using, names)

    def _note(self, using: str, names: Iterable[str]) -> None:
        if known := self._queues.keys() & names:
            self._told.setdefault(using, set()).update(known)

    def _perhaps_due(self, using: str, names: set[str]) -> Iterable[str]:
        """Return those that have due tasks; a single one, as its claim asks, too."""
        began = time.monotonic()
        if len(names) < 2 or began < self._ask_from or connections[using].connection is None:
            return names
        try:
            # From the first row on: what is below a bound would not be found, and nobody would ask again.
            queues = [self._queues[name] for name in names]
            due = self._questions.perhaps_due(using, queues, is_whole=True)
        except Exception as error:  # which the claim will tell
            logger.debug("Nobody knows whether something is due in %s: %s", ", ".join(names), error)
            if not engine_for(using).is_connected():
                _close(using)
            return names
        if time.monotonic() - began > _DEAR:
            self._ask_from = time.monotonic() + _PAUSE
        self._read()  # what was told meanwhile has come with the answer
        return due


def _close(using: str) -> None:
    with suppress(Exception):  # of one that is dead
        connections[using].close()
