"""The listener: hears of new tasks where a trigger tells of them, see `modelqueue.operations`.

It is a help and no more: the prober looks for work whatever becomes of it. So nothing that goes wrong here
stops the worker, it is told once and tried again.

One thread for each database, lest one that does not answer costs another. It has a connection as long as
there is a trigger on the table of a queue.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from django.db import connections

from modelqueue.engines import engine_for
from modelqueue.engines.notify import Ear, may_listen
from modelqueue.queues import Queue
from modelqueue.source import owner_of

__all__ = ["Listener", "Tables"]

logger = logging.getLogger("modelqueue")

#: Seconds between two looks for triggers.
_INTERVAL = 60.0
#: Seconds until the next try after a failure: the first time, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0
#: Seconds within which a test has to be heard, and until the next try where it is not.
_PATIENCE, _DEAF = 5.0, 600.0
#: Seconds after which the thread sees that it is to stop. Nobody waits for it.
_TICK = 0.5

#: The names of the queues on each table.
Tables = dict[str, list[str]]
Heard = Callable[["list[str]"], None]
HandOver = Callable[[str, Tables], None]


class Listener:
    """Calls `heard`, in threads of its own, with the names of queues of which one has a new task.

    Args:
        hand_over: called instead, now and then, with a database and the tables there that tell of new tasks:
            somebody else listens to it.
    """

    def __init__(self, queues: list[Queue[Any]], heard: Heard, hand_over: HandOver | None = None) -> None:
        self._queues = queues
        self._heard = heard
        self._hand_over = hand_over
        self._is_stopped = threading.Event()
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        for using, tables in self._tables().items():
            hand_over = self._hand_over if may_listen(connections[using]) else None
            one = _Listening(using, tables, self._heard, self._is_stopped, hand_over)
            thread = threading.Thread(target=one.work, name="modelqueue-listener", daemon=True)
            thread.start()
            self.threads.append(thread)

    def stop(self) -> None:
        """Hear nothing more; nobody waits for that."""
        self._is_stopped.set()

    @property
    def has_ended(self) -> bool:
        """Say that it goes on, whatever is the case: the worker does without it."""
        return False

    def _tables(self) -> dict[str, Tables]:
        """Return the tables on each database that can tell of new tasks, and the queues on each of them."""
        tables: dict[str, Tables] = {}
        for queue in self._queues:
            try:
                using = queue.using
            except Exception as error:  # of the callable that makes its queryset, which the prober tells
                logger.debug("%s: it is not known where to listen.", queue.name, exc_info=error)
                continue
            if engine_for(using).can_notify:
                table = owner_of(queue.field)._meta.db_table
                tables.setdefault(using, {}).setdefault(table, []).append(queue.name)
        return tables


class _Listening:
    """That to one database."""

    def __init__(
        self,
        using: str,
        tables: Tables,
        heard: Heard,
        is_stopped: threading.Event,
        hand_over: HandOver | None = None,
    ) -> None:
        self._using = using
        self._tables = tables
        self._heard = heard
        self._is_stopped = is_stopped
        self._hand_over = hand_over
        self._is_handed_over = False
        #: Is there a trigger, as far as is known? Without one nobody has to hear of failures.
        self._is_wanted = False
        self._is_failing = False
        self._pause = _FIRST_PAUSE

    def work(self) -> None:
        while not self._is_stopped.is_set():
            try:
                pause = self._listen()
            except Exception as error:
                pause = self._failed(error)
            self._is_stopped.wait(pause)

    def _listen(self) -> float:
        """Listen as long as there is a trigger; return for how many seconds to leave it alone after that."""
        ear = Ear(self._using)
        try:
            if not (queues := self._find_triggers(ear)):
                return _INTERVAL
            if not self._is_handed_over:
                ear.listen()
                if not ear.hears(_PATIENCE):
                    return self._is_deaf()
            self._succeeded()
            if self._hand_over is not None:
                self._hand_over(self._using, queues)
                self._is_handed_over = True
                return _INTERVAL
            for names in queues.values():  # nobody has heard what was told before
                self._heard(names)
            while queues and not self._is_stopped.is_set():
                self._pass_on(ear, queues)
                queues = self._find_triggers(ear)
            return _INTERVAL
        finally:
            ear.close()

    def _find_triggers(self, ear: Ear) -> Tables:
        """Return the queues on each table with a trigger, as notifications call it."""
        named = ear.tables_with_trigger(self._tables).items()
        found = {name: [queue for table in tables for queue in self._tables[table]] for name, tables in named}
        self._is_wanted = bool(found)
        return found

    def _pass_on(self, ear: Ear, queues: Tables) -> None:
        """Pass on what is told of these tables, until it is time to look for triggers again."""
        until = time.monotonic() + _INTERVAL
        while not self._is_stopped.is_set() and time.monotonic() < until:
            for table in ear.wait(_TICK) & queues.keys():
                self._heard(queues[table])

    def _succeeded(self) -> None:
        if self._is_failing:
            logger.warning("New tasks are heard of again from the database %r.", self._using)
        self._is_failing = False
        self._pause = _FIRST_PAUSE

    def _failed(self, error: Exception) -> float:
        self._tell("The worker can not listen to the database %r, trying again: %s", self._using, error)
        pause = self._pause
        self._pause = min(2 * pause, _LONGEST_PAUSE)
        return random.uniform(pause / 2, pause)  # noqa: S311  (jitter)

    def _is_deaf(self) -> float:
        self._tell(
            "The worker hears nothing from the database %r: perhaps there is a pooler in between that gives "
            "a session to several clients. It looks for new tasks, as without a trigger.",
            self._using,
        )
        return _DEAF

    def _tell(self, text: str, *facts: object) -> None:
        concerns = self._is_wanted and not self._is_handed_over
        logger.log(logging.WARNING if concerns and not self._is_failing else logging.DEBUG, text, *facts)
        self._is_failing = self._is_failing or concerns
