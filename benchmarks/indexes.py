"""What an index of the status costs: `python -m benchmarks.indexes`.

A table with a history of finished tasks on PostgreSQL, with the field's own index, with a `QueueIndex`, and
with both: how large the indexes are after a VACUUM, what a task writes to the write-ahead log, how fast tasks
are done, and how long it takes to count what was finished today. The kinds take turns; of each the median
counts. Takes two minutes, and prints Markdown.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import statistics
import time
from typing import Any

import django
from django.conf import settings

from tests import servers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--db", default="postgres", choices=["postgres", "postgres15"])
    parser.add_argument("--history", type=int, default=300_000, help="finished tasks")
    parser.add_argument("--tasks", type=int, default=20_000, help="of each round")
    parser.add_argument("--rounds", type=int, default=5, help="of each kind")
    options = parser.parse_args()
    with servers.start(options.db, durable=True) as server:
        settings.configure(
            DATABASES={"default": {**server, "NAME": "postgres"}},
            DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
            USE_TZ=True,
        )
        django.setup()
        measure(options)


def measure(options: argparse.Namespace) -> None:
    from django.db import connection

    models = made_models()
    for model in models.values():
        with connection.schema_editor() as editor:
            editor.create_model(model)
        fill(model, options.history)
    found: dict[str, list[list[float]]] = {kind: [] for kind in models}
    for _ in range(options.rounds):
        for kind, model in models.items():
            found[kind].append(drained(model, options.tasks))
    version = ask("SHOW server_version")
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, Django {django.__version__}, PostgreSQL {version}, "
        f"{options.history:,} finished tasks, rounds of {options.tasks:,}\n"
    )
    print("| index | size | log per task | tasks a second | lowest and highest | to count those of a day |")
    print("|---|---|---|---|---|---|")
    for kind, model in models.items():
        rates, bytes_logged = ([one[place] for one in found[kind]] for place in (0, 1))
        print(
            f"| {kind} | {size(model)} | {statistics.median(bytes_logged):,.0f} bytes "
            f"| {statistics.median(rates):,.0f} | {min(rates):,.0f}-{max(rates):,.0f} "
            f"| {1000 * seconds_to_count(model):,.1f} ms |"
        )
    connection.close()


def made_models() -> dict[str, Any]:
    from django.db import models

    import modelqueue

    def made(name: str, db_index: bool, *indexes: Any) -> Any:
        meta = type("Meta", (), {"app_label": "benchmark", "indexes": list(indexes)})
        fields = {"data": models.TextField(), "status": modelqueue.StatusField(db_index=db_index)}
        return type(name, (models.Model,), {"__module__": __name__, "Meta": meta, **fields})

    return {
        "of the field": made("Full", True),
        "`QueueIndex`": made("Live", False, modelqueue.QueueIndex("status", name="live")),
        "both": made("Both", True, modelqueue.QueueIndex("status", name="both")),
    }


def fill(model: Any, count: int) -> None:
    """Make tasks that were finished, one a second."""
    when = "now() AT TIME ZONE 'UTC' - number * interval '1 second'"
    ask(
        f"INSERT INTO {model._meta.db_table} (data, status) SELECT repeat('x', 100), "
        f"4000000000000000000 + 10 * to_char({when}, 'YYYYMMDDHH24MISSMS')::bigint "
        f"FROM generate_series({count}, 1, -1) AS number"
    )
    ask(f"VACUUM ANALYZE {model._meta.db_table}")


def drained(model: Any, count: int) -> list[float]:
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
    return [count / seconds, logged / count]


def size(model: Any) -> str:
    return str(
        ask(
            "SELECT pg_size_pretty(sum(pg_relation_size(indexrelid))) FROM pg_index "
            "JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey) AND attname = 'status' "
            f"WHERE indrelid = '{model._meta.db_table}'::regclass"
        )
    )


def seconds_to_count(model: Any) -> float:
    from modelqueue import Status, now

    first, last = Status.finished(now() - dt.timedelta(days=1)), Status.finished()
    took = []
    for _ in range(5):
        began = time.perf_counter()
        model.objects.filter(status__gte=first, status__lte=last).count()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def ask(sql: str) -> Any:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone()[0] if cursor.description else None


if __name__ == "__main__":
    main()
