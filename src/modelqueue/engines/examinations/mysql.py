"""MySQL and MariaDB: gap locks, and transactions that keep old rows."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import Error, OperationalError

from modelqueue.engines.examinations.base import PATIENCE, Examination, as_json, nodes_of
from modelqueue.engines.examinations.facts import Isolation, Pin, Plan, Pooler, Refusal
from modelqueue.source import Source

_DENIED = 1227  # ER_SPECIFIC_ACCESS_DENIED_ERROR: without the privilege PROCESS

_NO_RIGHT = 1142, 1143  # ER_TABLEACCESS_DENIED_ERROR, ER_COLUMNACCESS_DENIED_ERROR
_OF_SERVER = "Let DATABASES name the server that leads. If it is this one: SET GLOBAL read_only = OFF;"
#: What to do, by the number of the error.
_READ_ONLY = {
    1290: _OF_SERVER,  # ER_OPTION_PREVENTS_STATEMENT
    1836: _OF_SERVER,  # ER_READ_ONLY_MODE
    1792: "Take TRANSACTION READ ONLY from init_command in OPTIONS of DATABASES. If it is not there: "
    "SET GLOBAL TRANSACTION READ WRITE;",  # ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION
}

#: Under READ COMMITTED a transaction needs old rows only during a statement. One that was prepared by XA may
#: have no session. The times are the server's own.
_PINS = """
SELECT trx_mysql_thread_id, trx_id, user, host,
    IF(trx_isolation_level = 'READ COMMITTED', COALESCE(time, 0), TIMESTAMPDIFF(SECOND, trx_started, NOW()))
        AS seconds, trx_query
FROM information_schema.innodb_trx LEFT JOIN information_schema.processlist ON id = trx_mysql_thread_id
WHERE trx_mysql_thread_id <> CONNECTION_ID() AND (
    trx_isolation_level IN ('REPEATABLE READ', 'SERIALIZABLE')
    OR trx_isolation_level = 'READ COMMITTED' AND trx_query IS NOT NULL
)
ORDER BY seconds DESC
"""


class MySQLExamination(Examination):
    create_index = "ALTER TABLE {table} ADD INDEX ({column}), ALGORITHM=INPLACE, LOCK=NONE;"
    analyze_table = "ANALYZE TABLE {table};"

    @contextmanager
    def impatiently(self) -> Iterator[None]:
        ((before,),) = self.ask("SELECT @@lock_wait_timeout")
        self._wait_for_locks(PATIENCE)
        try:
            yield
        finally:
            self._wait_for_locks(before)

    def _wait_for_locks(self, seconds: int) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute("SET SESSION lock_wait_timeout = %s", [seconds])

    def plan(self, source: Source[Any], now: dt.datetime) -> Plan | None:
        plan = self.explain(source, now, format="JSON")
        if plan is None:
            return None
        nodes = list(nodes_of(as_json(plan)))
        indexes, column = self.indexes(source), source.field.column
        seeks = any(
            node.get("key") in indexes
            and column in node.get("used_key_parts", ())
            and node["access_type"] != "index"  # from end to end
            for node in nodes
        )
        steps = [
            " ".join(filter(None, [node["table_name"], node.get("access_type"), node.get("key")]))
            for node in nodes
            if "table_name" in node
        ]
        return Plan(seeks, ", ".join(steps))

    def refusal(self, source: Source[Any]) -> Refusal | None:
        quote, database = self.connection.ops.quote_name, self.connection.settings_dict["NAME"]
        table, column = quote(source.owner._meta.db_table), quote(source.field.column)
        try:
            self.ask(f"EXPLAIN UPDATE {table} SET {column} = {column} WHERE 1 = 0")  # noqa: S608
        except Error as error:  # the same as of the UPDATE, which is not run
            code, why = error.args
            if code not in (*_READ_ONLY, *_NO_RIGHT):
                raise
            user, _, host = self.ask("SELECT CURRENT_USER()")[0][0].rpartition("@")
            grant = f"GRANT SELECT, UPDATE ON {quote(database)}.{table} TO '{user}'@'{host}';"
            return Refusal(table, why, _READ_ONLY.get(code, grant))
        return None

    def isolation(self) -> Isolation:
        # The first name is that of MySQL and of MariaDB from 11.1 on, the second of older ones.
        rows = self.ask("SHOW VARIABLES WHERE Variable_name IN ('transaction_isolation', 'tx_isolation')")
        return Isolation(rows[0][1].lower().replace("-", " "), locks_gaps=True)

    def pins(self) -> list[Pin] | None:
        try:
            rows = self.ask(_PINS)
        except OperationalError as error:
            if error.args[0] != _DENIED:
                raise
            return None
        return [_pin(*row) for row in rows]

    def pooler(self) -> Pooler | None:
        # The driver has 32 bits of the number.
        found = tuple(self.ask("SELECT CONNECTION_ID()")[0][0] % 2**32 for _ in range(3))
        told = self.connection.connection.thread_id()
        return None if set(found) == {told} else Pooler(told, found)


def _pin(thread: int, number: int, user: str, host: str, seconds: int, query: str | None) -> Pin:
    if thread:
        kind, name, who = "transaction", thread, f"{user}@{host}"
        cure = f"Let it end, or end it: KILL {thread};"
    else:
        kind, name, who = "prepared transaction", number, ""
        cure = "Have it committed, or end it: XA RECOVER; tells its name, and XA ROLLBACK 'name'; ends it."
    return Pin(kind, str(name), who, float(seconds), None, query, cure)
