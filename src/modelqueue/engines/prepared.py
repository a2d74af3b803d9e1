"""Statements that PostgreSQL plans once per session instead of each time.

To plan a claim costs PostgreSQL more than to do it: a claim and its commit took 556 us, of which 276 us
were saved by preparing it (PostgreSQL 18, a table of 3,000 rows, durable commits; 25 November 2026).

Behind a pooler a session may become another one between two statements, and what is prepared there may be
somebody else's. So the name of a prepared statement is made of its text: whoever prepared it, it does the
same. Where the session does not have it, the statement is sent as it is, and prepared anew next time.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Sequence
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper
from django.db.utils import Error

from modelqueue import conf

__all__ = ["execute", "sqlstate"]

#: How often a session sends a statement before it is worth to be prepared.
_WORTH_IT = 1
#: Seconds after which a plan is made anew, as it may have been made for a table that was empty then: the
#: first one, and at most, as each next one lasts twice as long. (After ANALYZE the server does so by itself.)
_FIRST, _LONGEST = 10.0, 600.0
#: Statements of a session that are remembered: some may have ever new texts, which would fill the memory.
_MOST = 200

_UNKNOWN = "26000"  # invalid_sql_statement_name
_KNOWN = "42P05"  # duplicate_prepared_statement
_OUTDATED = "0A000"  # feature_not_supported: the type of a returned column has changed
_IMPOSSIBLE = "42"  # syntax errors: parameters that the driver binds on the server have no place in EXECUTE


class _Use:
    """How a session uses a statement: how often it was sent, and since when it is prepared."""

    def __init__(self) -> None:
        self.times = 0
        self.since: float | None = None
        self.lasts = _FIRST
        self.is_impossible = False

    @property
    def is_worth_it(self) -> bool:
        return self.times > _WORTH_IT and not self.is_impossible


def execute(connection: BaseDatabaseWrapper, cursor: CursorWrapper, sql: str, params: Sequence[Any]) -> None:
    """Execute a statement, prepared if this session has sent it before.

    The types of all parameters have to be clear from the statement. Inside a transaction it is sent as it
    is, since an error would end that.
    """
    use = _use(connection, sql)
    if use is None:
        cursor.execute(sql, params)
        return
    use.times += 1
    is_inside = connection.in_atomic_block or not connection.get_autocommit()
    if is_inside or not use.is_worth_it or not conf.get("PREPARED_STATEMENTS"):
        cursor.execute(sql, params)
        return
    name = _name(sql)
    try:
        if use.since is not None and time.monotonic() - use.since > use.lasts:
            _forget(cursor, name)
            use.since, use.lasts = None, min(2 * use.lasts, _LONGEST)
        if use.since is None:
            _prepare(cursor, name, sql, params)
            use.since = time.monotonic()
        if all(isinstance(value, int) and not isinstance(value, bool) for value in params):
            # As text: the driver takes long to make that.
            cursor.execute(f"EXECUTE {name} ({', '.join(map(int.__repr__, params))})")
        else:
            cursor.execute(f"EXECUTE {name} ({', '.join(['%s'] * len(params))})", params)
    except Error as error:
        state = sqlstate(error) or ""
        use.is_impossible = state.startswith(_IMPOSSIBLE)
        if state not in (_UNKNOWN, _OUTDATED) and not use.is_impossible:
            raise
        if state == _OUTDATED:
            _forget(cursor, name)
        use.since = None
        cursor.execute(sql, params)


def _use(connection: BaseDatabaseWrapper, sql: str) -> _Use | None:
    """Return how the session uses a statement; None: it knows so many that this one is sent as it is."""
    session: Any
    uses: dict[str, _Use]
    session, uses = vars(connection).get("_modelqueue_prepared", (None, {}))
    if session is not connection.connection:
        uses = {}
        vars(connection)["_modelqueue_prepared"] = connection.connection, uses
    return uses.setdefault(sql, _Use()) if sql in uses or len(uses) < _MOST else None


@functools.lru_cache(maxsize=1000)
def _name(sql: str) -> str:
    return "modelqueue_" + hashlib.sha256(sql.encode()).hexdigest()[:32]


def _prepare(cursor: CursorWrapper, name: str, sql: str, params: Sequence[Any]) -> None:
    numbered = sql % tuple(f"${number}" for number in range(1, len(params) + 1))
    try:
        cursor.execute(f"PREPARE {name} AS {numbered}")
    except Error as error:
        if sqlstate(error) != _KNOWN:
            raise


def _forget(cursor: CursorWrapper, name: str) -> None:
    try:
        cursor.execute(f"DEALLOCATE {name}")
    except Error as error:
        if sqlstate(error) != _UNKNOWN:
            raise


def sqlstate(error: Error) -> str | None:
    """Return the code of an error of PostgreSQL."""
    # psycopg 3 calls it sqlstate, psycopg 2 pgcode
    cause = error.__cause__
    code: str | None = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    return code
