"""SQLite: one writer at a time, so take the write lock first, and let others have it afterwards.

A transaction that reads before it writes can not wait for the write lock, it fails at once when
somebody else wrote meanwhile. So ours begin with a write that touches no row; from then on nobody
else can write, and what is read is what will be written to. This works with Django's default options
as well as with ``"transaction_mode": "IMMEDIATE"``.

SQLite hands the lock to whoever happens to ask at the right moment: in a tight loop one process can
starve the others for seconds. Workers that have met each other therefore pause between tasks.
"""

from __future__ import annotations

import random
import sqlite3
import time
from typing import Any

from django.db import models, transaction
from django.db.utils import Error

from modelqueue.engines.locking import LockingEngine
from modelqueue.source import Source

_BUSY, _LOCKED = 5, 6  # the primary result codes SQLITE_BUSY and SQLITE_LOCKED

#: Seconds for which a worker remembers that there are others.
_MEMORY = 5.0
#: Seconds that taking the write lock lasts only if somebody else has it.
_NOTICEABLE = 0.001

_contended_until: dict[str, float] = {}


class SQLiteEngine(LockingEngine):
    lock = ""  # the whole database is locked by then

    def _has_lock(self) -> bool:
        return True

    def transaction(self) -> transaction.Atomic:
        self._began = time.monotonic()
        # From Django 5.1 a transaction may begin by taking the lock.
        mode = getattr(self.connection, "transaction_mode", None)
        self._begins_locked = mode == "IMMEDIATE" and not self.is_inside_transaction()
        return super().transaction()

    def is_try_again(self, error: Error) -> bool:
        cause = error.__cause__
        if not isinstance(cause, sqlite3.OperationalError):
            return False
        code = getattr(cause, "sqlite_errorcode", None)
        if code is None:  # Python 3.10 has the text only
            return "is locked" in str(cause)
        return (code & 0xFF) in (_BUSY, _LOCKED)

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

    def _roll_back_open_transaction(self) -> bool:
        connection = self.connection.connection
        if not connection.in_transaction:
            return False
        connection.rollback()
        return True

    def note_contention(self) -> None:
        _contended_until[self.using] = time.monotonic() + _MEMORY

    def give_way(self) -> None:
        if time.monotonic() < _contended_until.get(self.using, 0.0):
            time.sleep(random.uniform(0.001, 0.005))  # noqa: S311  (jitter)
