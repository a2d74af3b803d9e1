"""Running synchronous actions: one thread for each slot, made when it is needed.

A connection that an action opens stays with its thread as long as there is a next task at once, also where
CONN_MAX_AGE is 0: to open one for each task takes many times as long as the task's own statements.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from django.db import connections
from django.db.utils import Error

from modelqueue.attempts import AtomicAttempt
from modelqueue.engines import engine_for
from modelqueue.exceptions import Interrupted
from modelqueue.worker.completer import Completer
from modelqueue.worker.running import Register, Running
from modelqueue.worker.system import interrupt_thread

__all__ = ["Threads"]

logger = logging.getLogger("modelqueue")

#: Seconds without a task after which a thread looks which of its connections are to be closed.
_IDLE = 1.0


class Threads:
    """The threads of a process in which actions are called."""

    def __init__(self, register: Register, completer: Completer) -> None:
        self._register = register
        self._completer = completer
        self._claimed: SimpleQueue[Running | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._threads: list[_Thread] = []
        self._is_interrupted = False

    def submit(self, running: Running) -> None:
        """Run the action of a claimed task; there is a free slot for it."""
        with self._lock:
            if self._idle > 0:
                self._idle -= 1
            else:
                thread = _Thread(self)
                thread.start()  # which fails where the system gives no more
                self._threads.append(thread)
        self._claimed.put(running)

    def interrupt(self) -> None:
        """Raise `Interrupted` in all actions that are being run."""
        self._is_interrupted = True
        for thread in self._threads:
            thread.interrupt()

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

    def run(self, running: Running, guard: Callable[[Any], object]) -> None:
        """Run one task; never raises."""
        attempt = running.attempt
        attempt.engine = engine_for(attempt.source.using)  # that of this thread
        try:
            if self._is_interrupted:  # before it has begun
                self._completer.put(running, Interrupted())
            elif isinstance(attempt, AtomicAttempt):
                outcome = attempt.process(guard)
                self._finish(running, outcome.ending)
            elif attempt.task is None:
                self._completer.put(running, attempt.claim.error)
            else:
                self._completer.put(running, attempt.act(guard, attempt.task))
        except BaseException as error:  # with atomic=True
            if isinstance(error, Error) and (attempt.decided is not None or attempt.failure is not None):
                attempt.waits = False
                attempt.resume_renewal()
                self._completer.put(running, attempt.failure)
            else:
                logger.exception("%s: its outcome can not be written; it is left to its recovery.", running)
                self._finish(running, "lost")
        self._restore_others(running)
        _close_old_connections(is_idle=False)
        with self._lock:
            self._idle += 1

    def _restore_others(self, running: Running) -> None:
        """Leave the connections to other databases fit for the next action of this thread."""
        for connection in connections.all(initialized_only=True):
            using = connection.alias
            if using != running.attempt.source.using and engine_for(using).restore_connection():
                logger.error(
                    "%s has left a transaction open on the database %r, which was rolled back.",
                    running,
                    using,
                )

    def _finish(self, running: Running, how: str) -> None:
        running.attempt.engine.give_way()
        self._register.end(running, how)


class _Thread(threading.Thread):
    def __init__(self, threads: Threads) -> None:
        super().__init__(name="modelqueue-action", daemon=True)
        self._threads = threads
        self._lock = threading.Lock()
        self._is_acting = False

    def run(self) -> None:
        try:
            while (running := self._threads.wait()) is not None:
                action = running.lane.queue.action

                def guard(task: Any, action: Callable[[Any], object] = action) -> object:
                    """Call the action, in which alone this thread may be interrupted."""
                    with self._lock:
                        self._is_acting = True
                    try:
                        return action(task)
                    finally:
                        with self._lock:
                            self._is_acting = False

                self._threads.run(running, guard)
        finally:
            connections.close_all()

    def interrupt(self) -> None:
        with self._lock:
            if self._is_acting and self.ident is not None:
                interrupt_thread(self.ident, Interrupted)


def _close_old_connections(is_idle: bool = True) -> None:
    for connection in connections.all(initialized_only=True):
        with suppress(Exception):  # of one that is dead
            if is_idle or connection.settings_dict["CONN_MAX_AGE"]:
                connection.close_if_unusable_or_obsolete()
