"""What an index of the status costs: the field's own, a `QueueIndex`, and both."""

from __future__ import annotations

import datetime as dt
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.bench import Bench
from benchmarks.figures import Table
from benchmarks.inside import ask, made

_RULE = (
    "A table with {history:,} finished tasks on PostgreSQL; rounds of {tasks:,} that are claimed and "
    "finished 100 at a time, by one process; the kinds take turns. The size of the indexes is that after a "
    "VACUUM at the end; the log is the write-ahead log; those that are counted were finished within a day."
)


def measure(bench: Bench) -> Iterator[Table]:
    history, tasks = bench.options.history[-1], bench.options.tasks
    header = "index", "kB", "bytes of the log per task", "tasks/s", "ms to count those of a day"
    rows = [tuple(row) for row in bench.inside("indexes", history, tasks, bench.options.further_rounds)]
    yield Table("indexes", "Indexes of the status", _RULE.format(history=history, tasks=tasks), header, rows)


def inside(history: int, tasks: int, rounds: int) -> list[list[Any]]:
    """Return the row of each kind."""
    models = _models()
    for model in models.values():
        _fill(model, history)
    rates: dict[str, list[float]] = {kind: [] for kind in models}
    logged: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(rounds):
        for kind, model in models.items():
            rate, size = _drain(model, tasks)
            rates[kind].append(rate)
            logged[kind].append(size)
    return [
        [kind, _size(model), logged[kind], rates[kind], 1000 * _seconds_to_count(model)]
        for kind, model in models.items()
    ]


def _models() -> dict[str, Any]:
    from modelqueue import QueueIndex, StatusField

    return {
        "of the field": made("Full", status=StatusField()),
        "`QueueIndex`": made("Live", QueueIndex("status", name="live"), status=StatusField(db_index=False)),
        "both": made("Both", QueueIndex("status", name="both"), status=StatusField()),
    }


def _fill(model: Any, count: int) -> None:
    """Make tasks that were finished, one a second."""
    when = "now() AT TIME ZONE 'UTC' - number * interval '1 second'"
    ask(
        f"INSERT INTO {model._meta.db_table} (data, status) SELECT repeat('x', 100), "
        f"4000000000000000000 + 10 * to_char({when}, 'YYYYMMDDHH24MISSMS')::bigint "
        f"FROM generate_series({count}, 1, -1) AS number"
    )
    ask(f"VACUUM ANALYZE {model._meta.db_table}")


def _drain(model: Any, count: int) -> tuple[float, float]:
    """Claim and finish tasks, 100 at a time; return how many a second, and the bytes logged for each."""
    from modelqueue import Status, verbs
    from modelqueue.engines import Change, engine_for
    from modelqueue.source import Source

    model.objects.bulk_create([model(data="x" * 100) for _ in range(count)], 1000)
    ask("CHECKPOINT")
    source, engine = Source.of(model.objects, "status"), engine_for("default")
    before, began, done = ask("SELECT pg_current_wal_lsn()"), time.perf_counter(), 0
    while claims := verbs.claim(source, 100):
        done += len(
            engine.set_statuses(
                source, [Change(one.row.key, frozenset([one.lease]), Status.finished()) for one in claims]
            )
        )
    seconds = time.perf_counter() - began
    assert done == count
    logged = float(ask(f"SELECT pg_current_wal_lsn() - '{before}'"))
    ask(f"VACUUM ANALYZE {model._meta.db_table}")
    return count / seconds, logged / count


def _size(model: Any) -> float:
    size = ask(
        "SELECT sum(pg_relation_size(indexrelid)) FROM pg_index "
        "JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey) AND attname = 'status' "
        f"WHERE indrelid = '{model._meta.db_table}'::regclass"
    )
    return float(size) / 1024


def _seconds_to_count(model: Any) -> float:
    from modelqueue import Status, now

    first, last = Status.finished(now() - dt.timedelta(days=1)), Status.finished()
    took = []
    for _ in range(5):
        began = time.perf_counter()
        model.objects.filter(status__gte=first, status__lte=last).count()
        took.append(time.perf_counter() - began)
    return statistics.median(took)
