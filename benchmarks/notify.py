"""What the trigger of `AddNotifyTrigger` costs those who enqueue: `python -m benchmarks.notify`.

Eight processes insert one task per commit, as fast as they can, for some seconds: without the trigger, with
it, and with it tasks that are due only later. A session listens all the time. The rounds take turns; of each
kind the median counts. Takes less than a minute, and prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import threading
import time

import django

from tests import servers

WRITERS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--db", default="postgres", choices=["postgres", "postgres15"])
    parser.add_argument("--rounds", type=int, default=5, help="of each kind")
    parser.add_argument("--seconds", type=float, default=2.5, help="of each round")
    options = parser.parse_args()
    with servers.start(options.db, durable=True) as server:
        os.environ["BENCHMARK_DATABASE"] = json.dumps({**server, "NAME": "postgres"}, default=str)
        os.environ["BENCHMARK_QUEUES"] = "1"
        set_up()
        measure(options)


def set_up() -> None:
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.latency.settings"
    django.setup()


def measure(options: argparse.Namespace) -> None:
    from django.db import connection

    from benchmarks.latency.models import Task
    from modelqueue.engines import engine_for

    engine, table = engine_for("default"), Task._meta.db_table
    with connection.schema_editor() as editor:
        editor.create_model(Task)
    stopped = threading.Event()
    threading.Thread(target=listen, args=[stopped]).start()
    create = engine.create_notify_trigger(table, "status")
    drop = engine.drop_notify_trigger(table, "status")
    kinds = {
        "without the trigger": (drop, 0.0),
        "with it": (create, 0.0),
        "with it, tasks for later": (create, 3600.0),
    }
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    with multiprocessing.get_context("spawn").Pool(WRITERS, set_up) as pool:
        pool.map(write, [(0.1, 0.0)] * WRITERS, chunksize=1)  # which connects them
        for _ in range(options.rounds):
            for kind, (statements, later) in kinds.items():
                with connection.cursor() as cursor:
                    cursor.execute(f"TRUNCATE {table}")
                    for sql in [*drop, *statements]:
                        cursor.execute(sql)
                    cursor.execute("CHECKPOINT")
                done = pool.map(write, [(options.seconds, later)] * WRITERS, chunksize=1)
                rates[kind].append(sum(done) / options.seconds)
    stopped.set()
    version = connection.cursor().execute("SHOW server_version").fetchone()[0]
    connection.close()
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, Django {django.__version__}, PostgreSQL {version}\n"
    )
    print(f"| {WRITERS} writers | commits a second | lowest and highest round |\n|---|---|---|")
    for kind, found in rates.items():
        print(f"| {kind} | {statistics.median(found):,.0f} | {min(found):,.0f}-{max(found):,.0f} |")


def listen(stopped: threading.Event) -> None:
    from modelqueue.engines.notify import Ear

    ear = Ear("default")
    ear.listen()
    while not stopped.is_set():
        ear.wait(0.2)
    ear.close()


def write(how: tuple[float, float]) -> int:
    """Insert tasks, due so many seconds later, for so many seconds; return how many."""
    import datetime as dt

    from django.db import connection

    from benchmarks.latency.models import Task
    from modelqueue import Status, now

    seconds, later = how
    sql = f"INSERT INTO {Task._meta.db_table} (queue, status) VALUES (0, %s)"
    until, count = time.monotonic() + seconds, 0
    with connection.cursor() as cursor:
        while time.monotonic() < until:
            cursor.execute(sql, [int(Status.waiting(now() + dt.timedelta(seconds=later)))])
            count += 1
    return count


if __name__ == "__main__":
    main()
