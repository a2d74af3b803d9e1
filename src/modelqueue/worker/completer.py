"""The completer: the one thread of a process that writes outcomes.

Nothing counts as ended before it is committed. While the database is away the outcome waits, and the lease
is renewed, so that nobody else runs the task meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from queue import SimpleQueue

from django.db import connections
from django.db.utils import Error, OperationalError

from modelqueue.outcomes import Outcome
from modelqueue.worker.running import Register, Running

__all__ = ["Completer"]

logger = logging.getLogger("modelqueue")

#: Seconds between two tries to write an outcome.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
#: Seconds between two advices, and the part of the server's connections from which on they are scarce.
_ADVICE_INTERVAL, _NEARLY = 60.0, 0.8


class Completer:
    def __init__(self, register: Register) -> None:
        self._register = register
        self._ended: SimpleQueue[tuple[Running, BaseException | None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="modelqueue-completer", daemon=True)
        self._is_stopped = threading.Event()
        self._advise_from = 0.0

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def put(self, running: Running, error: BaseException | None) -> None:
        """The action of a task has returned, or raised this error: record that."""
        self._ended.put((running, error))

    def stop(self, seconds: float) -> None:
        """Write what is to be written, and end; what the database does not take in time is left."""
        self._ended.put(None)
        self._thread.join(max(0.0, seconds))
        self._is_stopped.set()

    def _work(self) -> None:
        try:
            while (ended := self._ended.get()) is not None:
                self._settle(*ended)
        finally:
            connections.close_all()

    def _settle(self, running: Running, error: BaseException | None) -> None:
        pause = _FIRST_PAUSE
        while not self._is_stopped.is_set():
            try:
                outcome = running.attempt.settle(error)
            except Error as away:
                logger.warning("%s: its outcome can not be written yet: %s", running, away)
                self._resume(running)
                time.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
            except BaseException:  # SystemExit of a hook, for example
                logger.exception("%s: its outcome can not be written; it is left to its recovery.", running)
                self._register.end(running, "lost")
                return
            else:
                self._register.end(running, outcome.ending)
                self._look_around(running, outcome)
                return

    def _look_around(self, running: Running, outcome: Outcome) -> None:
        try:
            self._advise(running, outcome)
            running.attempt.engine.give_way()
        except Exception:
            logger.exception("After a task")

    def _advise(self, running: Running, outcome: Outcome) -> None:
        """Say what to set when an action has failed because the server has no more connections."""
        if not isinstance(outcome.error, OperationalError) or time.monotonic() < self._advise_from:
            return
        self._advise_from = time.monotonic() + _ADVICE_INTERVAL
        try:
            found = running.attempt.engine.connections_in_use()
        except Error:
            return
        if found is not None and found[0] >= _NEARLY * found[1]:
            logger.error(
                "%s: the database server has %d connections of the %d that it allows. Each action that runs "
                "and uses the database has one. Give the queue fewer slots, or the worker fewer --threads or "
                "--processes, or raise max_connections of the server.",
                running.lane.queue.name,
                *found,
            )

    def _resume(self, running: Running) -> None:
        renewal = running.attempt.renewal
        if renewal is not None:
            renewal.resume()
