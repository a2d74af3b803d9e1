"""Giving back what a process had in hand that is dead for sure, at once, without waiting for its leases.

Uncharged what it had not begun, and all of it where it was told to stop; else an action that had begun has
cost its task an attempt, as perhaps it was what killed the process. Where it was told to stop because of an
action that did not end at its timeout, that one is charged alone. In a thread for each dead process, beside
all else, as rows may be locked. What can not be given back is recovered when its lease has run out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from django.db import connections

from modelqueue import verbs
from modelqueue.engines import Candidate, RowLocked
from modelqueue.exceptions import TimedOut, WorkerDied
from modelqueue.queues import Queue
from modelqueue.status import Status

__all__ = ["GiveBack", "Held"]

logger = logging.getLogger("modelqueue")

#: Seconds for which it is tried; what is locked for longer is recovered.
_LONGEST = 5.0
#: Seconds between two tries of what is locked.
_PAUSE = 0.2


class Held(NamedTuple):
    """A task that a process had in hand when it died."""

    queue: str
    row: Candidate
    """As it was before the claim."""
    leases: AbstractSet[Status]
    """What may stand in the row as long as it is that process's."""
    has_begun: bool
    is_overdue: bool = False
    """Could its action be ended by the end of the process alone, long after its timeout?"""


class GiveBack:
    def __init__(self, queues: dict[str, Queue[Any]]) -> None:
        self._queues = queues
        self._threads: list[threading.Thread] = []
        #: When something could not be given back, by the monotonic clock.
        self.failed_at = 0.0

    def start(self, held: list[Held], why: WorkerDied | None) -> None:
        """Give back what a dead process had in hand.

        Args:
            why: what has become of it; None: it was told to stop, so nothing is charged.
        """
        if held:
            thread = threading.Thread(target=self._give_back, args=[held, why], daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system gives no more
                self.failed_at = time.monotonic()
                logger.error("What it had in hand can not be given back; it is recovered later: %s", error)
                return
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]

    @property
    def is_busy(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def wait(self) -> None:
        """Wait until all is given back, but not for longer than a moment."""
        deadline = time.monotonic() + _LONGEST + _PAUSE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _give_back(self, held: list[Held], why: WorkerDied | None) -> None:
        try:
            self._give_back_in_time(held, why)
        finally:
            connections.close_all()  # those of this thread

    def _give_back_in_time(self, held: list[Held], why: WorkerDied | None) -> None:
        """Give back first what nobody has locked, as that holds up the others, and then the rest in time."""
        deadline = time.monotonic() + _LONGEST
        locked = [one for one in held if not self._is_done(one, why)]
        while locked and time.monotonic() < deadline:
            time.sleep(_PAUSE)
            locked = [one for one in locked if not self._is_done(one, why)]
        for one in locked:
            self.failed_at = time.monotonic()
            logger.error(
                "%s %s can not be given back, as somebody has locked its row; it is recovered later.",
                one.queue,
                one.row.pk,
            )

    def _is_done(self, held: Held, why: WorkerDied | None) -> bool:
        """Give a task back, if that can be done at all; return whether nobody has locked its row."""
        try:
            if held.is_overdue:
                self._charge(held, self._timed_out(held))
            elif why is not None and held.has_begun:
                self._charge(held, why)
            else:
                self._release(held, why)
        except RowLocked:
            return False
        except BaseException:  # SystemExit of a receiver, too: the others are given back
            self.failed_at = time.monotonic()
            logger.exception("%s %s can not be given back; it is recovered later.", held.queue, held.row.pk)
        return True

    def _timed_out(self, held: Held) -> TimedOut:
        timeout = self._queues[held.queue].policy_of(held.row).timeout
        return TimedOut(f"the action took longer than its timeout of {timeout}, until its process was killed")

    def _charge(self, held: Held, why: WorkerDied | TimedOut) -> None:
        queue = self._queues[held.queue]
        verbs.take_back(queue.source(), queue.policy_of(held.row), held.row, held.leases, why)

    def _release(self, held: Held, why: WorkerDied | None) -> None:
        if not verbs.release(self._queues[held.queue].source(), held.row, held.leases, waits=False):
            return
        if why is None:
            logger.warning("%s %s did not end in time: given back.", held.queue, held.row.pk)
        else:
            logger.warning("%s %s had not begun when its process died: given back.", held.queue, held.row.pk)
