"""The portable engine: correct on every database that Django supports.

An engine moves rows of a `Source` from one status to the next, and promises for its writes:

* **compare-and-set**: a row is changed only while it holds the status that was read, in one
  statement, so of two that try it one wins. This alone is the proof of ownership;
* **nobody waits**: rows that somebody else has locked are passed over where the database can
  (SKIP LOCKED), so that one open transaction does not hold up a claim or a recovery;
* **all or nothing**: each call is one short transaction. "Try again" errors of the database are
  retried inside, with jitter, for up to `PATIENCE` seconds; inside an outer transaction they are
  raised at once, since only who began it can begin it again.

A claim has four steps: *pick* candidates without a lock, *lock* those that are free, *load* the
instances, *compare and set* the lease. The order matters: loaded under the lock, an instance is as
new as its claim, and the caller's own filters are asked once more.

A vendor's module overrides what it knows better, under the same names.
"""

from __future__ import annotations

import datetime as dt
import logging
import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, reduce
from operator import or_
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from django.db import IntegrityError, InterfaceError, OperationalError, connections, models, transaction
from django.db.models import F, Q
from django.db.utils import Error

from modelqueue.clock import Clock
from modelqueue.fields import set_loaded
from modelqueue.source import Source
from modelqueue.status import Status, priority_to_datetime, shifted

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

__all__ = ["Candidate", "Claim", "Engine", "Verdict"]

M = TypeVar("M", bound=models.Model)
T = TypeVar("T")

logger = logging.getLogger("modelqueue")

#: Seconds for which "try again" errors are retried.
PATIENCE = 30.0

_FIRST_PAGE = 20
_LONGEST_PAGE = 2000
#: Other rows of which one has to load before a row is held responsible for not loading.
_WITNESSES = 10
_MILLISECOND = dt.timedelta(milliseconds=1)


class Candidate(NamedTuple):
    """A row that could be claimed or recovered, as it was read without a lock."""

    pk: Any
    #: Its primary key in the owner's table, see `Source.owner`.
    key: Any
    status: Status


@dataclass(frozen=True)
class Claim(Generic[M]):
    """A task that is ours until its lease expires."""

    row: Candidate
    """The row as it was before the claim, waiting."""
    lease: Status
    task: M | None
    """The instance, or None where the row could not be turned into one."""
    error: Exception | None = None
    """Why it could not."""


class Verdict(NamedTuple):
    """What becomes of an expired task."""

    status: Status
    #: The text for the error field.
    note: str


