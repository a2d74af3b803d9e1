"""The completer: the one thread of a process that writes outcomes.

Nothing counts as ended before it is committed. While the database is away the outcome waits, and the lease
is renewed, so that nobody else runs the task meanwhile. A row that somebody has locked holds up no other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from django.db import connections
from django.db.utils import Error, OperationalError

from modelqueue.attempts import SHORT_PATIENCE
from modelqueue.clock import now
from modelqueue.engines import Change, Engine, RowLocked, engine_for
from modelqueue.leases import Lease
from modelqueue.outcomes import Outcome, Successes
from modelqueue.worker.running import Register, Running

__all__ = ["Completer"]

logger = logging.getLogger("modelqueue")

#: Seconds between two tries to write an outcome.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
#: Outcomes that are written together.
_MOST_TOGETHER = 400
#: Seconds for which an outcome waits for others, to be written with them, while more tasks wait for a thread.
_LINGER = 0.003
#: The longest while somebody has locked the row.
_LONGEST_PAUSE_OF_LOCKED = 1.0
#: Seconds after which an outcome is given up that the database refuses without being away.
_LONGEST_REFUSAL = 60.0
#: Seconds between two advices, and between two counts of the server's connections, which may all be in the
#: making at first; and the part of those that it allows from which on they are scarce.
_ADVICE_INTERVAL, _COUNT_INTERVAL, _NEARLY = 60.0, 0.2, 0.8


@dataclass(eq=False, slots=True)
class _Ended:
    """An action that has returned, or raised this error, and when to try to record that."""

    running: Running
    error: BaseException | None
    try_at: float = 0.0
    pause: float = 0.0
    #: Since when the database, which is there, does not take it.
    refused_since: float | None = None

    def put_off(self, longest: float) -> None:
        self.pause = min(self.pause * 2 or _FIRST_PAUSE, longest)
        self.try_at = time.monotonic() + self.pause

    def is_refused_for_long(self) -> bool:
        """Note that it is refused; return whether that goes on for too long."""
        if self.refused_since is None:
            self.refused_since = time.monotonic()
        return time.monotonic() - self.refused_since > _LONGEST_REFUSAL


class _Prepared(NamedTuple):
    """An outcome that is to be written together with others."""

    ended: _Ended
    outcome: Outcome
    change: Change


class Completer:
    """
    Args:
        waiting: returns how many tasks are claimed whose actions have not begun.
    """

    def __init__(self, register: Register, waiting: Callable[[], int] = lambda: 0) -> None:
        self._register = register
        self._waiting = waiting
        self._ended: SimpleQueue[_Ended | Callable[[], None] | None] = SimpleQueue()
        #: What could not be written yet.
        self._late: list[_Ended] = []
        #: What was taken out of turn.
        self._put_back: list[Callable[[], None] | None] = []
        #: The outcome that tries, for all of its database, whether that is there again; by alias.
        self._waits_for: dict[str, _Ended] = {}
        self._thread = threading.Thread(target=self._work, name="modelqueue-completer", daemon=True)
        self._is_ending = False
        self._is_stopped = threading.Event()
        self._advise_from = 0.0
        #: The aliases of databases with a connection for outcomes.
        self._reserved = set[str]()
        #: Those of its thread, by alias.
        self._engines: dict[str, Engine] = {}

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def reserve(self, using: str) -> None:
        """Have a connection from now on: once the actions run, the server may have none left to give."""
        if using not in self._reserved:
            self._reserved.add(using)
            self._ended.put(partial(self._connect, using))

    def _connect(self, using: str) -> None:
        try:
            connections[using].ensure_connection()
        except Exception as error:  # who has an outcome to write tells
            logger.debug("The database %r gives no connection to write outcomes: %s", using, error)
            self._reserved.discard(using)

    def put(self, running: Running, error: BaseException | None) -> None:
        """The action of a task has returned, or raised this error: record that."""
        self._register.leave(running)  # before somebody can write its outcome, with which it ends
        self._ended.put(_Ended(running, error))

    def call_after_the_others(self, function: Callable[[], None]) -> None:
        """Call a function, in the thread of the completer, when what was put before is written or put off."""
        self._ended.put(function)

    def stop(self, seconds: float) -> None:
        """Write what is to be written, and end; what the database does not take in time is left."""
        self._ended.put(None)
        self._thread.join(max(0.0, seconds))
        self._is_stopped.set()

    def _work(self) -> None:
        try:
            while (ended := self._next()) is not None and not self._is_stopped.is_set():
                # Under load only: a slot counts as taken until the outcome is written.
                if self._waiting() > self._ended.qsize():
                    time.sleep(_LINGER)
                self._settle_together([ended, *self._more()])
        finally:
            connections.close_all()

    def _next(self) -> _Ended | None:
        """Wait for the next outcome to write; None: there is none any more."""
        while True:
            late = min(self._late, key=lambda ended: ended.try_at, default=None)
            pause = None if late is None else max(0.0, late.try_at - time.monotonic())
            if late is not None and pause == 0.0:
                self._late.remove(late)
                return late
            if late is None and self._is_ending:
                return None
            with suppress(Empty):
                ended = self._get(pause)
                if isinstance(ended, _Ended):
                    return ended
                if ended is None:
                    self._is_ending = True
                else:
                    ended()

    def _get(self, pause: float | None) -> _Ended | Callable[[], None] | None:
        if self._put_back:
            return self._put_back.pop()
        return self._ended.get(timeout=pause)

    def _more(self) -> list[_Ended]:
        """Return what has ended, too, by now."""
        more: list[_Ended] = []
        with suppress(Empty):
            while len(more) < _MOST_TOGETHER - 1:
                ended = self._put_back.pop() if self._put_back else self._ended.get_nowait()
                if not isinstance(ended, _Ended):
                    self._put_back.append(ended)
                    break
                more.append(ended)
        return more

    def _settle_together(self, all_ended: list[_Ended]) -> None:
        """Write those outcomes of one source together that are a status alone; each other by itself."""
        if len(all_ended) == 1:
            self._settle(*all_ended)
            return
        able = defaultdict[Any, list[_Ended]](list)
        for engine in self._engines.values():
            _make_new(engine)
        for ended in all_ended:
            if self._may_be_of_status_alone(ended):
                source = ended.running.attempt.source
                able[source.using, source.owner, source.field].append(ended)
        written = set[_Ended]()
        # One after the other: what ends the renewals of a second database may have to wait for that.
        for some in able.values():
            prepared, overtaken = self._prepare(some)
            if not overtaken:
                written |= self._write_together(prepared)
                continue
            for one in prepared:  # each by itself, as these may take longer than its lease
                one.ended.running.attempt.resume_renewal()
            for ended in overtaken:
                self._settle(ended)
            written.update(overtaken)
        left = [ended for ended in all_ended if ended not in written]
        for ended in left[1:]:
            ended.running.attempt.resume_renewal()  # those before it may take longer than its lease
        for ended in left:
            self._settle(ended)

    def _prepare(self, some: list[_Ended]) -> tuple[list[_Prepared], list[_Ended]]:
        """Decide on outcomes of one source; return those to write together, and those that come too late.

        Of two attempts on a row the older one has lost it. It is to be settled first, or it would take for
        its own what the other one writes.
        """
        renewals = [ended.running.attempt.renewal for ended in some]
        Lease.end_all(renewal for renewal in renewals if isinstance(renewal, Lease))
        successes = Successes(now())
        prepared: dict[Any, _Prepared] = {}
        overtaken: list[_Ended] = []
        for ended in some:
            try:
                found = ended.running.attempt.prepare(ended.error, successes)
            except BaseException:  # noqa: S112  which comes up again when it is settled by itself
                continue
            if found is None:
                continue
            one = _Prepared(ended, *found)
            if (other := prepared.get(one.change.key)) is not None:
                older, one = sorted([one, other], key=lambda each: each.ended.running.number)
                overtaken.append(older.ended)
            prepared[one.change.key] = one
        return list(prepared.values()), overtaken

    def _may_be_of_status_alone(self, ended: _Ended) -> bool:
        attempt, using = ended.running.attempt, ended.running.attempt.source.using
        if using in self._waits_for:
            return False
        if using not in self._engines:
            self._engines[using] = _make_new(engine_for(using))
        try:
            return attempt.may_be_of_status_alone(ended.error, self._engines[using])
        except BaseException:  # as below
            return False

    def _write_together(self, group: list[_Prepared]) -> set[_Ended]:
        if not group:
            return set()
        attempt = group[0].ended.running.attempt
        source, engine = attempt.source, attempt.engine
        try:
            keys = engine.set_statuses(source, [change for _, _, change in group])
        except Exception as error:
            logger.debug("%s: outcomes can not be written together: %s", source.queue_name, error)
            return set()
        written, concluded = set[_Ended](), list[tuple[Running, Outcome]]()
        for ended, outcome, change in group:
            if change.key not in keys:
                continue
            written.add(ended)
            try:
                ended.running.attempt.conclude_prepared(outcome)
            except BaseException as error:
                self._handle(ended, error)
            else:
                concluded.append((ended.running, outcome))
        self._end(concluded)
        return written

    def _settle(self, ended: _Ended) -> None:
        running = ended.running
        using = running.attempt.source.using
        first = self._waits_for.get(using, ended)
        if first is not ended:  # to ask for it with each outcome would take a timeout each
            ended.refused_since = None
            ended.try_at = first.try_at
            self._late.append(ended)
            running.attempt.resume_renewal()  # which has ended if it was to be written with others
            return
        try:
            outcome = running.attempt.settle(ended.error)
        except BaseException as error:
            self._waits_for.pop(using, None)
            self._handle(ended, error)
        else:
            self._waits_for.pop(using, None)
            self._end([(running, outcome)])

    def _handle(self, ended: _Ended, error: BaseException) -> None:
        """An outcome was not written: decide when to try again, and who has to wait for that."""
        attempt = ended.running.attempt
        if isinstance(error, RowLocked):
            ended.refused_since = None
            self._put_off(ended, error, _LONGEST_PAUSE_OF_LOCKED)
        elif isinstance(error, Error) and attempt.engine.meets_everybody(error):
            ended.refused_since = None
            self._reserved.discard(attempt.source.using)
            self._waits_for[attempt.source.using] = ended
            self._put_off(ended, error, _LONGEST_PAUSE)
        elif isinstance(error, Error) and (attempt.engine.is_full(error) or not ended.is_refused_for_long()):
            self._put_off(ended, error, _LONGEST_PAUSE)
        else:  # SystemExit of a hook, for example
            self._give_up(ended, error)

    def _put_off(self, ended: _Ended, why: Exception, longest: float) -> None:
        level = logging.DEBUG if ended.pause else logging.WARNING
        logger.log(level, "%s: its outcome can not be written yet: %s", ended.running, why)
        ended.running.attempt.resume_renewal()
        ended.put_off(longest)
        self._late.append(ended)

    def _give_up(self, ended: _Ended, why: BaseException) -> None:
        logger.error(
            "%s: its outcome can not be written; it is left to its recovery.", ended.running, exc_info=why
        )
        self._register.end([(ended.running, "lost")])

    def _end(self, written: list[tuple[Running, Outcome]]) -> None:
        self._register.end([(running, outcome.ending) for running, outcome in written])
        try:
            for running, outcome in written:
                if isinstance(outcome.error, OperationalError):
                    self._advise(running)
            for running, _ in written[-1:]:
                running.attempt.engine.give_way()
        except Exception:
            logger.exception("After a task")

    def _advise(self, running: Running) -> None:
        """Say what to set if the action has failed because the server has no more connections."""
        if time.monotonic() < self._advise_from:
            return
        self._advise_from = time.monotonic() + _COUNT_INTERVAL
        try:
            found = running.attempt.engine.connections_in_use()
        except Error:
            return
        if found is not None and found[0] >= _NEARLY * found[1]:
            self._advise_from = time.monotonic() + _ADVICE_INTERVAL
            logger.error(
                "%s: the database server has %d connections of the %d that it allows. Each action that runs "
                "and uses the database has one. Give the queue fewer slots, or the worker fewer --threads or "
                "--processes, or raise max_connections of the server.",
                running.lane.queue.name,
                *found,
            )


def _make_new(engine: Engine) -> Engine:
    """Make an engine as new for the next outcomes; it does not wait for long, as those behind would, too."""
    engine.forget()
    engine.patience = SHORT_PATIENCE
    return engine
