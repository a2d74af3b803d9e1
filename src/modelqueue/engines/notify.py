"""NOTIFY and LISTEN of PostgreSQL: a trigger that tells of new tasks, and sessions that hear of them.

A notification is a hint and no more: it says of which table, and whoever misses one finds the task when he
looks for himself. PostgreSQL sends it after the commit, and the same one of one transaction once.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from uuid import uuid4

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import truncate_name

from modelqueue.status import State, Status

__all__ = ["Ear", "Hearing", "create_trigger", "drop_trigger", "may_listen", "tables_that_tell"]

_CHANNEL = "modelqueue"
_FUNCTION = "modelqueue_notify"
_LONGEST_NAME = 63

# The name of the table is asked for each time, so that it may be renamed.
_CREATE_FUNCTION = f"""
CREATE OR REPLACE FUNCTION {_FUNCTION}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('{_CHANNEL}', TG_TABLE_NAME);
    RETURN NULL;
END $$
"""

# For a row that is not due yet nobody has to wake up: the workers look for those by themselves. To compare
# it with the clock costs about a microsecond, where a notification makes its commit and those of others that
# notify wait for each other. A second more, as the clock that has stamped the row may be ahead of that of the
# database. For each row, as a trigger for whole statements can not tell a claim from a new task beforehand.
_CREATE_TRIGGER = """
CREATE TRIGGER {trigger} AFTER INSERT OR UPDATE OF {column} ON {table} FOR EACH ROW
WHEN (NEW.{column} BETWEEN {first} AND {last} AND NEW.{column} < {zero} + 10 * to_char(
    (clock_timestamp() + interval '1 second') AT TIME ZONE 'UTC', 'YYYYMMDDHH24MISSMS')::bigint)
EXECUTE FUNCTION {function}()
"""

# The triggers on other fields need it still.
_DROP_FUNCTION = f"""
DO $$ BEGIN
    DROP FUNCTION IF EXISTS {_FUNCTION}();
