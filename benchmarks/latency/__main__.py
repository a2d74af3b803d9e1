"""How long a task waits until a worker has begun it, and how often an idle worker asks the database.

    python -m benchmarks.latency [--db postgres] [--tasks 60] [--idle 20] [--queues 10] [--listen]

Starts a worker of four processes that serves ten queues of one table, and enqueues one task at a time: at
random moments while the worker is warm, and after idle times. The time is from the commit of the task's
INSERT to the beginning of its action, both by the clock of this machine. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import django

from benchmarks.moments import Moments, moments
from tests import servers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--db", default="postgres", choices=["postgres", "postgres15", "mariadb", "sqlite"])
    parser.add_argument("--tasks", type=int, default=60, help="while the worker is warm")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds of each idle time")
    parser.add_argument("--rounds", type=int, default=10, help="tasks after idle times, 2 or more")
    parser.add_argument("--queues", type=int, default=10, help="of one table; 1: all its rows, no filter")
    parser.add_argument("--listen", action="store_true", help="let a trigger tell the worker (PostgreSQL)")
    options = parser.parse_args()
    with (
        servers.start(options.db, durable=True) as server,
        tempfile.TemporaryDirectory() as folder,
        moments() as begun,
    ):
        name = {"sqlite": str(Path(folder) / "tasks.sqlite3"), "mariadb": "mysql"}.get(options.db, "postgres")
        os.environ["BENCHMARK_DATABASE"] = json.dumps({**server, "NAME": name}, default=str)
        os.environ["BENCHMARK_QUEUES"] = str(options.queues)
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.latency.settings"
        django.setup()
        measure(options, begun)


def measure(options: argparse.Namespace, begun: Moments) -> None:
    from django.db import connection

    from benchmarks.latency.models import Task
    from modelqueue.engines import engine_for

    with connection.schema_editor() as editor:
        editor.create_model(Task)
        if options.listen:
            for sql in engine_for("default").create_notify_trigger(Task._meta.db_table, "status"):
                editor.execute(sql, None)
    worker = subprocess.Popen(
        [sys.executable, "-m", "django", "modelqueue", "worker", "--processes", "4"],
        stdout=subprocess.DEVNULL,
    )
    try:
        run_one(begun)  # until then it starts
        print(f"{platform.platform()}, {os.cpu_count()} cores, Django {django.__version__}, {options.db}\n")
        print("| | tasks | p50 | p90 | longest |\n|---|---|---|---|---|")
        warm = []
        for _ in range(options.tasks):
            time.sleep(random.uniform(0.05, 1.0))
            warm.append(run_one(begun))
        report("warm", warm)
        cold, probes = [], []
        for _ in range(options.rounds):
            time.sleep(options.idle - 5)
            before = transactions()
            time.sleep(5)
            probes.append((transactions() - before) / 5)
            time.sleep(random.uniform(0.0, 1.0))  # as the worker's pauses begin with the last task
            cold.append(run_one(begun))
        report(f"after {options.idle:.0f} s without a task", cold)
        if options.db != "sqlite":
            what = "Statements" if options.db == "mariadb" else "Transactions"
            print(f"\n{what} a second of the idle worker: {statistics.median(probes):.1f}")
    finally:
        worker.terminate()
        worker.wait()
        connection.close()


def run_one(begun: Moments) -> float:
    """Enqueue a task; return after how many milliseconds its action began."""
    from benchmarks.latency.models import Task

    Task.objects.create(queue=random.randrange(int(os.environ["BENCHMARK_QUEUES"])))
    committed = time.time()
    return (begun.next() - committed) * 1000


def report(what: str, waits: list[float]) -> None:
    cuts = statistics.quantiles(waits, n=10)
    middle, most = statistics.median(waits), max(waits)
    print(f"| {what} | {len(waits)} | {middle:.1f} ms | {cuts[-1]:.1f} ms | {most:.1f} ms |")


def transactions() -> int:
    """Return how many transactions (MariaDB: statements) the database has seen, all but our own question."""
    from django.db import connection

    questions = {
        "postgresql": "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()",
        "mysql": "SELECT variable_value FROM information_schema.global_status "
        "WHERE variable_name = 'QUERIES'",
    }
    if connection.vendor not in questions:
        return 0
    with connection.cursor() as cursor:
        cursor.execute(questions[connection.vendor])
        row: Any = cursor.fetchone()
    return int(row[0])


if __name__ == "__main__":
    main()
