"""How fast rows are enqueued in the ways of the how-to "Enqueue many rows"."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.bench import Bench
from benchmarks.figures import Table
from benchmarks.inside import ask, made

#: Rows of one statement, which is one transaction.
_BATCH = 1000

_RULE = (
    "Rows a second on PostgreSQL, of one short text each, by one process; for `bulk_create` {batch:,} in "
    "each statement and transaction. Rounds of {rows:,} rows; the ways take turns. The time to make the "
    "instances is counted."
)

#: A model, what is to be there before, and what is measured.
_Way = tuple[Any, Callable[[Any, int], None], Callable[[Any, int], None]]


def measure(bench: Bench) -> Iterator[Table]:
    rows, rounds = bench.options.tasks, bench.options.further_rounds
    found: dict[str, list[float]] = bench.inside("bulk", rows, rounds)
    rule = _RULE.format(batch=_BATCH, rows=rows)
    yield Table("bulk", "Ways to enqueue many rows", rule, ("way", "rows/s"), list(found.items()))


def inside(rows: int, rounds: int) -> dict[str, list[float]]:
    """Return how many rows a second were enqueued, in each way in each round."""
    ways = _ways()
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, (model, prepare, enqueue) in ways.items():
            ask(f"TRUNCATE {model._meta.db_table}")
            prepare(model, rows)
            ask("CHECKPOINT")
            began = time.perf_counter()
            enqueue(model, rows)
            rates[way].append(rows / (time.perf_counter() - began))
    return rates


def _ways() -> dict[str, _Way]:
    from django.db import models

    import modelqueue

    without = made("Without")
    # Counted up, as many equal numbers take less room in an index.
    plain = made("Plain", status=models.BigIntegerField(db_index=True, default=itertools.count(1).__next__))
    task = made("Task", status=modelqueue.StatusField())
    queue_index = modelqueue.QueueIndex("status", name="live")
    live = made("Live", queue_index, status=modelqueue.StatusField(db_index=False))
    created = made("Created", status=modelqueue.StatusField(null=True))
    return {
        "`bulk_create` of a model without a status": (without, _nothing, _bulk_create),
        "of one with an ordinary integer that is indexed": (plain, _nothing, _bulk_create),
        "of one with a `StatusField`": (task, _nothing, _bulk_create),
        "with a `QueueIndex` instead": (live, _nothing, _bulk_create),
        "`enqueue` of rows that are there, all at once": (created, _fill, _enqueue),
        "`INSERT ... SELECT`, all at once": (task, _nothing, _insert_select),
        "`COPY`, all at once": (task, _nothing, _copy),
    }


def _nothing(model: Any, count: int) -> None:
    """Nothing has to be there before."""


def _fill(model: Any, count: int) -> None:
    table = model._meta.db_table
    ask(f"INSERT INTO {table} (data) SELECT 'some text' FROM generate_series(1, {count})")
    ask(f"VACUUM ANALYZE {table}")


def _bulk_create(model: Any, count: int) -> None:
    for first in range(0, count, _BATCH):
        model.objects.bulk_create([model(data="some text") for _ in range(min(_BATCH, count - first))])


def _enqueue(model: Any, count: int) -> None:
    import modelqueue

    assert modelqueue.enqueue(model.objects.all(), "status") == count


def _insert_select(model: Any, count: int) -> None:
    from modelqueue import Status

    ask(
        f"INSERT INTO {model._meta.db_table} (data, status) "
        f"SELECT 'some text', {int(Status.waiting())} FROM generate_series(1, {count})"
    )


def _copy(model: Any, count: int) -> None:
    from django.db import connection

    from modelqueue import Status

    status = int(Status.waiting())
    sql = f"COPY {model._meta.db_table} (data, status) FROM STDIN"
    with connection.cursor() as cursor, cursor.copy(sql) as rows:
        for _ in range(count):
            rows.write_row(("some text", status))
