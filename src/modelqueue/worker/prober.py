"""The prober: looks for due and abandoned tasks of all queues, in one statement for each database.

One thread for the whole worker, so that it costs ten cheap statements a second at most, however many queues
and processes it has, twenty while it finds work, and one when it was idle for long.
"""

from __future__ import annotations

import datetime as dt
import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NamedTuple

from django.db import connections
from django.db.utils import Error, InterfaceError, OperationalError

from modelqueue import clock
from modelqueue.engines import engine_for, full_since
from modelqueue.queues import Queue
from modelqueue.source import Source
from modelqueue.worker.database_clock import INTERVAL, DatabaseClock
from modelqueue.worker.questions import Asked, Questions, soon

__all__ = ["Found", "Hinted", "Outage", "Prober", "Seen"]

logger = logging.getLogger("modelqueue")

#: Seconds from one look to the next while there was work lately, and how long "lately" is.
_SHORTEST, _LATELY = 0.1, 5.0
#: Seconds to the next after one that has found something due.
_SHORTEST_BUSY = 0.05
#: How much longer each next pause is after that.
_GROWTH = 1.2
#: Seconds between two questions that others want, and how many times as long as the last one has taken.
_SHORTEST_WANTED, _REST = 0.01, 3
#: Seconds of a pause after which to see whether the machine stood still in it.
_SLICE = 1.0
#: The longest pause while something has expired, for who recovers it, see `modelqueue.worker.recovery`.
_LONGEST_WITH_EXPIRED = 1.0
#: Seconds between two looks for tasks on their last attempt, while others are due.
_FOR_LAST_ATTEMPTS = 1.0
#: Seconds for which a queue is left out whose tasks can not be looked for.
_LEFT_OUT = 5.0

#: Seconds that something may take longer than usual, however short a lease is.
_LONGEST_HICCUP = 2.0


class Seen(NamedTuple):
    """The names of queues that have tasks of these kinds."""

    due: list[str]
    #: Due for the last attempt, which is to run alone.
    alone: list[str]
    #: Abandoned, each with the first status that is.
    expired: dict[str, int]

    @classmethod
    def nothing(cls) -> Seen:
        return cls([], [], {})

    def add(self, other: Seen) -> None:
        self.due.extend(other.due)
        self.alone.extend(other.alone)
        self.expired.update(other.expired)


#: Gets what was seen; None: not known.
Found = Callable[["Seen | None"], None]
#: Names of queues that perhaps have due tasks.
Hinted = Callable[["list[str]"], None]


