"""Taking back what dead workers have left, where the prober has just seen that a lease has run out.

One thread for the whole worker: it remembers what it has seen, however often processes are replaced, and it
holds up neither the prober nor a claim, however much there is to recover. It looks only where the prober has
just looked, who knows of outages and of time that has jumped, after which leases of the living have run out.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from django.db import connections

from modelqueue import clock, verbs
from modelqueue.queues import Queue
from modelqueue.worker.suspects import Suspects
from modelqueue.worker.troubles import Troubles

__all__ = ["Recovery"]

#: Seconds, counted also while the machine sleeps, for which it counts what the prober has seen.
_FRESH = 2.0
#: Seconds until the next look at a queue of which nothing could be taken back, as it is locked, perhaps.
_PAUSE = 0.5
#: Seconds without anything to do after which the thread lets go of its connections.
_IDLE = 5.0


class _Abandoned:
    """What has expired in one queue."""

    def __init__(self, queue: Queue[Any]) -> None:
        self.queue = queue
        self.suspects = Suspects()
        #: When to look next, by the monotonic clock, and from which status on.
        self.look_at = 0.0
        self.first = 0


class Recovery:
    def __init__(self, queues: list[Queue[Any]]) -> None:
        self._abandoned = {queue.name: _Abandoned(queue) for queue in queues}
        self._troubles = Troubles("recovered")
        #: Where there is something to do, as the prober has seen last, and until when that counts.
        self._names: list[str] = []
        self._is_fresh_until = 0.0
        self._changed = threading.Condition()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._work, name="modelqueue-recovery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Say whether it did begin, and does nothing any more."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def look_at(self, expired: Mapping[str, int]) -> None:
        """Recover what has expired in these queues, and in no other any more: the prober has looked.

        Args:
            expired: by their names the first status that it has seen.
        """
        with self._changed:
            self._names = list(expired)
            for name, first in expired.items():
                self._abandoned[name].first = first
            self._is_fresh_until = clock.steady() + _FRESH
            self._changed.notify()

    def stop(self) -> None:
        """Recover nothing more. Nobody waits for what is being recovered."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    def _work(self) -> None:
        try:
            while not self._is_stopped:
                if (abandoned := self._next()) is not None:
                    self._recover(abandoned)
                else:
                    connections.close_all()
        finally:
            connections.close_all()

    def _next(self) -> _Abandoned | None:
        """Wait for the next queue to look at; None: there was none for long, or is none any more."""
        deadline = time.monotonic() + _IDLE
        with self._changed:
            while not self._is_stopped and (now := time.monotonic()) < deadline:
                if clock.steady() > self._is_fresh_until:
                    self._names = []
                waiting = [self._abandoned[name] for name in self._names]
                first = min(waiting, key=lambda one: one.look_at, default=None)
                if first is not None and first.look_at <= now:
                    self._names.remove(first.queue.name)
                    return first
                self._changed.wait(min(deadline, math.inf if first is None else first.look_at) - now)
        return None

    def _recover(self, abandoned: _Abandoned) -> None:
        queue, suspects = abandoned.queue, abandoned.suspects
        suspects.begin()
        try:
            source = replace(queue.source(), since=abandoned.first)
            count = verbs.recover(
                source, queue.recovery(), is_certain=suspects.confirm, policy_of=queue.asks_for_policy
            )
        except BaseException as error:  # SystemExit of a receiver, too: other queues go on
            suspects.forget()
            connections.close_all()
            abandoned.look_at = time.monotonic() + self._troubles.begun(queue, error)
        else:
            self._troubles.ended(queue)
            now = time.monotonic()
            abandoned.look_at = now if count else min(suspects.look_at, now + _PAUSE)
