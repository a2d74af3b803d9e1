"""PostgreSQL: a claim is one statement, and so is one round trip; which errors mean "try again".

::

    WITH picked (pk, status) AS MATERIALIZED (
        SELECT ... WHERE status is waiting and due ORDER BY status, pk LIMIT n
        FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE tasks SET status = lease FROM picked
    WHERE tasks.pk = picked.pk AND tasks.status = picked.status RETURNING ...

Why no two workers get one row: whoever locks it first holds it until the commit, the others skip it, and
who comes after the commit finds another status (PostgreSQL asks the conditions again of a row that has
changed since the statement began). ``MATERIALIZED``, as the planner may otherwise run the subquery once
per row of the table and claim more than n. ``NO KEY``, as the foreign key of a child row that is being
inserted holds a lock that only a full ``FOR UPDATE`` would meet.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

from django.db import models
from django.db.backends.utils import CursorWrapper
from django.db.utils import Error

from modelqueue.clock import Clock
from modelqueue.engines import prepared
from modelqueue.engines.base import Engine, WayToClaim
from modelqueue.engines.claims import Candidate, Claim, lease_at
from modelqueue.engines.statements import (
    Selection,
    columns_of,
    has_composite_key,
    is_plain,
    key_names,
    once,
    select_keys,
)
from modelqueue.fields import set_loaded
from modelqueue.source import Source
from modelqueue.status import Status

M = TypeVar("M", bound=models.Model)

_TRY_AGAIN = {
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
    "55P03",  # lock_not_available
}
# libpq's PQTRANS_IDLE and PQTRANS_INERROR, the same in psycopg 2 and 3
_IDLE = 0
_ABORTED = 3

_CLAIM = """
WITH picked ({names}) AS MATERIALIZED ({keys} FOR NO KEY UPDATE OF {alias} SKIP LOCKED)
UPDATE {table} SET {status} = %s + picked.status %% 10 FROM picked
WHERE {table}.{key} = picked.{picked_key} AND {table}.{status} = picked.status
RETURNING {returning}
"""


class PostgreSQLEngine(Engine):
    # Claim

    def _way_to_claim_at_once(self, source: Source[M]) -> WayToClaim[M] | None:
        if has_composite_key(source.model):
            return None
        return self._claim_and_return if is_plain(source) else self._claim_and_load

    def _claim_and_return(self, source: Source[M], clock: Clock, limit: int) -> list[Claim[M]]:
        """Claim tasks that are rows of one table: the statement returns all there is of them."""
        moment, columns = clock(), columns_of(source)
        keys = select_keys(source, moment, limit)
        # Inside a transaction of the caller a savepoint, so that it can go on after an error.
        with self.transaction() if self.is_inside_transaction() else nullcontext():
            rows = self._claimed_rows(source, keys, moment, columns.sql)
        lease = lease_at(moment)
        claims: list[Claim[M]] = []
        for pk, number, *values in rows:
            status = Status(number)
            row = Candidate(pk, pk, status)
            claims.append(columns.claim(source, row, Status(lease + status.attempts), values))
        return _in_order(claims)

    def _claim_and_load(self, source: Source[M], clock: Clock, limit: int) -> list[Claim[M]]:
        """Claim tasks of any queryset, and load them through it before the commit."""
        claims: list[Claim[M]] = []
        gone: list[tuple[Candidate, Status]] = []
        with self.transaction():
            while len(claims) < limit:  # again, as a join may have picked a row several times
                moment = clock()
                keys = select_keys(source, moment, limit - len(claims))
                picked = keys.converted(self._claimed_rows(source, keys, moment))
                rows = [Candidate(pk, key[0] if key else pk, Status(status)) for pk, *key, status in picked]
                tasks = self._load(source, rows)
                for row in rows:
                    task, lease = tasks.get(row.pk), lease_at(moment, row.status.attempts)
                    if task is None:
                        gone.append((row, lease))
                    else:
                        set_loaded(task, source.field, lease)
                        claims.append(Claim(row, lease, task))
                if not rows:
                    break
            for row, lease in gone:  # edited since they were picked, and no longer the caller's
                self.compare_and_set(source, row, [lease], row.status)
        return _in_order(claims)

    def _claimed_rows(
        self, source: Source[Any], keys: Selection, moment: dt.datetime, columns: str = ""
    ) -> list[tuple[Any, ...]]:
        params = (*keys.params, int(lease_at(moment)))
        with self.connection.cursor() as cursor:
            if source.queryset.query.where:  # with parameters of the caller's own
                cursor.execute(self._claim_sql(source, keys, columns), params)
            else:
                key = ("claim", source.field, keys.sql, columns)
                sql = once(self.connection, key, lambda: self._claim_sql(source, keys, columns))
                self._execute(cursor, sql, params)
            rows: list[tuple[Any, ...]] = cursor.fetchall()
        return rows

    def _claim_sql(self, source: Source[Any], keys: Selection, columns: str) -> str:
        quote = self.connection.ops.quote_name
        names = (*("pk", "key")[: len(key_names(source))], "status")
        picked = ", ".join(f"picked.{name}" for name in names)
        return _CLAIM.format(
            names=", ".join(names),
            keys=keys.sql,
            alias=quote(keys.alias),
            table=quote(source.owner._meta.db_table),
            status=quote(str(source.field.column)),
            key=quote(str(source.owner._meta.pk.column)),
            picked_key=names[-2],
            returning=f"{picked}, {columns}" if columns else picked,
        )

    def _execute(self, cursor: CursorWrapper, sql: str, params: Sequence[Any]) -> None:
        prepared.execute(self.connection, cursor, sql, params)

    # Errors and transactions

    def is_try_again(self, error: Error) -> bool:
        return prepared.sqlstate(error) in _TRY_AGAIN

    def is_aborted(self) -> bool:
        # Django notes the errors of its own atomic() and save() alone, PostgreSQL refuses after any.
        return super().is_aborted() or self.connection.connection.info.transaction_status == _ABORTED

    def _roll_back_open_transaction(self) -> bool:
        connection = self.connection.connection
        if connection.info.transaction_status == _IDLE:
            return False
        connection.rollback()
        return True


def _in_order(claims: list[Claim[M]]) -> list[Claim[M]]:
    # RETURNING keeps no order.
    return sorted(claims, key=lambda claim: (claim.row.status, claim.row.pk))
