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
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from django.db import InterfaceError, OperationalError, connections, models, transaction
from django.db.models import F, Q
from django.db.utils import Error

from modelqueue.fields import set_loaded
from modelqueue.source import Source
from modelqueue.status import Status, shifted

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

__all__ = ["Candidate", "Claim", "Engine", "Verdict"]

M = TypeVar("M", bound=models.Model)
T = TypeVar("T")

#: Seconds for which "try again" errors are retried.
PATIENCE = 30.0

_FIRST_PAGE = 20
_LONGEST_PAGE = 2000
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

    @property
    def connection(self) -> BaseDatabaseWrapper:
        return connections[self.using]

    # Claim

    def claim(self, source: Source[M], now: dt.datetime, limit: int) -> list[Claim[M]]:
        """Take up to `limit` due tasks, those at the head of the queue first.

        After it each of them is working, under a lease that is stamped `now` + 1 ms and that nobody
        else holds. What the queryset itself raises is raised, and nothing is claimed; one row that
        can not be loaded is claimed all the same, see `Claim.error`, lest it block the others.
        """
        claims: list[Claim[M]] = []
        for page in self._pages(source, source.due(now)):
            # First as many as are wanted, since the head of the queue is what should run; where that
            # is taken, ever more at once, since somebody may hold very many rows.
            size = limit
            while page and len(claims) < limit:
                chunk, page, size = page[:size], page[size:], size * 2
                claims += self._claim_among(source, chunk, now, limit - len(claims))
            if len(claims) >= limit:
                break
        return claims

    def _claim_among(
        self, source: Source[M], candidates: list[Candidate], now: dt.datetime, limit: int
    ) -> list[Claim[M]]:
        def claim() -> list[Claim[M]]:
            with self.transaction():
                free = self._lock(source, candidates)[:limit]
                tasks = self._load(source, free)
                claims = []
                for row in free:
                    if row.pk not in tasks:  # edited since it was picked, and no longer the caller's
                        continue
                    lease = Status.working(shifted(now, _MILLISECOND), row.status.attempts)
                    if self.compare_and_set(source, row, row.status, lease):
                        loaded = tasks[row.pk]
                        if isinstance(loaded, Exception):
                            claims.append(Claim[M](row, lease, None, loaded))
                        else:
                            set_loaded(loaded, source.field, lease)
                            claims.append(Claim(row, lease, loaded))
                return claims

        return self.patiently(claim)

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
        for page in self._pages(source, source.expired(cutoff)):
            yield self._recover_among(source, page, judge)

    def _recover_among(
        self, source: Source[M], candidates: list[Candidate], judge: Callable[[Status], Verdict]
    ) -> list[tuple[Candidate, Status]]:
        def recover() -> list[tuple[Candidate, Status]]:
            with self.transaction():
                recovered = []
                for row in self._lock(source, candidates):
                    verdict = judge(row.status)
                    if self.compare_and_set(source, row, row.status, verdict.status, verdict.note):
                        recovered.append((row, verdict.status))
                return recovered

        return self.patiently(recover)

    # Single rows

    def compare_and_set(
        self,
        source: Source[M],
        row: Candidate,
        old: Status | None,
        new: Status | None,
        note: str | None = None,
    ) -> bool:
        """Set the status of a row to `new` if it is `old`; return whether it was.

        Args:
            note: text for the source's error field, written together with the status; None to
                leave it as it is.
        """
        field, error = source.field, source.error_field
        values: dict[str, Any] = {field.name: new}
        elsewhere = None
        if error is not None and note is not None:
            if error.model._meta.concrete_model is source.owner:
                values[error.name] = note
            else:
                elsewhere = error  # the column is in the table of a child or of another parent
        matching = source.owner_rows().filter(Q((field.name, old)), pk=row.key)
        if elsewhere is None:
            return bool(matching.update(**values) == 1)
        with transaction.atomic(using=self.using):
            was_old = bool(matching.update(**values) == 1)
            if was_old:
                source.rows().filter(pk=row.pk).update(**{elsewhere.name: note})
            return was_old

    def read(self, source: Source[M], row: Candidate) -> tuple[bool, Status | None]:
        """Return whether a row exists, and its status."""
        for status in source.owner_rows().filter(pk=row.key).values_list(source.field.name, flat=True):
            return True, None if status is None else Status(status)
        return False, None

    # The steps of a claim and of a recovery

    def _pages(self, source: Source[M], rows: models.QuerySet[M]) -> Iterator[list[Candidate]]:
        """Pick: read candidates in their order, without a lock, a few first and then more at a time."""
        name = source.field.name
        size = _FIRST_PAGE
        page = self.patiently(partial(self._read_page, source, rows, size))
        while page:
            yield list(dict.fromkeys(page))  # a join repeats rows
            if len(page) < size:
                return
            last = page[-1]
            size = min(size * 5, _LONGEST_PAGE)
            beyond = rows.filter(
                Q(**{f"{name}__gt": last.status}) | Q(pk__gt=last.pk), **{f"{name}__gte": last.status}
            )
            page = self.patiently(partial(self._read_page, source, beyond, size))

    def _read_page(self, source: Source[M], rows: models.QuerySet[M], size: int) -> list[Candidate]:
        columns = ["pk", source.field.name]
        if source.owner_key != "pk":
            columns.append(source.owner_key)
        return [
            Candidate(pk, key[0] if key else pk, Status(status))
            for pk, status, *key in rows.values_list(*columns)[:size]
        ]

    def _lock(self, source: Source[M], candidates: list[Candidate]) -> list[Candidate]:
        """Lock, in the owner's table alone, and return the candidates that are free and unchanged."""
        keys = [row.key for row in candidates]
        rows = source.owner_rows().filter(pk__in=keys)
        features = self.connection.features
        if features.has_select_for_update_skip_locked:
            # NO KEY where there is such a thing (PostgreSQL): inserts of child rows, whose foreign
            # keys point to a task, are then neither blocked nor do they hide it.
            rows = rows.select_for_update(skip_locked=True, no_key=features.has_select_for_no_key_update)
        else:
            self._lock_by_writing(source, rows)
        held = dict(rows.values_list("pk", source.field.name))
        return [row for row in candidates if held.get(row.key) == row.status]

    def _lock_by_writing(self, source: Source[M], rows: models.QuerySet[Any]) -> None:
        """Lock rows where SKIP LOCKED is unknown. Waits for whoever holds one, as the database does."""
        rows.update(**{source.field.name: F(source.field.name)})

    def _load(self, source: Source[M], rows: list[Candidate]) -> dict[Any, M | Exception]:
        """Load instances by primary key, through the caller's own queryset."""
        if not rows:
            return {}
        try:
            found = source.queryset.filter(pk__in=[row.pk for row in rows])
            return {task.pk: task for task in found}
        except Error:
            raise
        except Exception as error:
            if len(rows) > 1:
                return {pk: task for row in rows for pk, task in self._load(source, [row]).items()}
            if self._is_loadable(source, rows[0]):
                raise  # so it is the queryset, a prefetch for example, and no fault of the row
            return {rows[0].pk: error}

    def _is_loadable(self, source: Source[M], row: Candidate) -> bool:
        try:
            list(source.rows().filter(pk=row.pk))
        except Error:
            raise
        except Exception:
            return False
        return True

    # Transactions and errors

    def transaction(self) -> transaction.Atomic:
        """Return the context manager for one short transaction of ours."""
        return transaction.atomic(using=self.using)

    def is_try_again(self, error: Error) -> bool:
        """Say whether the database asks to try the same transaction again. The portable engine knows none."""
        return False

    def patiently(self, work: Callable[[], T], reconnect: bool = False) -> T:
        """Do work in a transaction of its own, again while the database says "try again".

        Args:
            reconnect: try again also when the connection was lost. Only for work that may be done
                twice, as the answer that was lost may have been a success.

        After an error of the connection itself the connection is closed, so that the next query
        opens another.
        """
        outer = self.connection.in_atomic_block or not self.connection.get_autocommit()
        deadline = time.monotonic() + PATIENCE
        pause = 0.001
        while True:
            try:
                return work()
            except (OperationalError, InterfaceError) as error:
                if outer:
                    raise
                was_lost = not self.is_try_again(error) and self._discard_broken_connection()
                if not ((was_lost and reconnect) or self.is_try_again(error)) or time.monotonic() > deadline:
                    raise
            self.note_contention()
            time.sleep(random.uniform(pause / 2, pause))  # noqa: S311  (jitter)
            pause = min(pause * 2, 0.5)

    def _discard_broken_connection(self) -> bool:
        if self.connection.connection is None or self.connection.is_usable():
            return self.connection.connection is None
        self.connection.close()
        return True

    def restore_connection(self) -> bool:
        """Make the connection fit for use after code that may have closed, broken or misused it.

        Called outside of transactions only. Returns True if a transaction was found open, and
        rolled back.
        """
        connection = self.connection
        if connection.connection is None:
            return False
        if connection.in_atomic_block:  # an atomic() that was entered and never left
            connection.close()
            connection.connect()
            return True
        if connection.errors_occurred and self._discard_broken_connection():
            return False
        if not connection.get_autocommit():
            connection.rollback()
            connection.set_autocommit(True)
            return True
        return self._roll_back_open_transaction()

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
