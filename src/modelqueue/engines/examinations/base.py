"""What any database can be asked; everything else is not known here.

All statements are reads, and lock nothing. What they cost does not depend on the size of a table.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from django.core.exceptions import EmptyResultSet
from django.db import connections
from django.db.models import Q

from modelqueue.engines.examinations.facts import (
    Access,
    Isolation,
    OneWriter,
    Pin,
    Plan,
    Pooler,
    Refusal,
    Silence,
    Vacuum,
)
from modelqueue.source import Source
from modelqueue.status import State, Status

__all__ = ["PATIENCE", "Examination", "as_json", "nodes_of"]

#: Seconds for which somebody else's lock on a table is waited for.
PATIENCE = 3


class Examination:
    """The questions about one database, see the module."""

    create_index = "CREATE INDEX {index} ON {table} ({column});"
    analyze_table = "ANALYZE {table};"

    def __init__(self, using: str) -> None:
        self.using = using
        self.connection: Any = connections[using]

    def impatiently(self) -> AbstractContextManager[None]:
        """Return a context in which no question about a table waits for long, whoever has locked it."""
        return nullcontext()

    # About the table of a queue

    def access(self, source: Source[Any], now: dt.datetime, cap: int) -> Access:
        """Return how rows are found by their status, in a table of so many rows up to a cap."""
        size = source.owner_rows().values("pk")[:cap].count()
        quote, column = self.connection.ops.quote_name, source.field.column
        table, index = quote(source.owner._meta.db_table), quote(f"{column}_of_queue")
        return Access(
            size=size,
            is_large=size >= cap,
            indexes=self.indexes(source),
            invalid=self.invalid_indexes(source),
            plan=self.plan(source, now),
            create=self.create_index.format(table=table, column=quote(column), index=index),
            analyze=self.analyze_table.format(table=table),
        )

    def indexes(self, source: Source[Any]) -> frozenset[str]:
        """Return the names of the indexes that have the status field in them."""
        with self.connection.cursor() as cursor:
            found = self.connection.introspection.get_constraints(cursor, source.owner._meta.db_table)
        column = source.field.column
        return frozenset(
            name for name, facts in found.items() if facts["index"] and column in facts["columns"]
        )

    def invalid_indexes(self, source: Source[Any]) -> frozenset[str]:
        """Return the names, quoted, of those that are not complete, and so are not used."""
        return frozenset()

    def newest_lease(self, source: Source[Any]) -> tuple[Any, Status] | None:
        """Return the key and the status of the task that was claimed or renewed last."""
        name = source.field.name
        first, last = Status.minimum(State.working), Status.maximum(State.working)
        bounds = Q(**{f"{name}__gte": first, f"{name}__lte": last})
        working = source.owner_rows().filter(bounds, *source.live_condition())
        for pk, status in working.order_by(f"-{name}").values_list("pk", name)[:1]:
            return pk, Status(status)
        return None

    def plan(self, source: Source[Any], now: dt.datetime) -> Plan | None:
        """Return how the database looks for due tasks, as a claim does; it is asked, and nothing is run.

        None also for a queryset of nothing, of which no database is asked.
        """
        return None

    def refusal(self, source: Source[Any]) -> Refusal | None:
        """Return why no status can be written; it is asked, and nothing is."""
        return None

    def vacuum(self, source: Source[Any]) -> Vacuum | None:
        """Return when the table is rid of its dead rows; None also where there are none."""
        return None

    def hears(self, source: Source[Any]) -> bool | None:
        """Return whether what a trigger tells of the table is heard; None also where there is no trigger."""
        return None

    # About the database

    def isolation(self) -> Isolation | None:
        """Return how transactions of this project are kept apart; the strictest, if there are several."""
        return None

    def one_writer(self) -> OneWriter | None:
        """Return how writers take turns; None also where they need not."""
        return None

    def pins(self) -> list[Pin] | None:
        """Return who keeps dead rows from being removed, the oldest first."""
        return None

    def silence(self) -> Silence | None:
        """Return what limits how long a silent server is waited for; None also where it can not be silent."""
        return None

    def versions(self) -> list[str] | None:
        """Return the versions of modelqueue whose workers are connected."""
        return None

    def pooler(self) -> Pooler | None:
        """Return who stands between this process and the database; None also where nobody can be seen."""
        return None

    # What the others share

    def explain(self, source: Source[Any], now: dt.datetime, **options: Any) -> str | None:
        """Return the plan of the query that picks the task of a claim; nothing for a queryset of nothing."""
        rows = source.due(now).values_list("pk", source.field.name)[:1]
        with suppress(EmptyResultSet):
            rows.query.get_compiler(self.using).as_sql()  # raises it; explain() in Django 4.2 alone
            return rows.explain(**options)
        return None

    def ask(self, sql: str, params: tuple[Any, ...] | None = None) -> list[tuple[Any, ...]]:
        """Return the rows that a statement gives."""
        with self.connection.cursor() as cursor:
            cursor.execute(sql, params)
            rows: list[tuple[Any, ...]] = cursor.fetchall()
        return rows


def nodes_of(plan: Any) -> Iterator[dict[str, Any]]:
    """Yield each part of a plan that is given as JSON."""
    if isinstance(plan, dict):
        yield plan
    for part in plan.values() if isinstance(plan, dict) else plan if isinstance(plan, list) else ():
        yield from nodes_of(part)


def as_json(plan: str) -> Any:
    """Read a plan as JSON."""
    read = json.loads(plan)
    return json.loads(read) if isinstance(read, str) else read  # of MySQL Django writes a text as JSON
