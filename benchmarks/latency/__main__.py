"""How long a task waits until a worker has begun it, and how often an idle worker asks the database.

    python -m benchmarks.latency [--db postgres] [--tasks 60] [--idle 20]

Starts a worker of four processes that serves ten queues, and enqueues one task at a time: at random moments
while the worker is warm, and after idle times. The time is from the commit of the task's INSERT to the
beginning of its action, both by the clock of this machine. Prints Markdown.
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

from tests import servers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--db", default="postgres", choices=["postgres", "postgres15", "sqlite"])
    parser.add_argument("--tasks", type=int, default=60, help="while the worker is warm")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds of each idle time")
    parser.add_argument("--rounds", type=int, default=10, help="tasks after idle times, 2 or more")
    options = parser.parse_args()
    with servers.start(options.db, durable=True) as server, tempfile.TemporaryDirectory() as folder:
        name = str(Path(folder) / "tasks.sqlite3") if options.db == "sqlite" else "postgres"
        os.environ["BENCHMARK_DATABASE"] = json.dumps({**server, "NAME": name}, default=str)
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.latency.settings"
        django.setup()
        measure(options)


def measure(options: argparse.Namespace) -> None:
    from django.db import connection

    from benchmarks.latency.models import Task

    with connection.schema_editor() as editor:
        editor.create_model(Task)
    worker = subprocess.Popen(
        [sys.executable, "-m", "django", "modelqueue", "worker", "--processes", "4"],
        stdout=subprocess.DEVNULL,
    )
    try:
        run_one()  # until then it starts
        print(f"{platform.platform()}, {os.cpu_count()} cores, Django {django.__version__}, {options.db}\n")
        print("| | tasks | p50 | p90 | longest |\n|---|---|---|---|---|")
        warm = []
        for _ in range(options.tasks):
            time.sleep(random.uniform(0.05, 1.0))
            warm.append(run_one())
        report("warm", warm)
        cold, probes = [], []
        for _ in range(options.rounds):
            time.sleep(options.idle - 5)
            before = transactions()
            time.sleep(5)
            probes.append((transactions() - before) / 5)
            cold.append(run_one())
        report(f"after {options.idle:.0f} s without a task", cold)
        if options.db != "sqlite":
            print(f"\nTransactions a second of the idle worker: {statistics.median(probes):.1f}")
    finally:
        worker.terminate()
        worker.wait()
        connection.close()


def run_one() -> float:
    """Enqueue a task; return after how many milliseconds its action began."""
    from benchmarks.latency.models import Task

    task = Task.objects.create(queue=random.randrange(10))
    committed = time.time()
    while task.begun is None:
        time.sleep(0.05)
        task.refresh_from_db()
    return (task.begun - committed) * 1000


def report(what: str, waits: list[float]) -> None:
    cuts = statistics.quantiles(waits, n=10)
    middle, most = statistics.median(waits), max(waits)
    print(f"| {what} | {len(waits)} | {middle:.0f} ms | {cuts[-1]:.0f} ms | {most:.0f} ms |")


def transactions() -> int:
    """Return how many transactions the database has seen, our own question left out."""
    from django.db import connection

    if connection.vendor != "postgresql":
        return 0
    with connection.cursor() as cursor:
        cursor.execute("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()")
        row: Any = cursor.fetchone()
    return int(row[0])


if __name__ == "__main__":
    main()
