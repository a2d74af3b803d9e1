"""How soon a worker begins a task, beside pgqueuer and procrastinate, in one run.

    python -m benchmarks.peers PYTHON_WITH_THEM [--rounds 5] [--tasks 100] [--queues 1 10]

Each contender has its worker as its documentation begins, with all defaults, on one PostgreSQL with durable
commits. They take turns: in each round each of them starts, warms up, and gets one task at a time, at random
moments, when it has nothing to do. The time is from when the commit of the task has come back to who
enqueued it (each with its synchronous API, by psycopg) to the first line of the action, both by the clock of
this machine. Printed are the medians of what the rounds gave, and the longest time of all; as Markdown.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import django

from benchmarks.moments import Moments, moments
from tests import servers

#: Tasks of each turn before those that count.
WARM_UP = 20
#: Seconds between two tasks: at least, and at most.
PAUSE = 0.05, 0.5


@dataclass(frozen=True)
class Contender:
    name: str
    python: str
    module: str
    """What enqueues its tasks."""
    worker: tuple[str, ...]


def contenders(peers: str) -> list[Contender]:
    ours, with_pgqueuer, with_procrastinate = (
        f"benchmarks.peers.with_{name}" for name in ("modelqueue", "pgqueuer", "procrastinate")
    )
    procrastinate = "procrastinate", f"--app={with_procrastinate}.app", "worker"
    return [
        Contender("ModelQueue", sys.executable, ours, ("django", "modelqueue", "worker")),
        Contender("pgqueuer", peers, with_pgqueuer, (with_pgqueuer,)),
        Contender("procrastinate", peers, with_procrastinate, procrastinate),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", help="a Python that has pgqueuer, asyncpg and procrastinate")
    parser.add_argument("--db", default="postgres", choices=["postgres", "postgres15"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=100, help="of each turn, 2 or more")
    parser.add_argument("--queues", type=int, nargs="+", default=[1, 10], help="how many a worker serves")
    options = parser.parse_args()
    with servers.start(options.db, durable=True) as server, moments() as begun:
        os.environ["BENCHMARK_DATABASE"] = json.dumps({**server, "NAME": "postgres"}, default=str)
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.latency.settings"
        os.environ |= {"PGHOST": str(server["HOST"]), "PGUSER": server["USER"], "PGDATABASE": "postgres"}
        os.environ["BENCHMARK_QUEUES"] = "1"
        create(options.peers)
        compare(options, begun)


def create(peers: str) -> None:
    from django.db import connection

    django.setup()

    from benchmarks.latency.models import Task
    from modelqueue.engines import engine_for

    with connection.schema_editor() as editor:
        editor.create_model(Task)
        for sql in engine_for("default").create_notify_trigger(Task._meta.db_table, "status"):
            editor.execute(sql, None)
    connection.close()
    app = "--app=benchmarks.peers.with_procrastinate.app"
    for command in ("pgqueuer", "install"), ("procrastinate", app, "schema", "--apply"):
        subprocess.run([peers, "-m", *command], check=True, capture_output=True)


def compare(options: argparse.Namespace, begun: Moments) -> None:
    print(machine(options))
    print(f"At the beginning:{uptime()}")
    waits: dict[tuple[str, int], list[list[float]]] = {}
    for _ in range(options.rounds):
        for queues in options.queues:
            for contender in contenders(options.peers):
                turn = measure(contender, queues, options.tasks, begun)
                waits.setdefault((contender.name, queues), []).append(turn)
    print(f"At the end:{uptime()}\n")
    print("| | queues | p50 | p95 | p99 | longest of a round | of all |\n|---|---|---|---|---|---|---|")
    for (name, queues), rounds in waits.items():
        figures = [statistics.median(values) for values in zip(*map(summary, rounds), strict=True)]
        shown = " | ".join(f"{figure:.1f} ms" for figure in [*figures, max(map(max, rounds))])
        print(f"| {name} | {queues} | {shown} |")


def measure(contender: Contender, queues: int, tasks: int, begun: Moments) -> list[float]:
    """Return after how many milliseconds each of so many tasks was begun."""
    environment = {**os.environ, "BENCHMARK_QUEUES": str(queues)}
    with worker(contender, environment), producer(contender, environment) as enqueue:
        waits = []
        for _ in range(WARM_UP + tasks):
            committed = enqueue(random.randrange(queues))
            waits.append((begun.next() - committed) * 1000)
            time.sleep(random.uniform(*PAUSE))
        return waits[WARM_UP:]


@contextmanager
def worker(contender: Contender, environment: dict[str, str]) -> Iterator[None]:
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [contender.python, "-m", *contender.worker], env=environment, stdout=log, stderr=log
        )
        try:
            yield
        except TimeoutError:
            log.seek(0)
            raise RuntimeError(
                f"The worker of {contender.name} begins no task. It said:\n{log.read()}"
            ) from None
        finally:
            process.terminate()
            process.wait()


@contextmanager
def producer(contender: Contender, environment: dict[str, str]) -> Iterator[Any]:
    """Yield what enqueues a task of the queue with this number, and returns when that was committed."""
    process = subprocess.Popen(
        [contender.python, "-m", "benchmarks.peers.producer", contender.module],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def enqueue(number: int) -> float:
        print(number, file=process.stdin, flush=True)
        return float(process.stdout.readline())

    try:
        yield enqueue
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def summary(waits: list[float]) -> list[float]:
    cuts = statistics.quantiles(waits, n=100, method="inclusive")
    return [cuts[49], cuts[94], cuts[98], max(waits)]


def machine(options: argparse.Namespace) -> str:
    names = "pgqueuer", "asyncpg", "procrastinate", "psycopg", "uvloop"
    code = (
        f"from importlib.metadata import version\nfor name in {names}: print(name, version(name), end=', ')"
    )
    versions = subprocess.run([options.peers, "-c", code], check=True, capture_output=True, text=True).stdout
    return (
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"Django {django.__version__}, {versions}{options.db}; "
        f"{options.rounds} rounds of {options.tasks} tasks\n"
    )


def uptime() -> str:
    return subprocess.run(["uptime"], check=True, capture_output=True, text=True).stdout.rstrip()


if __name__ == "__main__":
    main()
