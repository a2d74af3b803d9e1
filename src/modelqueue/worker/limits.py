"""Time limits: who takes longer than the timeout of its queue is interrupted, and named if that ends nothing.

Asked for by the main thread of a process, ten times a second. A task costs it no thread and no timer, so that
short ones do not pay for it.
"""

from __future__ import annotations

import logging
import time

from modelqueue.worker.loop import Loop
from modelqueue.worker.running import Register, Running
from modelqueue.worker.threads import Threads

__all__ = ["Limits"]

logger = logging.getLogger("modelqueue")

#: Seconds that an action has to end, for what it has to clean up, when it is interrupted.
_PATIENCE = 2.0


class Limits:
    """Those of what a process runs."""

    def __init__(self, register: Register, threads: Threads, loop: Loop) -> None:
        self._register = register
        self._threads = threads
        self._loop = loop

    def enforce(self) -> list[Running]:
        """Interrupt what takes too long; return, once, what goes on in spite of that."""
        now = time.monotonic()
        late = [running for running in self._register.running() if running.limit <= now]
        for running in late:
            if running.interrupted_at is None:
                running.interrupted_at = now
                self._interrupt(running)
        return [running for running in late if self._is_overdue(running, now)]

    def _interrupt(self, running: Running) -> None:
        if running.lane.is_async:
            self._loop.cancel(running, running.timed_out())
        else:
            self._threads.time_out(running)

    def _is_overdue(self, running: Running, now: float) -> bool:
        """Say so once, and only of one that can be blamed for it."""
        if running.is_overdue or running.interrupted_at is None or now < running.interrupted_at + _PATIENCE:
            return False
        if running.lane.is_async and self._loop.is_held_up_by_another(running):
            return False
        running.is_overdue = True
        logger.error(
            "%s: its action took longer than its timeout of %s, and goes on although it was interrupted. Its "
            "process is replaced, and killed after the grace time.",
            running,
            running.timeout,
        )
        return True
