"""Databases that lock rows for a SELECT, or have one writer at a time: a claim locks and loads by one SELECT.

Why no two workers get one row: what is read is locked, on SQLite by the lock of the only writer, elsewhere
by ``FOR UPDATE SKIP LOCKED``. Nobody can change it before the UPDATE, which compares all the same: SKIP
LOCKED alone is no proof, as a Galera cluster hands one row to two nodes. (There the commit of one fails,
and is tried again.)
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import Any, TypeVar

from django.db import models

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

__all__ = ["LockingEngine"]

M = TypeVar("M", bound=models.Model)


class Overtaken(Exception):  # noqa: N818
    """A row has changed although it was locked."""


class LockingEngine(Engine):
    """For databases that have the one lock or the other; without one the portable way is taken."""

    #: What a SELECT ends with that locks what it reads.
    lock = "FOR UPDATE SKIP LOCKED"

    def _way_to_claim_at_once(self, source: Source[M]) -> WayToClaim[M] | None:
        can = is_plain(source) and not has_composite_key(source.model) and self._has_lock()
        return self._claim_locked if can else None

    def _has_lock(self) -> bool:
        return bool(self.connection.features.has_select_for_update_skip_locked)

    def _claim_locked(self, source: Source[M], clock: Clock, limit: int) -> list[Claim[M]]:
        # Without a lock first: an idle worker must not keep others from writing.
        if not self._rows(select_keys(source, clock(), 1)):
            return []
        columns = columns_of(source)
        key, status = (columns.names.index(field.attname) for field in (source.model._meta.pk, source.field))
        with self.transaction():
            self.take_write_lock(source.field)
            moment = clock()  # after the wait for the lock, which is not the worker's time
            rows = self._rows(select_tasks(source, moment, limit), self.lock)
            picked = iter([(row[key], row[status]) for row in rows])
            while part := dict(islice(picked, MOST_KEYS)):
                self._set_leases(source, part, lease_at(moment))
        claims = []
        for row in rows:
            candidate = Candidate(row[key], row[key], Status(row[status]))
            claims.append(columns.claim(source, candidate, lease_at(moment, candidate.status.attempts), row))
        return claims

    def _rows(self, selection: Selection, lock: str = "") -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            cursor.execute(f"{selection.sql} {lock}", selection.params)
            rows: list[tuple[Any, ...]] = cursor.fetchall()
        return rows

    def _set_leases(self, source: Source[Any], rows: dict[Any, int], lease: Status) -> None:
        """Compare and set all rows at once, or none: `rows` are the statuses by primary key."""
        quote = self.connection.ops.quote_name
        status, key = quote(str(source.field.column)), quote(str(source.model._meta.pk.column))
        statuses = set(rows.values())
        sql = (
            f"UPDATE {quote(source.model._meta.db_table)} SET {status} = %s + {status} %% 10 "  # noqa: S608
            f"WHERE {key} IN ({_placeholders(rows)}) AND {status} IN ({_placeholders(statuses)})"
        )
        with self.connection.cursor() as cursor:
            cursor.execute(sql, (int(lease), *rows, *statuses))
            if cursor.rowcount != len(rows):
                raise Overtaken


def _placeholders(values: Collection[Any]) -> str:
    return ", ".join(["%s"] * len(values))