EXCEPTION WHEN dependent_objects_still_exist THEN NULL;
END $$
"""

# A partitioned table has its rows, and so its trigger, in its parts, which tell their own names.
_NAMES_OF_TABLES = f"""
SELECT DISTINCT wanted.name, pg_class.relname FROM unnest(%s::text[]) AS wanted (name)
CROSS JOIN LATERAL (
    SELECT to_regclass(wanted.name) UNION SELECT relid FROM pg_partition_tree(to_regclass(wanted.name))
) AS part (oid)
JOIN pg_class ON pg_class.oid = part.oid
JOIN pg_trigger ON pg_trigger.tgrelid = pg_class.oid AND pg_trigger.tgenabled <> 'D'
JOIN pg_proc ON pg_proc.oid = pg_trigger.tgfoid AND pg_proc.proname = '{_FUNCTION}'
"""  # noqa: S608  (a constant)


def create_trigger(connection: BaseDatabaseWrapper, table: str, column: str) -> list[str]:
    """Return the statements that make PostgreSQL tell when a row with a status becomes due."""
    quote = connection.ops.quote_name
    trigger = _CREATE_TRIGGER.format(
        trigger=quote(_trigger_name(column)),
        table=quote(table),
        column=quote(column),
        first=int(Status.minimum(State.waiting)),
        last=int(Status.maximum(State.waiting)),
        zero=int(Status.minimum(State.waiting)),
        function=_FUNCTION,
    )
    return [_CREATE_FUNCTION.strip(), trigger.strip()]


def drop_trigger(connection: BaseDatabaseWrapper, table: str, column: str) -> list[str]:
    """Return the statements that undo those of `create_trigger`."""
    quote = connection.ops.quote_name
    drop = f"DROP TRIGGER IF EXISTS {quote(_trigger_name(column))} ON {quote(table)}"
    return [drop, _DROP_FUNCTION.strip()]


def _trigger_name(column: str) -> str:
    return truncate_name(f"modelqueue_notify_{column}", _LONGEST_NAME)


def tables_that_tell(connection: BaseDatabaseWrapper, tables: Iterable[str]) -> dict[str, list[str]]:
    """Return those of these tables that tell of new tasks, by what notifications call them."""
    quoted = {connection.ops.quote_name(table): table for table in tables}
    found: dict[str, list[str]] = {}
    with connection.cursor() as cursor:
        cursor.execute(_NAMES_OF_TABLES, [list(quoted)])
        for table, name in cursor.fetchall():
            found.setdefault(name, []).append(quoted[table])
    return found


def may_listen(connection: BaseDatabaseWrapper) -> bool:
    """Say whether the session of this connection may listen beside its other work.

    Not one of a pool, which would give it, still listening, to somebody else; nor without autocommit, where
    it would begin to listen only when something is committed.
    """
    return not connection.settings_dict["OPTIONS"].get("pool") and connection.settings_dict["AUTOCOMMIT"]


class Hearing:
    """What the session of a connection is told from now on; of the thread whose connection it is."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self._connection = connection
        self._told: set[str] = set()
        with connection.cursor() as cursor:
            cursor.execute(f"LISTEN {_CHANNEL}")
            self._driver: Any = connection.connection
        #: Kept, as the driver knows it no more when the session has come to an end.
        self._fileno = int(self._driver.fileno())
        if hasattr(self._driver, "pgconn"):  # psycopg 2 keeps what comes with the answer to a statement
            self._driver.add_notify_handler(lambda notification: self._told.add(notification.payload))

    @property
    def has_ended(self) -> bool:
        """Say whether the connection has another session by now, or none."""
        return self._connection.connection is not self._driver

    @property
    def was_told(self) -> bool:
        """Say whether it was told something, with the answer to a statement."""
        return bool(self._told if hasattr(self._driver, "pgconn") else self._driver.notifies)

    def fileno(self) -> int:
        """Return what is ready to be read when something is told while the session does nothing else."""
        return self._fileno

    def read(self) -> set[str]:
        """Return of which tables it was told since this was called last.

        Raises:
            Exception: that of the driver, as the session has come to an end.
        """
        driver = self._driver
        if hasattr(driver, "pgconn"):
            driver.pgconn.consume_input()
            while notification := driver.pgconn.notifies():
                self._told.add(notification.extra.decode())
        else:  # psycopg 2
            driver.poll()
            self._told.update(notification.payload for notification in driver.notifies)
            driver.notifies.clear()
        told, self._told = self._told, set()
        return told


class Ear:
    """A session that does nothing but listen, of one thread. Closed by `close`, whatever was raised."""

    def __init__(self, using: str) -> None:
        self._using = using
        self._connection = _connection_of_its_own(using)
        self._hearing: Hearing

    def tables_with_trigger(self, tables: Iterable[str]) -> dict[str, list[str]]:
        return tables_that_tell(self._connection, tables)

    def listen(self) -> None:
        self._hearing = Hearing(self._connection)

    def hears(self, seconds: float) -> bool:
        """Say whether what another session tells is heard within so many seconds.

        What this one told itself would be heard through any pooler.
        """
        word = f"{_CHANNEL} {uuid4()}"  # of no table
        other = _connection_of_its_own(self._using)
        try:
            with other.cursor() as cursor:
                cursor.execute("SELECT pg_notify(%s, %s)", [_CHANNEL, word])
        finally:
            other.close()
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if word in self.wait(left):
                return True
        return False

    def wait(self, seconds: float) -> set[str]:
        """Wait until something is told; return of which tables, or nothing after so many seconds."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._hearing, selectors.EVENT_READ)
            selector.select(0 if self._hearing.was_told else seconds)
        return self._hearing.read()

    def close(self) -> None:
        with suppress(Exception):  # of one that is dead
            self._connection.close()


def _connection_of_its_own(using: str) -> BaseDatabaseWrapper:
    """Return a connection beside those of Django, and beside its pool: what listens can not be given back."""
    connection: BaseDatabaseWrapper = connections[using].copy()
    connection.settings_dict["OPTIONS"].pop("pool", None)
    connection.settings_dict["AUTOCOMMIT"] = True
    return connection
