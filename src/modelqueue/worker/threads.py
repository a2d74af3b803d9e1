"""Running synchronous actions: one thread for each slot, made when it is needed.

A connection that an action opens stays with its thread as long as there is a next task at once, also where
CONN_MAX_AGE is 0: to open one for each task takes many times as long as the task's own statements.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import Error

from modelqueue.attempts import AtomicAttempt
from modelqueue.engines import Engine, end_queries_of, engine_for
from modelqueue.exceptions import Interrupted, TimedOut
from modelqueue.worker.completer import Completer
from modelqueue.worker.running import Register, Running
from modelqueue.worker.system import interrupt_thread

__all__ = ["Threads"]

logger = logging.getLogger("modelqueue")

#: Seconds without a task after which a thread looks which of its connections are to be closed.
_IDLE = 1.0
#: Seconds between two warnings that a thread is missing.
_WARN_INTERVAL = 60.0
#: Seconds that a task waits for a thread at most.
_LONGEST_WAIT = 1.0


class Threads:
    """The threads of a process in which actions are called."""

    def __init__(self, register: Register, completer: Completer, most: int) -> None:
        self._register = register
        self._most = most
        self._completer = completer
        self._claimed: SimpleQueue[Running | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._threads: list[_Thread] = []
        self._is_interrupted = False
        self._warn_from = 0.0

    def submit(self, some: list[Running]) -> None:
        """Run the actions of claimed tasks, or do so soon, when those that run have ended."""
        with self._lock:
            self._start_missing(len(some) - self._idle)
            self._idle -= len(some)
        moment = time.monotonic()
        for running in some:
            running.waits_since = moment
            self._claimed.put(running)

    @property
    def idle(self) -> int:
        """How many tasks would begin at once."""
        return max(0, self._most - len(self._threads) + self._idle)

    @property
    def waiting(self) -> int:
        """How many tasks wait for a thread."""
        return self._claimed.qsize()

    def _start_missing(self, count: int) -> None:
        for _ in range(min(count, self._most - len(self._threads))):
            thread = _Thread(self)
            try:
                thread.start()
            except RuntimeError as error:  # the system gives no more
                if not self._threads:
                    raise
                if time.monotonic() >= self._warn_from:
                    self._warn_from = time.monotonic() + _WARN_INTERVAL
                    text = "The system gives no more threads, so %d of %d run the tasks: %s"
                    logger.warning(text, len(self._threads), self._most, error)
                return
            self._threads.append(thread)
            self._idle += 1

    def give_back_what_waits(self) -> None:
        """Give back what was claimed ahead and waits for long: other processes may have a thread for it."""
        begin = time.monotonic() - _LONGEST_WAIT
        for running in self._register.running():
            if running.waits_since < begin and running.take():
                running.lane.note_wait()
                self._completer.put(running, Interrupted("It waited for a thread for too long."))

    def interrupt(self) -> None:
        """Raise `Interrupted` in all actions that are being run."""
        self._is_interrupted = True
        for thread in self._threads:
            thread.interrupt(Interrupted)

    def time_out(self, running: Running) -> None:
        """Raise `TimedOut` in the action of one task."""
        for thread in self._threads:
            thread.interrupt(TimedOut, running)

    def stop(self) -> None:
        """Let the threads end that are idle."""
        for _ in self._threads:
            self._claimed.put(None)

    def wait(self) -> Running | None:
        """Wait for a task to run; None: there is none any more."""
        while True:
            try:
                return self._claimed.get(timeout=_IDLE)
            except Empty:
                _close_old_connections()

    def run(self, running: Running, guard: Callable[[Any], object], engine: Engine) -> None:
        """Run one task, unless it was given back meanwhile; never raises."""
        if running.take():  # before that it may be another thread's
            running.attempt.engine = engine
            self._run(running, guard)
        with self._lock:
            self._idle += 1

    def _run(self, running: Running, guard: Callable[[Any], object]) -> None:
        attempt = running.attempt
        own = attempt.engine.connection  # which it is no more once its outcome is to be written
        try:
            if self._is_interrupted or not attempt.is_held:  # before it has begun
                self._completer.put(running, Interrupted())
            elif isinstance(attempt, AtomicAttempt):
                self._register.begin(running)
                attempt.waits = True  # as nobody waits for this thread
                outcome = attempt.process(guard)
                self._finish(running, outcome.ending)
            elif attempt.task is None:
                self._completer.put(running, attempt.claim.error)
            else:
                self._register.begin(running)
                self._completer.put(running, attempt.act(guard, attempt.task))
        except BaseException as error:  # with atomic=True
            if isinstance(error, Error) and (attempt.decided is not None or attempt.failure is not None):
                attempt.waits = False
                attempt.resume_renewal()
                self._completer.put(running, attempt.failure)
            else:
                logger.exception("%s: its outcome can not be written; it is left to its recovery.", running)
                self._finish(running, "lost")
        self._restore_others(running, own)

    def _restore_others(self, running: Running, own: BaseDatabaseWrapper) -> None:
        """Leave the connections to other databases, and those that are old, fit for the next action."""
        # To ask Django which there are takes as long as all else here.
        for connection in [own] if len(connections.settings) == 1 else connections.all(initialized_only=True):
            using = connection.alias
            if using != running.attempt.source.using and engine_for(using).restore_connection():
                logger.error(
                    "%s has left a transaction open on the database %r, which was rolled back.",
                    running,
                    using,
                )
            _close_if_old(connection, is_idle=False)

    def _finish(self, running: Running, how: str) -> None:
        running.attempt.engine.give_way()
        self._register.end([(running, how)])


class _Call:
    """One call of an action, in which alone its thread may be interrupted, and once at most.

    Without a lock that the thread would have to wait for: what is raised there might come just then, and
    leave it locked.
    """

    def __init__(self, running: Running) -> None:
        self.running = running
        self._ident = threading.get_ident()
        #: Taken by who comes first, the end of the action or an interruption, and never given back.
        self._turn = threading.Lock()
        self._is_sent = False

    def interrupt(self, error: type[BaseException]) -> None:
        if self._turn.acquire(blocking=False):
            interrupt_thread(self._ident, error)
            self._is_sent = True

    def run(self, task: Any) -> object:
        is_called = False
        try:
            self.running.action_begins()
            is_called = True
            try:
                return self.running.lane.queue.action(task)
            finally:
                if not self._turn.acquire(blocking=False):
                    while not self._is_sent:
                        time.sleep(0.001)
                    time.sleep(0)  # if it did not come in the action, it does so here at last
        except (Interrupted, TimedOut) as error:
            if not is_called or not _is_raised_here(error):
                if isinstance(error, TimedOut):
                    error.args = self.running.timed_out().args
                raise
            ended_with = error.__context__
        finally:
            self.running.action_has_ended()
        if ended_with is not None:  # just when it was to be interrupted
            raise ended_with
        return None


class _Thread(threading.Thread):
    def __init__(self, threads: Threads) -> None:
        super().__init__(name="modelqueue-action", daemon=True)
        self._threads = threads
        #: The latest.
        self._call: _Call | None = None
        self._engines: dict[str, Engine] = {}

    def run(self) -> None:
        try:
            while (running := self._threads.wait()) is not None:
                engine = self._engine_for(running.attempt.source.using)
                self._threads.run(running, partial(self._act, running), engine)
                if running.interrupted_at is not None:  # nobody knows in the midst of what
                    _close_connections()
        finally:
            connections.close_all()

    def _engine_for(self, using: str) -> Engine:
        if using not in self._engines:
            self._engines[using] = engine_for(using)
        self._engines[using].forget()
        return self._engines[using]

    def _act(self, running: Running, task: Any) -> object:
        self._call = call = _Call(running)
        try:
            return call.run(task)
        except BaseException as error:
            used = [engine_for(connection.alias) for connection in connections.all(initialized_only=True)]
            # The error is kept until its outcome is written; the connections of who was interrupted are not.
            if running.interrupted_at is not None or any(engine.locks_by_reading for engine in used):
                end_queries_of(error)
            raise

    def interrupt(self, error: type[BaseException], running: Running | None = None) -> None:
        """Raise an exception in its action; if one is given, in that of this task alone."""
        call = self._call
        if call is not None and running in (None, call.running):
            call.interrupt(error)


def _is_raised_here(error: BaseException) -> bool:
    """Say, where an error is caught, whether that function has raised it, and none that it has called."""
    return error.__traceback__ is not None and error.__traceback__.tb_next is None


def _close_connections() -> None:
    for connection in connections.all(initialized_only=True):
        with suppress(Exception):  # of one that is dead
            connection.close()


def _close_old_connections() -> None:
    for connection in connections.all(initialized_only=True):
        _close_if_old(connection)


def _close_if_old(connection: BaseDatabaseWrapper, is_idle: bool = True) -> None:
    if is_idle or connection.settings_dict["CONN_MAX_AGE"]:
        with suppress(Exception):  # of one that is dead
            connection.close_if_unusable_or_obsolete()
