"""PostgreSQL: vacuum and who keeps it from its work, isolation, and poolers.

Every statement may be sent by any user. Of the sessions of others `pg_stat_activity` tells an ordinary user
the pid, the application and how old what they see is, but neither since when nor the statement.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import transaction

from modelqueue.engines.examinations.base import PATIENCE, Examination, as_json, nodes_of
from modelqueue.engines.examinations.facts import Isolation, Pin, Plan, Pooler, Refusal, Silence, Vacuum
from modelqueue.engines.notify import Ear, tables_that_tell
from modelqueue.engines.postgresql import WORKER
from modelqueue.source import Source


def _setting(name: str) -> str:
    """Return the SQL of what counts for a table: its own setting, else that of the server, or NULL."""
    own = f"SELECT option_value FROM pg_options_to_table(reloptions) WHERE option_name = '{name}'"  # noqa: S608
    return f"COALESCE(({own}), current_setting('{name}', true))"


#: The settings of the most came with PostgreSQL 18; -1 is none. Without track_counts nobody knows of dead
#: rows.
_VACUUM = f"""
SELECT CASE WHEN NOT current_setting('autovacuum')::bool THEN 'autovacuum'
            WHEN NOT current_setting('track_counts')::bool THEN 'track_counts'
            WHEN NOT COALESCE({_setting("autovacuum_enabled")}, 'on')::bool THEN 'autovacuum_enabled' END,
       {_setting("autovacuum_vacuum_threshold")}::float8
           + {_setting("autovacuum_vacuum_scale_factor")}::float8 * GREATEST(reltuples, n_live_tup, 0),
       COALESCE({_setting("autovacuum_vacuum_max_threshold")}, '-1')::float8,
       COALESCE(n_dead_tup, 0)
FROM pg_class LEFT JOIN pg_stat_all_tables ON relid = pg_class.oid
WHERE pg_class.oid = to_regclass(%s)
"""  # noqa: S608  (names of settings)

#: By the name as Django quotes it, which may have a schema in it, where Django itself looks for the bare one.
_INDEXES = """
SELECT relname, indexrelid::regclass::text, indisvalid
FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey)
WHERE indrelid = to_regclass(%s) AND attname = %s
"""

#: A transaction of a standby is read-only, whatever the setting is.
_WRITABLE = """
SELECT pg_is_in_recovery(), current_setting('transaction_read_only')::bool,
       (SELECT source FROM pg_settings WHERE name = 'default_transaction_read_only'),
       has_column_privilege(to_regclass(%s), %s, 'UPDATE'), quote_ident(current_user)
"""

#: Those of other databases see other tables, but for slots, which keep rows everywhere. Who vacuums keeps
#: none. The xmin of a catalog, that of a logical slot, is for tables of the system. What a standby without a
#: slot needs is kept by the session that sends to it.
_PINS = """
SELECT CASE WHEN sender IS NULL THEN 'transaction' ELSE 'standby' END, pid::text,
       COALESCE(application_name, ''),
       extract(epoch FROM clock_timestamp() - xact_start)::float8,
       GREATEST(age(backend_xmin), age(backend_xid)) AS transactions,
       NULLIF(query, '<insufficient privilege>'),
       CASE WHEN sender IS NULL THEN format('Let it end, or end it: SELECT pg_terminate_backend(%s);', pid)
            ELSE 'Let the long transaction on it end, or set hot_standby_feedback = off there.' END
FROM pg_stat_activity LEFT JOIN (SELECT pid AS sender FROM pg_stat_replication) AS senders ON sender = pid
WHERE (datname = current_database() OR datname IS NULL) AND pid <> pg_backend_pid()
    AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
    AND pid NOT IN (SELECT pid FROM pg_stat_progress_vacuum)
    AND backend_type IS DISTINCT FROM 'parallel worker'
UNION ALL
SELECT 'prepared transaction', gid, owner::text, extract(epoch FROM clock_timestamp() - prepared)::float8,
       age(transaction), NULL, format('Have it committed, or end it: ROLLBACK PREPARED %L;', gid)
FROM pg_prepared_xacts WHERE database = current_database()
UNION ALL
SELECT 'replication slot', slot_name, CASE WHEN active THEN 'in use' ELSE 'used by nobody' END,
       extract(epoch FROM clock_timestamp() - INACTIVE_SINCE)::float8,
       age(xmin), NULL,
       CASE WHEN active
            THEN 'Let the long transaction on its standby end, or set hot_standby_feedback = off there.'
            ELSE format('Start its standby, or drop it: SELECT pg_drop_replication_slot(%L);', slot_name) END
