"""SQLite: one writer at a time, so take the write lock first, and let others have it afterwards.

A transaction that reads before it writes can not wait for the write lock, it fails at once when
somebody else wrote meanwhile. So ours begin with a write that touches no row; from then on nobody
else can write, and what is read is what will be written to. This works with Django's default options
as well as with ``"transaction_mode": "IMMEDIATE"``.

SQLite hands the lock to whoever happens to ask at the right moment: in a tight loop one process can
starve the others for seconds. Workers that have met each other therefore pause between tasks.
"""

from __future__ import annotations

import datetime as dt
import random
import sqlite3
import time
from itertools import islice
from typing import Any, TypeVar

from django.db import models, transaction
from django.db.utils import Error

from modelqueue.claim_values import show
from modelqueue.clock import Clock
from modelqueue.engines.base import MOST_KEYS, Engine, WayToClaim
from modelqueue.engines.claims import Candidate, Claim, lease_at
from modelqueue.engines.statements import (
    Selection,
    columns_of,
    has_composite_key,
    is_plain,
    select_keys,
    select_tasks,
)
from modelqueue.source import Source
from modelqueue.status import Status

M = TypeVar("M", bound=models.Model)

_BUSY, _LOCKED, _FULL = 5, 6, 13  # the primary result codes SQLITE_BUSY, SQLITE_LOCKED and SQLITE_FULL

#: Seconds for which a worker remembers that there are others.
_DEFAULT_TIMEOUT = 5.0  # of the sqlite3 module
_MEMORY = 5.0
#: Seconds that taking the write lock lasts only if somebody else has it.
_NOTICEABLE = 0.001

_contended_until: dict[str, float] = {}


class SQLiteEngine(Engine):
    locks_by_reading = True

    # Claim

    def _way_to_claim_at_once(self, source: Source[M]) -> WayToClaim[M] | None:
        can = is_plain(source) and not has_composite_key(source.model)
        return self._claim_under_write_lock if can else None

    def _claim_under_write_lock(self, source: Source[M], clock: Clock, limit: int) -> list[Claim[M]]:
        """Claim the first rows, as nobody can change them after they are read.

        Not by one ``UPDATE ... RETURNING``: it can not return the status from before, which giving a task
        back needs.
        """
        # Without a lock first: an idle worker must not keep others from writing.
        if not self._rows(select_keys(source, clock(), 1)):
            return []
        columns = columns_of(source)
        key, status = (columns.names.index(field.attname) for field in (source.model._meta.pk, source.field))
        names = source.names_set
        places = [columns.names.index(name) for name in names]
        claims: list[Claim[M]] = []
        with self.transaction():
            self.take_write_lock(source.field)
            moment = clock()  # after the wait for the lock, which is not the worker's time
            for row in self._rows(select_tasks(source, moment, limit)):
                pk, before = columns.key(row[key]), Status(row[status])
                lease = lease_at(moment, before.attempts)
                found = columns.before(names, [row[place] for place in places]) if names else None
                claim = columns.claim(source, Candidate(pk, pk, before, found), lease, row)
                if claim.task is not None:
                    show(claim.task, source.sets)
                claims.append(claim)
            picked = iter([claim.row for claim in claims])
            while part := list(islice(picked, MOST_KEYS)):
                self._set_leases(source, part, lease_at(moment))
        return claims

    def _rows(self, selection: Selection) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            cursor.execute(selection.sql, selection.params)
            rows: list[tuple[Any, ...]] = cursor.fetchall()
        return rows

    # Transactions and locks

    def transaction(self) -> transaction.Atomic:
        self._began = time.monotonic()
        # From Django 5.1 a transaction may begin by taking the lock.
        mode = getattr(self.connection, "transaction_mode", None)
        self._begins_locked = mode == "IMMEDIATE" and not self.is_inside_transaction()
        return super().transaction()

    def is_try_again(self, error: Error) -> bool:
        return _has_code(error, {_BUSY, _LOCKED}, "is locked")

    def is_full(self, error: Error) -> bool:
        return _has_code(error, {_FULL}, "is full")

    def meets_everybody(self, error: Error) -> bool:
        # There is one lock for all that write.
        return self.is_try_again(error) or super().meets_everybody(error)

    def _lock_by_writing(self, source: Source[Any], rows: models.QuerySet[Any]) -> None:
        self.take_write_lock(source.field)

    def take_write_lock(self, field: models.Field[Any, Any]) -> None:
        if not self._begins_locked:
            quote = self.connection.ops.quote_name
            table, column = quote(field.model._meta.db_table), quote(str(field.column))
            with self.connection.cursor() as cursor:
                cursor.execute(f"UPDATE {table} SET {column} = {column} WHERE 1 = 0")  # noqa: S608
        if time.monotonic() - self._began > _NOTICEABLE:  # in BEGIN IMMEDIATE or in the UPDATE
            self.note_contention()

    def _is_still_open(self) -> bool:
        return bool(self.connection.connection.in_transaction)

    def _roll_back_open_transaction(self) -> bool:
        connection = self.connection.connection
        if not connection.in_transaction:
            return False
        connection.rollback()
        return True

    def note_contention(self) -> None:
        _contended_until[self.using] = time.monotonic() + _MEMORY

    def longest_wait(self) -> dt.timedelta:
        options = self.connection.settings_dict["OPTIONS"]
        return dt.timedelta(seconds=options.get("timeout", _DEFAULT_TIMEOUT))

    def rest(self, seconds: float) -> None:
        # Who waits for the lock looks for it again after up to 100 ms.
        time.sleep(min(seconds, 0.1))

    def give_way(self) -> None:
        if time.monotonic() < _contended_until.get(self.using, 0.0):
            time.sleep(random.uniform(0.001, 0.005))  # noqa: S311  (jitter)


def _has_code(error: Error, codes: set[int], text: str) -> bool:
    """Say whether SQLite has given one of these codes, or has said so where Python does not tell them."""
    cause = error.__cause__
    if not isinstance(cause, sqlite3.OperationalError):
        return False
    code = getattr(cause, "sqlite_errorcode", None)
    if code is None:  # Python 3.10 has the text only
        return text in str(cause)
    return (code & 0xFF) in codes