class Engine:
    """What can be done with the rows of a source on one database, see the module."""

    def __init__(self, using: str) -> None:
        self.using = using
        self._has_lost_connection = False

    @property
    def connection(self) -> BaseDatabaseWrapper:
        return connections[self.using]

    # Claim

    def claim(self, source: Source[M], clock: Clock, limit: int) -> list[Claim[M]]:
        """Take up to `limit` due tasks, those at the head of the queue first.

        After it each of them is working, under a lease that is stamped 1 ms after the moment of the
        claim and that nobody else holds. What the queryset itself raises is raised, and nothing is
        claimed. One row must not block the others: one that can not be loaded is claimed all the same,
        see `Claim.error`; one that a constraint of its table keeps from working is passed over.
        """
        claims: list[Claim[M]] = []
        for page in self._pages(source, partial(source.due, clock())):
            # First as many as are wanted, since the head of the queue is what should run; where that
            # is taken, ever more at once, since somebody may hold very many rows.
            size = limit
            while page and len(claims) < limit:
                chunk, page, size = page[:size], page[size:], size * 2
                claims += self._claim_among(source, chunk, clock, limit - len(claims))
            if len(claims) >= limit:
                break
        return claims

    def _claim_among(
        self, source: Source[M], candidates: list[Candidate], clock: Clock, limit: int
    ) -> list[Claim[M]]:
        try:
            return self.patiently(partial(self._claim_together, source, candidates, clock, limit))
        except Exception as error:
            if self._is_of_the_database_itself(error):
                raise
            # A row, or the queryset: find out which.
            return self.patiently(partial(self._claim_one_by_one, source, candidates, clock, limit))

    def _claim_together(
        self, source: Source[M], candidates: list[Candidate], clock: Clock, limit: int
    ) -> list[Claim[M]]:
        with self.transaction():
            free = self._lock(source, candidates)[:limit]
            tasks = self._load(source, free)
            claims = [self._claim_row(source, row, tasks.get(row.pk), clock) for row in free]
            return [claim for claim in claims if claim is not None]

    def _claim_one_by_one(
        self, source: Source[M], candidates: list[Candidate], clock: Clock, limit: int
    ) -> list[Claim[M]]:
        claims: list[Claim[M]] = []
        with self.transaction():
            for row in self._lock(source, candidates):
                try:
                    with transaction.atomic(using=self.using):
                        task = self._load_one(source, row)
                        claim = self._claim_row(source, row, task, clock)
                except IntegrityError as error:
                    logger.warning("%s %s can not be claimed: %s", source.model._meta.label, row.pk, error)
                    continue
                if claim is not None:
                    claims.append(claim)
                if len(claims) >= limit:
                    break
        return claims

    def _claim_row(
        self, source: Source[M], row: Candidate, loaded: M | Exception | None, clock: Clock
    ) -> Claim[M] | None:
        if loaded is None:  # edited since it was picked, and no longer the caller's
            return None
        # Now, not when it was picked: the time that was spent waiting is not the worker's. And later than
        # any time before it, also if the clock was set back.
        moment = clock()
        waiting_since = priority_to_datetime(row.status.priority)
        if waiting_since is not None and waiting_since > moment:
            moment = waiting_since
        lease = Status.working(shifted(moment, _MILLISECOND), row.status.attempts)
        if not self.compare_and_set(source, row, [row.status], lease):
            return None
        if isinstance(loaded, Exception):
            return Claim(row, lease, None, loaded)
        set_loaded(loaded, source.field, lease)
        return Claim(row, lease, loaded)

    # Recovery

    def recover(
        self, source: Source[M], cutoff: dt.datetime, judge: Callable[[Status], Verdict]
    ) -> Iterator[list[tuple[Candidate, Status]]]:
        """Take back all tasks whose lease is from `cutoff` or before, a page at a time.

        Args:
            judge: gets an expired lease, says what becomes of its task.

        Yields:
            For each page, once it is committed: the expired rows that were recovered, each with its
            new status. Rows that somebody has locked are left for the next time.
        """
        for page in self._pages(source, partial(source.expired, cutoff)):
            yield self._recover_among(source, page, judge)

    def _recover_among(
        self, source: Source[M], candidates: list[Candidate], judge: Callable[[Status], Verdict]
    ) -> list[tuple[Candidate, Status]]:
        try:
            return self.patiently(partial(self._recover_together, source, candidates, judge))
        except Exception as error:
            if self._is_of_the_database_itself(error):
                raise
            return self.patiently(partial(self._recover_one_by_one, source, candidates, judge))

    def _recover_together(
        self, source: Source[M], candidates: list[Candidate], judge: Callable[[Status], Verdict]
    ) -> list[tuple[Candidate, Status]]:
        recovered = []
        with self.transaction():
            for row in self._lock(source, candidates, with_error_field=True):
                verdict = judge(row.status)
                if self.compare_and_set(source, row, [row.status], verdict.status, verdict.note):
                    recovered.append((row, verdict.status))
        return recovered

    def _recover_one_by_one(
        self, source: Source[M], candidates: list[Candidate], judge: Callable[[Status], Verdict]
    ) -> list[tuple[Candidate, Status]]:
        recovered = []
        for row in candidates:
            try:
                recovered += self._recover_together(source, [row], judge)
            except IntegrityError as error:  # left for the next time
                logger.warning("%s %s can not be recovered: %s", source.model._meta.label, row.pk, error)
        return recovered

    # Single rows

    def compare_and_set(
        self,
        source: Source[M],
        row: Candidate,
        old: Collection[Status | None],
        new: Status | None,
        note: str | None = None,
    ) -> bool:
        """Set the status of a row to `new` if it is one of `old`; return whether it was.

        Args:
            note: text for the source's error field, written together with the status; None to
                leave it as it is.
        """
        field, error = source.field, source.error_field
        values: dict[str, Any] = {field.name: new}
        if error is not None and note is not None and not source.has_error_field_elsewhere:
            values[error.name] = note
        is_old = reduce(or_, (Q((field.name, status)) for status in old))
        matching = source.owner_rows().filter(is_old, pk=row.key)
        if error is None or note is None or not source.has_error_field_elsewhere:
            return bool(matching.update(**values) == 1)
        with transaction.atomic(using=self.using):
            was_old = bool(matching.update(**values) == 1)
            if was_old:
                source.rows().filter(pk=row.pk).update(**{error.name: note})
            return was_old

    def read(self, source: Source[M], row: Candidate) -> tuple[bool, Status | None]:
        """Return whether a row exists, and its status."""
        for status in source.owner_rows().filter(pk=row.key).values_list(source.field.name, flat=True):
            return True, None if status is None else Status(status)
        return False, None

    # The steps of a claim and of a recovery

    def _pages(
        self, source: Source[M], rows_from: Callable[[int | None], models.QuerySet[M]]
    ) -> Iterator[list[Candidate]]:
        """Pick: read candidates in their order, without a lock, a few first and then more at a time.

        Args:
            rows_from: gives the rows from a status on. (The bound is replaced from page to page, not
                added to: SQLite seeks to the first of two, and would read each page from the head.)
        """
        name = source.field.name
        size = _FIRST_PAGE
        page = self.patiently(partial(self._read_page, source, rows_from(None), size))
        while page:
            yield list(dict.fromkeys(page))  # a join repeats rows
            if len(page) < size:
                return
            last = page[-1]
            size = min(size * 5, _LONGEST_PAGE)
            rows = rows_from(last.status).filter(Q(**{f"{name}__gt": last.status}) | Q(pk__gt=last.pk))
            page = self.patiently(partial(self._read_page, source, rows, size))

    def _read_page(self, source: Source[M], rows: models.QuerySet[M], size: int) -> list[Candidate]:
        columns = ["pk", source.field.name]
        if source.owner_key != "pk":
            columns.append(source.owner_key)
        return [
            Candidate(pk, key[0] if key else pk, Status(status))
            for pk, status, *key in rows.values_list(*columns)[:size]
        ]

    def _lock(
        self, source: Source[M], candidates: list[Candidate], with_error_field: bool = False
    ) -> list[Candidate]:
        """Lock, in the owner's table alone, and return the candidates that are free and unchanged.

        Args:
            with_error_field: lock the row of the error field too, where it is in another table.
        """
        keys = [row.key for row in candidates]
        rows = source.owner_rows().filter(pk__in=keys)
        features = self.connection.features
        if features.has_select_for_update_skip_locked:
            rows = self._skipping_locked(rows)
        else:
            self._lock_by_writing(source, rows)
        held = dict(rows.values_list("pk", source.field.name))
        free = [row for row in candidates if held.get(row.key) == row.status]
        return self._lock_errors(source, free) if with_error_field else free

    def _lock_errors(self, source: Source[M], candidates: list[Candidate]) -> list[Candidate]:
        """Lock the rows of the error field where they are in another table; return the free candidates."""
        features = self.connection.features
        if not source.has_error_field_elsewhere or not features.has_select_for_update_skip_locked:
            return candidates
        keys = source.keys_of_errors([row.pk for row in candidates])
        rows = source.error_rows().filter(pk__in=keys.values())
        writable = set(self._skipping_locked(rows).values_list("pk", flat=True))
        return [row for row in candidates if keys.get(row.pk) in writable]

    def _skipping_locked(self, rows: models.QuerySet[Any]) -> models.QuerySet[Any]:
        # NO KEY where there is such a thing (PostgreSQL): inserts of child rows, whose foreign keys point
        # to a task, are then neither blocked nor do they hide it.
        no_key = self.connection.features.has_select_for_no_key_update
        return rows.select_for_update(skip_locked=True, no_key=no_key)

    def _lock_by_writing(self, source: Source[M], rows: models.QuerySet[Any]) -> None:
        """Lock rows where SKIP LOCKED is unknown. Waits for whoever holds one, as the database does."""
        rows.update(**{source.field.name: F(source.field.name)})

    def take_write_lock(self, field: models.Field[Any, Any]) -> None:
        """Begin a transaction that reads before it writes; of use where there is one writer at a time."""

    def lock_other_tables(self, source: Source[M], task: M) -> None:
        """Lock the rows of an inherited model in its other tables, lest somebody edits what is saved next."""
        if self.connection.features.has_select_for_update:
            for model in {field.model for field in task._meta.concrete_fields} - {source.owner}:
                rows: models.QuerySet[Any] = models.QuerySet(model, using=self.using)
                rows = rows.order_by().select_for_update()
                list(rows.filter(pk=getattr(task, str(model._meta.pk.attname))).values_list("pk"))

    def _load(self, source: Source[M], rows: list[Candidate]) -> dict[Any, M]:
        """Load instances by primary key, through the caller's own queryset."""
        if not rows:
            return {}
        found = source.queryset.filter(pk__in=[row.pk for row in rows])
        return {task.pk: task for task in found}

    def _load_one(self, source: Source[M], row: Candidate) -> M | Exception | None:
        """Load one instance, or return why that can not be done if it is the fault of this row."""
        task = self._try_to_load(source, row.pk)
        if not isinstance(task, Exception):
            return task
        # Another one that loads proves that it is not the queryset, its prefetch_related() for example.
        others = list(source.queryset.exclude(pk=row.pk).order_by().values_list("pk")[:_WITNESSES])
        if any(isinstance(self._try_to_load(source, pk), source.model) for (pk,) in others):
            return task
        if isinstance(self._try_to_load(source, row.pk, source.rows()), Exception):
            return task
        raise task

    def _try_to_load(
        self, source: Source[M], pk: Any, rows: models.QuerySet[M] | None = None
    ) -> M | Exception | None:
        queryset = source.queryset if rows is None else rows
        try:
            with transaction.atomic(using=self.using):
                return next(iter(queryset.filter(pk=pk)), None)
        except Exception as error:
            if self._is_of_the_database_itself(error):
                raise
            return error

    # Transactions and errors

    def transaction(self) -> transaction.Atomic:
        """Return the context manager for one short transaction of ours."""
        return transaction.atomic(using=self.using)

    def is_try_again(self, error: Error) -> bool:
        """Say whether the database asks to try the same transaction again. The portable engine knows none."""
        return False

    def is_to_be_tried_again(self, error: BaseException) -> bool:
        return isinstance(error, Error) and self.is_try_again(error)

    def patiently(self, work: Callable[[], T], reconnect: bool = False) -> T:
        """Do work in a transaction of its own, again while the database says "try again".

        Args:
            reconnect: try again also when the connection was lost. Only for work that may be done
                twice, as the answer that was lost may have been a success.

        After an error of the connection itself the connection is closed, so that the next query
        opens another.
        """
        deadline = time.monotonic() + PATIENCE
        pause = 0.001
        while True:
            is_outer, session = self.is_inside_transaction(), None
            try:
                self.connection.ensure_connection()
                session = self.connection.connection
                return work()
            except (OperationalError, InterfaceError) as error:
                if is_outer:
                    raise
                was_lost = not self.is_try_again(error) and self._has_lost(session)
                self._has_lost_connection = was_lost
                if not ((was_lost and reconnect) or self.is_try_again(error)) or time.monotonic() > deadline:
                    raise
            self.note_contention()
            time.sleep(random.uniform(pause / 2, pause))  # noqa: S311  (jitter)
            pause = min(pause * 2, 0.5)

    def is_inside_transaction(self) -> bool:
        """Say whether a transaction of the caller is open; asks nothing of the database."""
        connection = self.connection
        if connection.connection is None and not connection.in_atomic_block:
            return not connection.settings_dict["AUTOCOMMIT"]
        return connection.in_atomic_block or not connection.autocommit

    def _has_lost(self, session: Any) -> bool:
        """Say whether the connection to the database is another one than `session`, or none."""
        # On its way out of a transaction Django has opened another where it found the first one broken.
        return session is None or self.connection.connection is not session or self._close_if_broken()

    def _is_of_the_database_itself(self, error: Exception) -> bool:
        """Say whether an error is no fault of a row or a queryset, but of the connection or a lock."""
        if not isinstance(error, (OperationalError, InterfaceError)):
            return False
        return self.is_try_again(error) or self._has_lost_connection

    def _close_if_broken(self) -> bool:
        if self.connection.is_usable():
            return False
        self._throw_connection_away()
        return True

    def restore_connection(self) -> bool:
        """Make the connection fit for use after code that may have closed, broken or misused it.

        Called outside of transactions only. Returns True if a transaction was found open, and
        rolled back.
        """
        if self.connection.connection is None:
            return False
        was_open = self.is_inside_transaction()
        try:
            return self._restore_connection()
        except Exception:  # it is dead, and whatever was open on it was rolled back by the server
            self._throw_connection_away()
            return was_open

    def _restore_connection(self) -> bool:
        connection = self.connection
        if connection.in_atomic_block:  # an atomic() that was entered and never left
            connection.close()
            connection.connect()
            return True
        if not connection.get_autocommit():
            connection.rollback()
            connection.set_autocommit(True)
            return True
        if connection.errors_occurred and self._close_if_broken():
            return False
        return self._roll_back_open_transaction()

    def _throw_connection_away(self) -> None:
        connection = self.connection
        with suppress(Exception):  # even that asks the server
            connection.close()
        # Django keeps it until the end of an atomic(), which will not come.
        connection.connection, connection.in_atomic_block = None, False

    def _roll_back_open_transaction(self) -> bool:
        """Roll back what was begun by a BEGIN of the action's own; return whether there was such a thing."""
        connection = self.connection.connection
        connection.rollback()
        return False

    # Fairness

    def note_contention(self) -> None:
        """Remember that other workers want this database, too."""

    def give_way(self) -> None:
        """Let other workers come to their turn; called after a task, outside of transactions."""