FROM pg_replication_slots WHERE xmin IS NOT NULL
ORDER BY transactions DESC
"""

#: Hosts that are this machine, and the options of libpq that end a connection to a silent one.
_HERE = {"", "localhost", "127.0.0.1", "::1"}
_LIMITS = "connect_timeout", "tcp_user_timeout", "keepalives_idle"

#: Seconds within which a notification has to be heard.
_PATIENCE = 3.0

_STRICTNESS = ["read uncommitted", "read committed", "repeatable read", "serializable"]


class PostgreSQLExamination(Examination):
    create_index = "CREATE INDEX CONCURRENTLY ON {table} ({column});"

    @contextmanager
    def impatiently(self) -> Iterator[None]:
        with transaction.atomic(using=self.using):
            with self.connection.cursor() as cursor:
                cursor.execute(f"SET LOCAL lock_timeout = '{PATIENCE}s'")
            yield

    def plan(self, source: Source[Any], now: dt.datetime) -> Plan | None:
        plan = self.explain(source, now, format="JSON")
        if plan is None:
            return None
        nodes = list(nodes_of(as_json(plan)))
        indexes, column = self.indexes(source), re.compile(rf"\b{re.escape(str(source.field.column))}\b")
        seeks = any(
            node.get("Index Name") in indexes and column.search(node.get("Index Cond", "")) for node in nodes
        )
        steps = [
            " ".join(filter(None, [node["Node Type"], node.get("Index Name"), node.get("Relation Name")]))
            for node in nodes
            if "Node Type" in node
        ]
        return Plan(seeks, ", ".join(steps))

    def indexes(self, source: Source[Any]) -> frozenset[str]:
        return frozenset(name for name, _, is_valid in self._indexes(source) if is_valid)

    def invalid_indexes(self, source: Source[Any]) -> frozenset[str]:
        return frozenset(quoted for _, quoted, is_valid in self._indexes(source) if not is_valid)

    def _indexes(self, source: Source[Any]) -> list[tuple[Any, ...]]:
        return self.ask(_INDEXES, (self._table(source), source.field.column))

    def _table(self, source: Source[Any]) -> str:
        return str(self.connection.ops.quote_name(source.owner._meta.db_table))

    def refusal(self, source: Source[Any]) -> Refusal | None:
        table = self._table(source)
        ((is_standby, is_read_only, set_by, may_write, user),) = self.ask(
            _WRITABLE, (table, source.field.column)
        )
        if is_standby:
            why = "the server is a standby"
            cure = (
                "Let DATABASES name the server that leads. If HOST names several, "
                '"target_session_attrs": "read-write" in OPTIONS chooses it.'
            )
        elif is_read_only:
            why = f"transactions are read-only, by a setting of the {set_by}"
            cure = (
                "Take default_transaction_read_only away there: OPTIONS of DATABASES (client), ALTER ROLE "
                "(user), ALTER DATABASE (database), or the configuration of the server."
            )
        elif not may_write:
            why, cure = f"the user {user} may not", f"GRANT SELECT, UPDATE ON {table} TO {user};"
        else:
            return None
        return Refusal(table, why, cure)

    def vacuum(self, source: Source[Any]) -> Vacuum | None:
        table = self._table(source)
        off, comes_at, most, dead = self.ask(_VACUUM, (table,))[0]
        return Vacuum(table, off, int(comes_at if most < 0 else min(comes_at, most)), dead)

    def hears(self, source: Source[Any]) -> bool | None:
        if not tables_that_tell(self.connection, [source.owner._meta.db_table]):
            return None
        ear = Ear(self.using)
        try:
            ear.listen()
            return ear.hears(_PATIENCE)
        finally:
            ear.close()

    def isolation(self) -> Isolation:
        # That of a statement alone, and that of an atomic(), which OPTIONS may say.
        levels = self.ask("SHOW default_transaction_isolation")
        with transaction.atomic(using=self.using):
            levels += self.ask("SHOW transaction_isolation")
        return Isolation(max((level for (level,) in levels), key=_STRICTNESS.index), locks_gaps=False)

    def pins(self) -> list[Pin]:
        inactive = "inactive_since" if self.connection.pg_version >= 170000 else "NULL::timestamptz"
        return [Pin(*row) for row in self.ask(_PINS.replace("INACTIVE_SINCE", inactive))]

    def silence(self) -> Silence | None:
        # What libpq goes by, whether it is from OPTIONS, a file of services, or the environment.
        session = self.connection.connection.info
        if session.host in _HERE or session.host.startswith("/"):
            return None
        known = session.dsn_parameters if hasattr(session, "dsn_parameters") else session.get_parameters()
        return Silence(session.host, tuple(name for name in _LIMITS if known.get(name, "0") == "0"))

    def versions(self) -> list[str]:
        rows = self.ask(
            "SELECT DISTINCT application_name FROM pg_stat_activity "
            "WHERE datname = current_database() AND starts_with(application_name, %s)",
            (WORKER,),
        )
        return [name.removeprefix(WORKER) for (name,) in rows]

    def pooler(self) -> Pooler | None:
        # Who connects is told the pid of the session. A pooler tells a number of its own, as it does not know
        # yet which session that will be. Each of these statements is a transaction.
        found = tuple(self.ask("SELECT pg_backend_pid()")[0][0] for _ in range(3))
        told = self.connection.connection.info.backend_pid
        return None if set(found) == {told} else Pooler(told, found)