class Prober:
    """Looks from `start` to `stop`.

    Args:
        poll: seconds between two looks after a long idle time.
        found: called after each look.
        hinted: called between two looks for queues of which somebody has told, see `ask`.
        is_certain: whether "nothing is due" has to be sure at each look, as the worker then ends.
    """

    def __init__(
        self,
        queues: list[Queue[Any]],
        poll: float,
        found: Found,
        hinted: Hinted = lambda names: None,
        is_certain: bool = False,
    ) -> None:
        self._queues = queues
        self._is_certain = is_certain
        self._poll = poll
        self._found = found
        self._hinted = hinted
        self._is_stopped = threading.Event()
        #: Is there something in `_wanted`, or is it to stop?
        self._is_wanted = threading.Event()
        self._wanted: SimpleQueue[str] = SimpleQueue()
        #: Before when it asks for nothing that somebody wants.
        self._not_before = 0.0
        self._outages: dict[str, Outage] = {}
        #: Queues that can not be looked at, and when to try again.
        self._left_out: dict[str, float] = {}
        #: Until when no lease of a queue is to count as expired, as somebody stood still, or was cut off.
        self._held_back: dict[str, float] = {}
        #: Of which something has expired that is held back.
        self.holds_back: list[str] = []
        self._expired: dict[str, int] = {}
        #: Has the last look found something due?
        self._is_busy = False
        self._questions = Questions()
        #: Whether a queue has tasks on their last attempt, and when to look for these again.
        self._has_last: dict[str, bool] = {}
        self._look_for_last_at: dict[str, float] = {}
        self._last_look: tuple[float, float] | None = None
        self._looked_at = time.monotonic()
        self._active_until = time.monotonic() + _LATELY
        #: That of the first database: a process has one clock.
        self._clock: DatabaseClock | None = None
        self._thread = threading.Thread(target=self._work, name="modelqueue-prober", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Say whether it did begin, and does nothing any more."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def look_again(self) -> None:
        """There was work a moment ago: look often."""
        self._active_until = time.monotonic() + _LATELY

    def ask(self, names: Iterable[str]) -> None:
        """Somebody has told that one of these queues has a due task: ask at once."""
        names = list(names)
        if len(names) == 1 and time.monotonic() >= self._not_before:
            self._not_before = time.monotonic() + _SHORTEST_WANTED
            self._hinted(
                names
            )  # in this thread, as there is nothing to ask: another would take time to wake up
        else:
            for name in names:
                self._wanted.put(name)
        self._is_wanted.set()

    def stop(self) -> None:
        self._is_stopped.set()
        self._is_wanted.set()

    def _work(self) -> None:
        pause = waited = _SHORTEST
        try:
            while not self._is_stopped.is_set():
                began = time.monotonic()
                self._look(waited)
                is_active = time.monotonic() < self._active_until
                # What has expired is recovered when it was seen twice, not long ago.
                longest = min(self._poll, _LONGEST_WITH_EXPIRED) if self._expired else self._poll
                shortest = _SHORTEST_BUSY if self._is_busy else _SHORTEST
                pause = min(shortest if is_active else pause * _GROWTH, max(longest, shortest))
                # From one beginning to the next, but never without a rest, however long a look takes.
                jittered = random.uniform(0.95, 1.05) * pause  # noqa: S311
                waited = self._rest(max(jittered - (time.monotonic() - began), pause / 2))
        finally:
            connections.close_all()

    def _rest(self, seconds: float) -> float:
        """Wait for so many seconds, but ask what somebody wants; return how many it was to wait.

        After that it looks soon, and often, since a task may be due a moment later by our clock.
        """
        waited = 0.0
        while waited < seconds and not self._is_stopped.is_set():
            began, part = time.monotonic(), min(_SLICE, seconds - waited)
            if is_wanted := self._is_wanted.wait(part):
                self._ask_what_is_wanted()
            waited += min(part, time.monotonic() - began)
            if is_wanted:
                self.look_again()
                seconds = min(seconds, waited + _SHORTEST)
        return waited

    def _ask_what_is_wanted(self) -> None:
        """Ask at once the first time, and then for all that is wanted until it is time again."""
        self._is_stopped.wait(max(0.0, self._not_before - time.monotonic()))
        began = time.monotonic()
        self._is_wanted.clear()
        names = {self._wanted.get() for _ in range(self._wanted.qsize())}
        if not names:  # passed on already
            return
        try:
            perhaps = self._perhaps_due([queue for queue in self._queues if queue.name in names])
        except Exception as error:  # the next look tells
            logger.debug("Nobody knows whether something is due in %s.", ", ".join(names), exc_info=error)
        else:
            if perhaps:
                self._hinted(perhaps)
        now = time.monotonic()
        self._not_before = max(began + _SHORTEST_WANTED, now + _REST * (now - began))

    def _perhaps_due(self, queues: list[Queue[Any]]) -> list[str]:
        """Return the names of those that have due tasks; that of a single one, as a claim asks, too."""
        if len(queues) < 2:
            return [queue.name for queue in queues]
        due: list[str] = []
        for using, some in self._by_database(queues).items():
            due += self._questions.perhaps_due(using, some, not self._questions.sweeps[using].pays)
        return due

    def _look(self, waited: float = 0.0) -> None:
        """Look at each database, and pass on what was found.

        Args:
            waited: how many seconds the last look is to be ago.
        """
        seen, is_known = Seen.nothing(), True
        full, self._looked_at = full_since(self._looked_at), time.monotonic()
        for using, queues in self._by_database(self._queues).items():
            outage = self._outages.setdefault(using, Outage(using))
            try:
                self._follow_the_clock(using)
                found = self._look_sometimes_at_all(using, queues)
                if found.expired:
                    # While nothing can be committed, as a cluster has just lost a node, nobody can renew a
                    # lease. Then this takes long, too, which shows below that they all may have run out.
                    engine_for(using).catch_up()
            except Exception as away:
                outage.begun(away)
                is_known = False
                continue
            if outage.ended() or using in full:
                # Longer than the lease, and all have expired, those of the living, too. On a full disk who
                # recovers may find the last room, and who renews none.
                self._hold_back(queues)
            seen.add(found)
        stood_still = self._stood_still(waited)
        self._hold_back(queue for queue in self._queues if stood_still > _harmless(queue))
        self.holds_back = [name for name in seen.expired if time.monotonic() < self._held_back.get(name, 0.0)]
        expired = {name: first for name, first in seen.expired.items() if name not in self.holds_back}
        has_more_expired = not set(expired) <= set(self._expired)
        self._is_busy = bool(seen.due or seen.alone)
        if self._is_busy or has_more_expired:
            self.look_again()
        self._expired = expired
        seen = seen._replace(expired=expired)
        self._found(seen if is_known or any(seen) else None)

    def _look_sometimes_at_all(self, using: str, queues: list[Queue[Any]]) -> Seen:
        """Look from the bounds on, unless it is time to look at all there is."""
        sweeps, began = self._questions.sweeps[using], time.monotonic()
        is_whole = sweeps.is_due(began)
        found = self._look_at(using, queues, is_whole)
        now = time.monotonic()
        sweeps.note(is_whole, now, now - began)
        if self._is_certain and not (is_whole or any(found)):
            found = self._look_at(using, queues)
        return found

    def _follow_the_clock(self, using: str) -> None:
        if self._clock is None:
            self._clock = DatabaseClock(using)
        if using == self._clock.using:
            jump = abs(self._clock.follow())
            # Others may not have seen yet that the clock of the database was set, or that it is another one;
            # nor may our own processes that have claimed by the clock of the machine.
            self._hold_back((queue for queue in self._queues if jump > _harmless(queue)), INTERVAL)

    def _hold_back(self, queues: Iterable[Queue[Any]], more: float = 0.0) -> None:
        """Recover nothing of these queues until everybody has had time to renew, and so many seconds more."""
        for queue in queues:
            until = time.monotonic() + queue.longest_lease.total_seconds() + more
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

    def look(self) -> Seen:
        """Return what is due, and what is abandoned.

        Raises:
            django.db.Error: a database does not answer.
        """
        seen = Seen.nothing()
        for using, queues in self._by_database(self._queues).items():
            seen.add(self._look_at(using, queues))
        return seen

    def _by_database(self, queues: list[Queue[Any]]) -> dict[str, list[Queue[Any]]]:
        by_database: dict[str, list[Queue[Any]]] = {}
        for queue in queues:
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

    def _look_at(self, using: str, queues: list[Queue[Any]], is_whole: bool = True) -> Seen:
        try:
            return self._probe(using, queues, is_whole)
        except Exception as error:
            if isinstance(error, Error) and self._meets_everybody(using, error):
                with suppress(Exception):  # so that the next look opens another connection
                    connections[using].close()
                raise
            # Of a single queue: its table is missing, perhaps.
            if len(queues) == 1:
                self._leave_out(queues[0], error)
                return Seen.nothing()
            seen = Seen.nothing()
            for queue in queues:
                seen.add(self._look_at(using, [queue], is_whole))
            return seen

    def _meets_everybody(self, using: str, error: Error) -> bool:
        """Say whether an error is not of one queue's statement: the database is away, or locked."""
        if not isinstance(error, (InterfaceError, OperationalError)):
            return False
        engine = engine_for(using)
        return engine.is_try_again(error) or engine.is_away(error) or not engine.is_connected()

    def _probe(self, using: str, queues: list[Queue[Any]], is_whole: bool) -> Seen:
        moment, due, some, expired = clock.now(), dict[str, int](), dict[str, int](), dict[str, int]()
        until = soon(moment)
        sources = {queue.name: queue.source() for queue in queues}
        questions: list[Asked] = []
        for queue in queues:
            name, source, cutoff = queue.name, sources[queue.name], queue.recovery().cutoff(moment)
            questions.append((some if queue.has_last_attempts else due, name, source.any_due(until)))
            if cutoff is not None:
                questions.append((expired, name, source.any_expired(cutoff)))
        self._questions.answer(using, questions, is_whole, is_usual=True)
        for name in sources:
            self._left_out.pop(name, None)
        for queue in queues:
            if queue.has_last_attempts and queue.name not in some:  # nor any of those that others may run
                question = queue.shared(sources[queue.name]).any_due(until)
                self._questions.bounds_of(queue.name, question).note([question.last])
        # Which of them are to run alone is asked only where there are some: mostly there are none.
        alone: list[str] = []
        if mixed := {queue: sources[queue.name] for queue in queues if queue.name in some}:
            shared = [(due, one.name, one.shared(source).any_due(until)) for one, source in mixed.items()]
            self._questions.answer(using, shared, is_whole)
            alone = self._with_last_attempts(using, mixed, due, until)
        return Seen(list(due), alone, expired)

    def _with_last_attempts(
        self, using: str, sources: dict[Queue[Any], Source[Any]], due: Collection[str], until: dt.datetime
    ) -> list[str]:
        """Return the names of those that have tasks on their last attempt, among the first that are due.

        It takes two statements, which read more than others do. So while others are due, once a second only.
        """
        now = time.monotonic()
        asked = [
            queue
            for queue in sources
            if queue.name not in due or now >= self._look_for_last_at.get(queue.name, 0.0)
        ]
        if asked:
            heads = engine_for(using).scalars([sources[queue].head(until) for queue in asked])
            found: dict[str, int] = {}
            questions = [
                (found, queue.name, queue.alone_in(sources[queue], head).any_due(until))
                for queue, head in zip(asked, heads, strict=True)
            ]
            self._questions.answer(using, questions, is_whole=True)
            for queue in asked:
                self._look_for_last_at[queue.name] = now + _FOR_LAST_ATTEMPTS
                self._has_last[queue.name] = queue.name in found
        return [queue.name for queue in sources if self._has_last.get(queue.name)]


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


def _harmless(queue: Queue[Any]) -> float:
    """Return for how long workers may stand still, or the time may jump, before a lease can run out."""
    return max(queue.lease.total_seconds() / 3, _LONGEST_HICCUP)
