"""PostgreSQL: a claim is one statement, and so is one round trip; which errors mean "try again".

::

    WITH picked (pk, status) AS MATERIALIZED (
        SELECT ... WHERE status is waiting and due ORDER BY status, pk LIMIT n
        FOR NO KEY UPDATE SKIP LOCKED
    ),
    claimed AS (
        UPDATE tasks SET status = lease, ... FROM picked
        WHERE tasks.pk = picked.pk AND tasks.status = picked.status RETURNING ...
    )
    SELECT number of those picked, claimed.* FROM ... LEFT JOIN claimed

A trigger may leave rows as they are, without an error. If that has become of all that were picked, the
statement tells it by their number; those behind them are then claimed step by step. (The SELECT around
costs some 8 us of the 120 us that a claim without a durable commit takes; PostgreSQL 18, 26 November 2026.)

What a claim sets besides the status (`modelqueue.claim_values`) is set there, too. What stood there before
comes back by way of ``picked``, as RETURNING gives the new row.

Tasks that are more or less than a row of one table are locked by such a SELECT, loaded, and then updated
together, in one transaction.

Why no two workers get one row: whoever locks it first holds it until the commit, the others skip it, and
who comes after the commit finds another status (PostgreSQL asks the conditions again of a row that has
changed since the statement began). ``MATERIALIZED``, as the planner may otherwise run the subquery once
per row of the table and claim more than n. ``NO KEY``, as the foreign key of a child row that is being
inserted holds a lock that only a full ``FOR UPDATE`` would meet.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

from django.db import models
from django.db.backends.utils import CursorWrapper
from django.db.utils import Error

from modelqueue.claim_values import show
from modelqueue.clock import Clock
from modelqueue.engines import notify, prepared
from modelqueue.engines.base import Engine, WayToClaim
from modelqueue.engines.claims import Candidate, Change, Claim, Overtaken, lease_at
from modelqueue.engines.statements import (
    Columns,
    Unreadable,
    columns_of,
    has_composite_key,
    is_plain,
    is_same_each_time,
    key_names,
    made_before,
    once,
    params_of,
    select_keys,
    select_keys_at_any_time,
    within,
)
from modelqueue.fields import set_loaded
from modelqueue.source import Source
from modelqueue.status import Status

M = TypeVar("M", bound=models.Model)

#: What the sessions of workers are called, before the version.
WORKER = "modelqueue worker "

_TRY_AGAIN = {
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
    "55P03",  # lock_not_available
}
_FULL = "53100"  # disk_full
# libpq's PQTRANS_IDLE and PQTRANS_INERROR, the same in psycopg 2 and 3
_IDLE = 0
_ABORTED = 3

# Rows are found by their keys in an array that another part of the statement makes: of that the planner knows
# nothing, and takes the index of the key. By a join it reads the whole of a table of some ten thousand rows
# or, where all statuses are different by its statistics, the index of the status: then each of 256 tasks that
# have got one lease by one claim is met by all of them (100 us for each task, where 7 do). `+ 0` hides a
# status from that index.

_CLAIM = """
WITH modelqueue_picked (pk, status{names}) AS MATERIALIZED ({keys} FOR NO KEY UPDATE SKIP LOCKED),
modelqueue_claimed AS (
    UPDATE {table} SET {status} = %s + {table}.{status} %% 10{sets}
    WHERE {table}.{key} = ANY(ARRAY(SELECT pk FROM modelqueue_picked))
    AND {table}.{status} + 0 BETWEEN {first} AND {last}
    RETURNING {table}.{key} AS modelqueue_key, {columns}
)
SELECT modelqueue_picked.*, modelqueue_claimed.*
FROM modelqueue_picked LEFT JOIN modelqueue_claimed ON modelqueue_key = modelqueue_picked.pk
"""


_SET_STATUSES = """
WITH modelqueue_given (number, pk, old, new) AS MATERIALIZED (
    SELECT * FROM unnest(%s::integer[], %s::{type}[], %s::bigint[], %s::bigint[])
),
modelqueue_locked (pk, status) AS MATERIALIZED (
    SELECT {table}.{key}, {table}.{status} FROM {table}
    WHERE {table}.{key} = ANY(ARRAY(SELECT pk FROM modelqueue_given))
    FOR NO KEY UPDATE SKIP LOCKED
),
modelqueue_ours (number, pk, old, new) AS MATERIALIZED (
    SELECT modelqueue_given.* FROM modelqueue_given JOIN modelqueue_locked
    ON modelqueue_locked.pk = modelqueue_given.pk AND modelqueue_locked.status = modelqueue_given.old
)
UPDATE {table} SET {status} = modelqueue_ours.new FROM modelqueue_ours
WHERE {table}.{key} = modelqueue_ours.pk AND {table}.{status} + 0 = modelqueue_ours.old
RETURNING modelqueue_ours.number
"""


class _Compiled(NamedTuple):
    """The statement of a claim."""

    sql: str
    #: Of what it selects, see `within`.
    params: tuple[Any, ...]
    columns: Columns[Any]


class PostgreSQLEngine(Engine):
    # Claim

    def _way_to_claim_at_once(self, source: Source[M]) -> WayToClaim[M] | None:
        if has_composite_key(source.model):
            return None
        if source.fixed is None:
            is_row = is_plain(source)
        else:
            is_row = once(self.connection, ("is plain", source.fixed), lambda: is_plain(source))
        return self._claim_and_return if is_row else self._claim_and_load

    def _claim_and_return(self, source: Source[M], clock: Clock, limit: int) -> list[Claim[M]]:
        """Claim tasks that are rows of one table: the statement returns all there is of them."""
        moment, names, is_same = clock(), source.names_set, is_same_each_time(source)
        make = partial(self._compile_claim, source, limit)
        compiled = made_before(self.connection, source, ("claim", limit, *names), make) if is_same else make()
        columns, values_set = compiled.columns, params_of(source.sets.items(), self.connection)
        params = (
            *within(compiled.params, source.any_due(moment)),
            int(lease_at(moment)),
            *values_set,
        )
        # Inside a transaction of the caller a savepoint, so that it can go on after an error. Of psycopg 2
        # what can not be read can not be told apart: the rows of such an answer have to be rolled back.
        own = self.transaction() if self.is_inside_transaction() or self._is_psycopg_2 else nullcontext()
        with own, self.connection.cursor() as cursor:
            if is_same:
                self._execute(cursor, compiled.sql, params)
            else:
                cursor.execute(compiled.sql, params)
            rows = self._fetch(cursor)
        first = 2 + len(names)  # of what is claimed: its key, which is missing of what was picked only
        claims, lease = list[Claim[M]](), lease_at(moment)
        for key, number, *values in _in_order([row for row in rows if row[first] is not None]):
            pk, status = columns.key(key), Status(number)
            before = columns.before(names, values) if names else None
            row = Candidate(pk, pk, status, before)
            lease_of_row = Status(lease + status.attempts)
            claims.append(columns.claim(source, row, lease_of_row, values[first - 1 :]))
        if rows and not claims:  # a trigger has left them as they are, and would do so for ever
            raise Overtaken
        return claims

    def _fetch(self, cursor: CursorWrapper) -> list[tuple[Any, ...]]:
        """Return all rows, each value that can not be read as an `Unreadable`: the claim is committed.

        Python has no time 'infinity', none before Christ, and none after the year 9999.
        """
        try:
            rows: list[tuple[Any, ...]] = cursor.fetchall()
        except Exception:
            if self._is_psycopg_2:
                raise
            rows = list(self._read_one_by_one(cursor))
        return rows

    @property
    def _is_psycopg_2(self) -> bool:
        driver: Any = self.connection
        return bool(driver.Database.__name__ == "psycopg2")

    def _read_one_by_one(self, cursor: CursorWrapper) -> Iterator[tuple[Any, ...]]:
        from psycopg.adapt import Transformer

        result, transformer = cursor.pgresult, Transformer(cursor.cursor)
        columns = range(result.nfields)
        loaders = [transformer.get_loader(result.ftype(place), result.fformat(place)) for place in columns]
        for number in range(result.ntuples):
            yield tuple(
                self._read(loader.load, result.get_value(number, place))
                for place, loader in enumerate(loaders)
            )

    def _read(self, load: Callable[[bytes], Any], value: bytes | None) -> Any:
        if value is None:
            return None
        try:
            with self.connection.wrap_database_errors:
                return load(value)
        except Exception as error:
            return Unreadable(error)

    def _compile_claim(self, source: Source[Any], limit: int) -> _Compiled:
        keys, columns = select_keys_at_any_time(source, limit), columns_of(source)
        quote = self.connection.ops.quote_name
        set_columns = [quote(str(field.column)) for field in source.sets]
        sql = _CLAIM.format(
            names="".join(f", before_{number}" for number in range(len(set_columns))),
            keys=keys.sql,
            sets="".join(f", {column} = %s" for column in set_columns),
            first=Status.minimum("waiting"),
            last=Status.maximum("waiting"),
            table=quote(source.owner._meta.db_table),
            status=quote(str(source.field.column)),
            key=quote(str(source.owner._meta.pk.column)),
            columns=columns.sql,
        )
        return _Compiled(sql, keys.params, columns)

    def _claim_and_load(self, source: Source[M], clock: Clock, limit: int) -> list[Claim[M]]:
        """Claim tasks of any queryset: lock them, load them through it, and set their leases at once."""
        claims: list[Claim[M]] = []
        with self.transaction():
            while len(claims) < limit:  # again, as a join may have picked a row several times
                moment = clock()
                picked = self._pick_and_lock(source, moment, limit - len(claims))
                tasks = self._load(source, picked)
                loaded = [row for row in picked if row.pk in tasks]
                if len(loaded) < len(picked):  # what the queryset joins has changed since
                    raise Overtaken
                if not loaded:
                    break
                self._set_leases(source, loaded, lease_at(moment))
                for row in loaded:
                    lease = lease_at(moment, row.status.attempts)
                    set_loaded(tasks[row.pk], source.field, lease)
                    show(tasks[row.pk], source.sets)
                    claims.append(Claim(row, lease, tasks[row.pk]))
        return claims

    # Outcomes

    def _set_statuses_together(self, source: Source[Any], changes: Sequence[Change]) -> set[Any]:
        meta = source.owner._meta
        quote = self.connection.ops.quote_name

        def make() -> str:
            return _SET_STATUSES.format(
                table=quote(meta.db_table),
                key=quote(str(meta.pk.column)),
                status=quote(str(source.field.column)),
                type=meta.pk.db_type(self.connection),
            )

        sql = once(self.connection, ("set statuses", source.field), make)
        keys = params_of([(meta.pk, change.key) for change in changes], self.connection)
        given = [
            (number, keys[number], int(old), int(change.new))
            for number, change in enumerate(changes)
            for old in change.old
        ]
        with self.connection.cursor() as cursor:
            self._execute(cursor, sql, list(map(_array, zip(*given, strict=True))))
            return {changes[number].key for (number,) in cursor.fetchall()}

    def _pick_and_lock(self, source: Source[Any], moment: dt.datetime, limit: int) -> list[Candidate]:
        keys = select_keys(source, moment, limit)
        sql = f"{keys.sql} FOR NO KEY UPDATE OF {self.connection.ops.quote_name(keys.alias)} SKIP LOCKED"
        with self.connection.cursor() as cursor:
            cursor.execute(sql, keys.params)
            rows = keys.converted(cursor.fetchall())
        place, names = len(key_names(source)), source.names_set
        picked = {}
        for values in rows:  # a join may have picked a row several times
            row = Candidate(values[0], values[place - 1], Status(values[place]))
            picked[row] = row.as_set(names, values[place + 1 :]) if names else row
        return list(picked.values())

    def _execute(self, cursor: CursorWrapper, sql: str, params: Sequence[Any]) -> None:
        prepared.execute(self.connection, cursor, sql, params)

    # New tasks

    can_notify = True

    def create_notify_trigger(self, table: str, column: str) -> list[str]:
        return notify.create_trigger(self.connection, table, column)

    def drop_notify_trigger(self, table: str, column: str) -> list[str]:
        return notify.drop_trigger(self.connection, table, column)

    # Errors and transactions

    def is_try_again(self, error: Error) -> bool:
        return prepared.sqlstate(error) in _TRY_AGAIN

    def is_full(self, error: Error) -> bool:
        return prepared.sqlstate(error) == _FULL

    def name_sessions(self, version: str) -> None:
        # All connections of a process to this database are made from this one dictionary. Not by SET, which
        # would stay in the session of a pooler.
        self.connection.settings_dict["OPTIONS"].setdefault("application_name", WORKER + version)

    def connections_in_use(self) -> tuple[int, int]:
        with self.connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*), current_setting('max_connections')::int FROM pg_stat_activity "
                "WHERE backend_type = 'client backend'"
            )
            used, most = cursor.fetchone()
        return used, most

    def clock_offset(self) -> dt.timedelta | None:
        # Not now(), which is when the transaction began; and the same with and without USE_TZ.
        return self._offset_of("SELECT clock_timestamp() AT TIME ZONE 'UTC'")

    def is_aborted(self) -> bool:
        # Django notes the errors of its own atomic() and save() alone, PostgreSQL refuses after any.
        return super().is_aborted() or self._transaction_status == _ABORTED

    def _is_still_open(self) -> bool:
        return self._transaction_status != _IDLE

    @property
    def _transaction_status(self) -> int:
        connection = self.connection.connection
        # The `info` of psycopg 3 is made anew each time, and its status, too: 1 us for each task.
        status: int = (connection.info if self._is_psycopg_2 else connection.pgconn).transaction_status
        return status

    def _roll_back_open_transaction(self) -> bool:
        connection = self.connection.connection
        if not self._is_still_open():
            return False
        connection.rollback()
        return True


def _in_order(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return rows of keys and statuses in the order of the queue, as RETURNING keeps none."""
    try:
        return sorted(rows, key=lambda row: (row[1], row[0]))
    except TypeError:  # keys without an order, and they are claimed already
        return sorted(rows, key=lambda row: row[1])


def _array(values: Sequence[Any]) -> Any:
    """Return an array of values for the driver: of integers as text, as it takes long to make that."""
    is_text = all(type(value) is int for value in values)
    return "{" + ",".join(map(int.__repr__, values)) + "}" if is_text else list(values)
