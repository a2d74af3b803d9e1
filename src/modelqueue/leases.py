"""Keeping the leases of running tasks alive: one thread per process and database renews them all.

A lease says that a worker lives. It is renewed every third of its length, all leases of a queue in one
statement, by a thread of its own, so that no action can hold it up. A renewal changes the number that stands
in the row, so it and the outcome of a task are put in order: `Lease.end` waits for a renewal that is under
way, and after it the task is not renewed any more.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from django.db import connections
from django.db.utils import Error

from modelqueue import verbs
from modelqueue.attempts import Attempt
from modelqueue.engines import engine_for
from modelqueue.source import Source
from modelqueue.status import Status

__all__ = ["Keeper", "Lease", "OnLoss", "OnRenewal", "keeper_for"]

logger = logging.getLogger("modelqueue")

#: Renewals in the length of a lease, so that one or two may fail.
_SHARE = 3
#: Seconds after which a renewal is tried again of rows that are locked, or when the database is away.
_SOON = 0.5
#: Seconds that who wants a renewal at once waits for it.
_PATIENCE = 5.0
#: Seconds for which the thread waits for a next lease, as to start one takes longer than a short task.
_LINGER = 5.0
#: Seconds between two looks at a connection that is reserved.
_LONGEST_REST = 60.0


#: Called when a lease is lost, and with what stands in a row and what is about to.
OnLoss = Callable[[], None]
OnRenewal = Callable[[Status, Status], None]


class _Group:
    """The leases of one source that hold for the same time: they are renewed together."""

    def __init__(self, source: Source[Any], seconds: float) -> None:
        self.source = source
        self.seconds = seconds
        self.lock = threading.Lock()
        self.held: dict[Any, Lease] = {}
        #: When all are renewed.
        self.due = 0.0
        #: How often it was done.
        self.times = 0
        #: The keys of rows that somebody has locked, and when these are tried again.
        self._locked: set[Any] = set()
        self._again = math.inf
        self.is_failing = False

    def __str__(self) -> str:
        return f"{self.source.model._meta.label}.{self.source.field.name}"

    @property
    def next(self) -> float:
        """When there is something to do."""
        return min(self.due, self._again)

    def renew(self) -> None:
        """Renew all whose time it is; those that are lost are told to their attempts."""
        with self.lock:
            began = time.monotonic()
            is_for_all = began >= self.due
            held = dict(self.held)  # one may leave meanwhile, who does not wait for this
            if not is_for_all:
                held = {key: lease for key, lease in held.items() if key in self._locked}
            self._locked, self._again = set(held), began + _SOON if held else math.inf
            if not held:
                return
            if is_for_all:
                self.due = self._again
            leases = {key: lease.attempt.leases for key, lease in held.items()}

            def note(key: Any, stored: Status, renewed: Status) -> None:
                held[key].on_renewal(stored, renewed)

            renewal = verbs.renew(self.source, leases, note)
            for key in renewal.lost:
                lease = self.held.pop(key, held[key])
                if not lease.attempt.has_saved_its_outcome:
                    lease.lose()
            self._locked, self._again = renewal.locked, began + _SOON if renewal.locked else math.inf
            if is_for_all:
                self.times += 1
                self.due = began + self.seconds / _SHARE
            if self.is_failing:
                logger.warning("Leases of %s are renewed again.", self)
            self.is_failing = False

    def let_go(self, lease: Lease) -> None:
        key = lease.attempt.claim.row.key
        if self.held.get(key) is lease:  # and not a later attempt on the same row
            del self.held[key]

    def watch(self, key: Any) -> None:
        """Try to renew one soon, and again and again as long as its row is locked."""
        self._locked.add(key)
        self._again = min(self._again, time.monotonic() + _SOON)

    def fail(self, error: Exception) -> None:
        """They could not be renewed, which is told once and tried again."""
        level = logging.DEBUG if self.is_failing else logging.WARNING
        is_of_database = isinstance(error, Error)
        logger.log(
            level,
            "Leases of %s can not be renewed: %s",
            self,
            error,
            exc_info=None if is_of_database else error,
        )
        self.is_failing = True


class Lease:
    """That of one attempt, from the claim until its outcome is about to be written."""

    __slots__ = ("_group", "_is_kept", "_keeper", "_on_loss", "attempt", "on_renewal")

    def __init__(
        self,
        attempt: Attempt[Any],
        keeper: Keeper,
        group: _Group,
        on_loss: OnLoss | None,
        on_renewal: OnRenewal,
    ) -> None:
        self.attempt = attempt
        self.on_renewal = on_renewal
        self._keeper = keeper
        self._group = group
        self._on_loss = on_loss
        #: Is it perhaps renewed just now, or will be?
        self._is_kept = True

    def end(self, seconds: float = -1) -> None:
        """Renew it no more; waits for a renewal that is under way, by default however long that takes.

        Not a second time: a transaction that has locked all of SQLite since then would wait for a renewal of
        others, which waits for it.
        """
        if not self._is_kept:
            return
        group = self._group
        is_ours = group.lock.acquire(timeout=seconds)
        group.let_go(self)
        if is_ours:
            self._is_kept = False
            group.lock.release()
        if not group.held:
            self._keeper.rest()

    @staticmethod
    def end_all(leases: Iterable[Lease]) -> None:
        """Renew these no more; waits for a renewal of each that is under way, see `end`."""
        by_group = defaultdict[_Group, list[Lease]](list)
        for lease in leases:
            if lease._is_kept:
                by_group[lease._group].append(lease)
        for group, some in by_group.items():
            with group.lock:
                for lease in some:
                    group.let_go(lease)
                    lease._is_kept = False
            if not group.held:
                some[0]._keeper.rest()

    def resume(self) -> None:
        """Renew it again, at once: its outcome could not be written yet, and it may be old by now."""
        key = self.attempt.claim.row.key
        if self._group.held.get(key) is self:
            return  # it was not ended
        with self._group.lock:
            self._is_kept = True
            self._group.held.setdefault(key, self)
            self._group.due = 0.0
        self._keeper.look_at(self._group)

    def watch(self) -> None:
        """Renew it only once its row is free: our transaction has locked it, and may end unnoticed."""
        key = self.attempt.claim.row.key
        with self._group.lock:
            self._is_kept = True
            self._group.held.setdefault(key, self)
            self._group.watch(key)
        self._keeper.look_at(self._group)

    def renew(self) -> bool:
        """Have it renewed at once, with those that are renewed together with it; return whether it is held.

        By the keeper, not by this thread: in a transaction of the action it would be rolled back with it.
        """
        if self._is_kept:
            self._keeper.renew_now(self._group)
        return self.attempt.is_held

    def lose(self) -> None:
        """Somebody else has the task, or has changed it: tell the attempt."""
        self.attempt.is_held = False
        logger.info(
            "%s %s: its lease is lost while its action runs.",
            self.attempt.source.model._meta.label,
            self.attempt.claim.row.pk,
        )
        if self._on_loss is not None:
            self._on_loss()


class Keeper:
    """Renews the leases of this process on one database, lest one that does not answer costs those of others.

    Its thread begins with the first lease, or when a connection is reserved. It ends after the last lease,
    and lets go of its connection, unless that is reserved.
    """

    def __init__(self, using: str) -> None:
        self._using = using
        self._groups: dict[tuple[Any, ...], _Group] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        #: Until when the thread waits.
        self._looks_at = 0.0
        #: Has its thread a connection? From its first renewal on it keeps that while it holds a lease, as it
        #: may not get another.
        self._is_connected = False
        #: Does it keep one also while it holds no lease, and before the first renewal?
        self._is_reserved = False
        #: When to look whether it is there still.
        self._check_at = 0.0

    def hold(
        self,
        attempt: Attempt[Any],
        seconds: float,
        on_loss: OnLoss | None = None,
        on_renewal: OnRenewal = lambda stored, renewed: None,
    ) -> Lease:
        """Keep the lease of an attempt alive until `Lease.end`.

        Args:
            seconds: how long a lease holds, from its claim on.
            on_loss: called, in the keeper's thread, when a renewal finds that the lease is lost.
            on_renewal: called, in the keeper's thread, with what stands in the row and what is about to,
                before that is written.
        """
        (lease,) = self.hold_all(attempt.source, [(attempt, on_loss, on_renewal)], seconds)
        return lease

    def hold_all(
        self,
        source: Source[Any],
        attempts: Iterable[tuple[Attempt[Any], OnLoss | None, OnRenewal]],
        seconds: float,
    ) -> list[Lease]:
        """Do so for attempts of one source."""
        key = (source.owner, source.field, source.using, seconds)
        with self._changed:
            self._see_to_thread()  # which fails where the system gives no more, so before there are leases
            group = self._groups.get(key)
            if group is None:
                group = self._groups[key] = _Group(source, seconds)
        leases = [Lease(attempt, self, group, lost, renewed) for attempt, lost, renewed in attempts]
        former = []
        with group.lock:
            if not group.held:
                group.due = time.monotonic() + seconds / _SHARE
            for lease in leases:
                row = lease.attempt.claim.row.key
                if row in group.held:
                    former.append(group.held[row])
                group.held[row] = lease
        for one in former:  # canceled, or recovered, and claimed again: it could not be held any more
            one.lose()
        self.look_at(group)
        return leases

    def reserve(self) -> None:
        """Have a connection from now on: once the actions run, the server may have none left to give."""
        with self._changed:
            if not self._is_reserved:
                self._is_reserved = True
                self._see_to_thread()
                self._changed.notify()

    def rest(self) -> None:
        """Nothing is held in a group: let go of the connection, if nothing is in any other."""
        if self._is_connected and not self._is_reserved:  # else there is nothing to wake up for
            with self._changed:
                self._changed.notify()

    def look_at(self, group: _Group) -> None:
        """See to it that the thread does not miss when a group is due."""
        with self._changed:
            self._see_to_thread()
            if group.next < self._looks_at:
                self._changed.notify()

    def _see_to_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._work, name="modelqueue-leases", daemon=True)
            thread.start()
            self._thread = thread

    def renew_now(self, group: _Group) -> None:
        """Renew the leases of a group, and wait until that is done, but not for long."""
        times = group.times
        with self._changed:
            group.due = 0.0
            self._changed.notify_all()
            self._changed.wait_for(lambda: group.times > times or not group.held, _PATIENCE)

    def _work(self) -> None:
        while self._wait():
            for group in self._due():
                self._is_connected = True
                try:
                    group.renew()
                except Exception as error:
                    group.fail(error)
                    self._close_connections()
            with self._changed:
                self._changed.notify_all()

    def _connect(self) -> None:
        """Have a connection; of one that was idle for long nobody knows whether it is there still."""
        is_old = self._is_connected and time.monotonic() > self._check_at
        if is_old or not self._is_connected:
            self._check_at = time.monotonic() + _LONGEST_REST
        try:
            if is_old and not engine_for(self._using).is_connected():
                self._close_connections()
            connections[self._using].ensure_connection()
        except Exception as error:
            logger.debug("The database %r gives no connection to renew leases: %s", self._using, error)
            self._close_connections()  # of one that does not even tell whether it is there
        else:
            self._is_connected = True

    def _close_connections(self) -> None:
        self._is_connected = False
        with suppress(Exception):  # of one that is dead
            connections.close_all()

    def _wait(self) -> bool:
        """Wait until there is something to do; False: there was nothing for long, so the thread is to end."""
        is_reserved = self._is_reserved
        if is_reserved:
            self._connect()
        with self._changed:
            if (pause := self._pause()) is None and not self._is_reserved:
                self._close_connections()
                self._sleep(_LINGER)
                pause = self._pause()
            if self._is_reserved and not is_reserved:  # meanwhile, so there may be none left soon
                return True
            if pause is None and not self._is_reserved:
                self._thread = None
                return False
            if pause is None:
                pause = _LONGEST_REST if self._is_connected else _LINGER
            self._sleep(pause)
            return True

    def _sleep(self, seconds: float) -> None:
        self._looks_at = time.monotonic() + seconds
        self._changed.wait(min(seconds, threading.TIMEOUT_MAX))
        self._looks_at = 0.0  # it looks by itself before it sleeps again

    def _pause(self) -> float | None:
        due = [group.next for group in self._groups.values() if group.held]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _due(self) -> list[_Group]:
        with self._changed:
            groups = list(self._groups.values())
        return [group for group in groups if group.held and time.monotonic() >= group.next]


_keepers: dict[str, Keeper] = {}
_making = threading.Lock()


def keeper_for(using: str) -> Keeper:
    """Return that of this process for a database alias."""
    if using not in _keepers:
        with _making:
            _keepers.setdefault(using, Keeper(using))
    return _keepers[using]
