"""How fast rows are enqueued in the ways of the how-to "Enqueue many rows": `python -m benchmarks.enqueue`.

On PostgreSQL with durable commits. The ways take turns; of each the median counts. Takes two minutes, and
prints Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import django
from django.conf import settings

from tests import servers

BATCH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--db", default="postgres", choices=["postgres", "postgres15"])
    parser.add_argument("--rows", type=int, default=50_000, help="of each round")
    parser.add_argument("--rounds", type=int, default=5, help="of each way")
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

    ways = made_ways()
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, (model, prepare, enqueue) in ways.items():
            ask(f"TRUNCATE {model._meta.db_table}")
            prepare(model, options.rows)
            ask("CHECKPOINT")
            began = time.perf_counter()
            enqueue(model, options.rows)
            rates[way].append(options.rows / (time.perf_counter() - began))
    version = ask("SHOW server_version")
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, Django {django.__version__}, PostgreSQL {version}\n"
    )
    print("| way | rows a second |\n|---|---|")
    for way, found in rates.items():
        print(f"| {way} | {statistics.median(found):,.0f} ({min(found):,.0f}-{max(found):,.0f}) |")
    connection.close()


def made_ways() -> dict[str, tuple[Any, Callable[[Any, int], None], Callable[[Any, int], None]]]:
    """Return models, what is to be there before, and what is measured."""
    from django.db import connection, models

    import modelqueue

    def made(name: str, *indexes: Any, **fields: Any) -> Any:
        meta = type("Meta", (), {"app_label": "benchmark", "indexes": list(indexes)})
        fields = {"data": models.TextField(), **fields}
        model = type(name, (models.Model,), {"__module__": __name__, "Meta": meta, **fields})
        with connection.schema_editor() as editor:
            editor.create_model(model)
        return model

    without = made("Without")
    # Counted up, as many equal numbers take less room in an index.
    plain = made("Plain", status=models.BigIntegerField(db_index=True, default=itertools.count(1).__next__))
    task = made("Task", status=modelqueue.StatusField())
    queue_index = modelqueue.QueueIndex("status", name="live")
    live = made("Live", queue_index, status=modelqueue.StatusField(db_index=False))
    created = made("Created", status=modelqueue.StatusField(null=True))
    return {
        "`bulk_create` of a model without a status": (without, nothing, bulk_create),
        "of one with an ordinary integer that is indexed": (plain, nothing, bulk_create),
        "of one with a `StatusField`": (task, nothing, bulk_create),
        "with a `QueueIndex` instead": (live, nothing, bulk_create),
        "`enqueue` of rows that are there, all at once": (created, fill, enqueue),
        "`INSERT ... SELECT`, all at once": (task, nothing, insert_select),
        "`COPY`, all at once": (task, nothing, copy),
    }


def nothing(model: Any, count: int) -> None:
    """Nothing has to be there before."""


def fill(model: Any, count: int) -> None:
    table = model._meta.db_table
    ask(f"INSERT INTO {table} (data) SELECT 'some text' FROM generate_series(1, {count})")
    ask(f"VACUUM ANALYZE {table}")


def bulk_create(model: Any, count: int) -> None:
    for _ in range(count // BATCH):
        model.objects.bulk_create([model(data="some text") for _ in range(BATCH)])


def enqueue(model: Any, count: int) -> None:
    import modelqueue

    assert modelqueue.enqueue(model.objects.all(), "status") == count


def insert_select(model: Any, count: int) -> None:
    from modelqueue import Status

    ask(
        f"INSERT INTO {model._meta.db_table} (data, status) "
        f"SELECT 'some text', {int(Status.waiting())} FROM generate_series(1, {count})"
    )


def copy(model: Any, count: int) -> None:
    from django.db import connection

    from modelqueue import Status

    status = int(Status.waiting())
    sql = f"COPY {model._meta.db_table} (data, status) FROM STDIN"
    with connection.cursor() as cursor, cursor.copy(sql) as rows:
        for _ in range(count):
            rows.write_row(("some text", status))


def ask(sql: str) -> Any:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone()[0] if cursor.description else None


if __name__ == "__main__":
    main()
