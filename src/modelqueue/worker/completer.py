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
from django.db.utils import Error

from modelqueue.worker.running import Register, Running

__all__ = ["Completer"]

logger = logging.getLogger("modelqueue")

#: Seconds between two tries to write an outcome.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


class Completer:
    def __init__(self, register: Register) -> None:
        self._register = register
        self._ended: SimpleQueue[tuple[Running, BaseException | None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="modelqueue-completer", daemon=True)
        self._is_stopped = threading.Event()

    def start(self) -> None:
        self._thread.start()

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
            except Exception:
                logger.exception("%s: its outcome can not be written; it is left to its recovery.", running)
                self._register.end(running, "lost")
                return
            else:
                running.attempt.engine.give_way()
                self._register.end(running, outcome.ending)
                return

    def _resume(self, running: Running) -> None:
        renewal = running.attempt.renewal
        if renewal is not None:
            renewal.resume()
