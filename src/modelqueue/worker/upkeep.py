"""The upkeep of queues: what each of them wants done every second as long as a worker serves it.

One thread for the whole worker, so that it is done once whatever the number of processes, and apart from the
prober and the supervisor, so that a call that hangs holds up nothing but the calls after it.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import Any

from django.db import connections

from modelqueue.queues import Queue

__all__ = ["Upkeep"]

logger = logging.getLogger("modelqueue")

#: Seconds between two rounds.
_INTERVAL = 1.0
#: Seconds that a look for what is wrong may take, and after which it is tried again if it has failed.
_EXAMINE_SECONDS, _EXAMINE_INTERVAL = 3.0, 60.0


class Upkeep:
    """Calls the `upkeep` of each of these queues, in turn, until it is stopped."""

    def __init__(self, queues: list[Queue[Any]]) -> None:
        self._queues = [queue for queue in queues if queue.upkeep is not None]
        #: Those whose last call has failed, which was told already.
        self._failing: set[str] = set()
        self._to_examine = self._queues
        self._examine_at = 0.0
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="modelqueue-upkeep", daemon=True)

    def start(self) -> None:
        """Begin, where there is something to do."""
        if self._queues:
            self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Say whether it did begin, and does nothing any more."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def stop(self) -> None:
        """Call nothing more. What is being called goes on, and nobody waits for it."""
        self._is_stopped.set()

    def _work(self) -> None:
        try:
            while not self._is_stopped.is_set():
                for queue in self._queues:
                    if not self._is_stopped.is_set():
                        self._keep(queue)
                self._examine()
                self._is_stopped.wait(_INTERVAL)
        finally:
            connections.close_all()

    def _keep(self, queue: Queue[Any]) -> None:
        try:
            queue.keep_up()
        except BaseException as error:  # SystemExit too: other queues go on
            level = logging.DEBUG if queue.name in self._failing else logging.WARNING
            self._failing.add(queue.name)
            logger.log(level, "%s: its upkeep has failed: %s", queue.name, error, exc_info=error)
        else:
            if queue.name in self._failing:
                self._failing.remove(queue.name)
                logger.warning("%s: its upkeep works again.", queue.name)
        _close_broken_connections()

    def _examine(self) -> None:
        """Warn of what is wrong with the queues, once; where that fails, it is tried again in a while."""
        if not self._to_examine or time.monotonic() < self._examine_at:
            return
        level = logging.DEBUG if self._examine_at else logging.WARNING  # what has failed was told already
        seen, failed = set[Any](), []
        for queue in self._to_examine:
            try:
                place = queue.examine, queue.using  # which several queues may have in common
                if queue.examine and place not in seen and not self._is_stopped.is_set():
                    seen.add(place)
                    for finding in list(queue.examine(queue.using, _EXAMINE_SECONDS)):
                        logger.warning("%s Ask manage.py modelqueue doctor.", finding.finding)
            except Exception as error:
                logger.log(level, "%s: can not be examined: %s", queue.name, error)
                failed.append(queue)
        self._to_examine = failed
        self._examine_at = time.monotonic() + _EXAMINE_INTERVAL
        _close_broken_connections()


def _close_broken_connections() -> None:
    """Close those that have had an error, raised or swallowed, so that the next call opens another."""
    for connection in connections.all(initialized_only=True):
        if connection.errors_occurred:
            with suppress(Exception):  # of one that is dead
                connection.close()
