"""Compare `run` of this checkout with modelqueue 2.2.1 and with the bare statements.

    python -m benchmarks.compare PYTHON_WITH_2.2.1 [--tasks 1000] [--rounds 5] [--history 500000]

Tasks per second of loops that run one task at a time, whose action does next to nothing: this shows what a
task costs, not what a worker can do. The contenders take turns, so that a machine that gets slower meanwhile
slows all of them. Commits are durable on PostgreSQL, as in production; SQLite is in WAL mode.
Prints Markdown.

* ``2.2.1``: the release of that number;
* ``raw``: the two statements that a task takes at least, by psycopg alone (PostgreSQL only), which
  prepares them;
* ``portable``: this checkout with ``ENGINE = "portable"``;
* ``now``: this checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import django

from tests import servers

WORKER = Path(__file__).parent / "worker.py"
#: Tasks of each process before the clock starts.
WARM_UP = 50


@dataclass
class Contender:
    name: str
    python: str
    loop: str = "nothing"
    settings: dict[str, str] = field(default_factory=dict)


class Worker:
    """A started `benchmarks/worker.py`."""

    def __init__(self, contender: Contender, database: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [contender.python, WORKER, json.dumps(database), json.dumps(contender.settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self, *command: Any) -> None:
        print(json.dumps(command), file=self.process.stdin, flush=True)

    def end(self) -> Any:
        return json.loads(self.process.stdout.readline())

    def do(self, *command: Any) -> Any:
        self.begin(*command)
        return self.end()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def database(name: str) -> Iterator[dict[str, Any]]:
    with (
        servers.start(name, durable=True) as server,
        tempfile.TemporaryDirectory(prefix="modelqueue-") as folder,
    ):
        if name == "sqlite":
            pragmas = "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL"
            options = {"timeout": 20, "transaction_mode": "IMMEDIATE", "init_command": pragmas}
            yield {**server, "NAME": str(Path(folder) / "tasks.sqlite3"), "OPTIONS": options}
        else:
            yield {**server, "NAME": "postgres"}


@dataclass
class Round:
    """What one contender did with a full queue."""

    rate: float
    wal: float
    lost: int
    """Tasks that were not finished: 2.2.1 loses some to deadlocks."""


def drain(contender: Contender, base: dict[str, Any], helper: Worker, processes: int, tasks: int) -> Round:
    is_postgresql = "postgresql" in base["ENGINE"]
    helper.do("fill", tasks + WARM_UP * processes)
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(contender, base)) for _ in range(processes)]
        for worker in workers:
            worker.do("warm", contender.loop, WARM_UP)
        before = helper.do("wal")["bytes"] if is_postgresql else 0
        started = time.perf_counter()
        for worker in workers:
            worker.begin("drain")
        done = sum(worker.end()["task"] for worker in workers)
        seconds = time.perf_counter() - started
        written = helper.do("wal")["bytes"] - before if is_postgresql else 0
    return Round(done / seconds, written / tasks, tasks - done)


def compare(name: str, old: str, options: argparse.Namespace) -> None:
    now = Contender("now", sys.executable)
    contenders = [
        Contender("2.2.1", old),
        *([Contender("raw", sys.executable, "raw")] if name != "sqlite" else []),
        Contender("portable", sys.executable, settings={"ENGINE": "portable"}),
        now,
    ]
    changing = [replace(one, loop="change") for one in contenders if one.name != "raw"]
    # SQLite has one writer; of 2.2.1 a second process gets "database is locked".
    table = [("run", contenders, processes) for processes in ((1,) if name == "sqlite" else (1, 2, 4))]
    table.append(("run, a field changed", changing, 1))
    print(f"## {name}\n")
    for history in dict.fromkeys([0, options.history]):
        with database(name) as base, Worker(now, base) as helper:
            helper.do("create", history)
            print(f"### {history:,} finished rows in the table\n")
            print(HEADER)
            for what, group, processes in table:
                rounds: dict[str, list[Round]] = {one.name: [] for one in group}
                for _ in range(options.rounds):
                    for one in group:
                        rounds[one.name].append(drain(one, base, helper, processes, options.tasks))
                report(what, processes, rounds)
            print()
            if not history:
                report_the_rest(contenders, base, helper, options)


HEADER = """\
| what | processes | contender | tasks/s | lowest - highest | to 2.2.1 | to raw | WAL bytes/task | lost |
|---|---|---|---|---|---|---|---|---|"""


def report(what: str, processes: int, rounds: dict[str, list[Round]]) -> None:
    median = {name: statistics.median(one.rate for one in of_one) for name, of_one in rounds.items()}
    for name, of_one in rounds.items():
        rates = [one.rate for one in of_one]
        wal = statistics.median(one.wal for one in of_one)
        raw = f"{median[name] / median['raw']:.2f}" if "raw" in median else ""
        print(
            f"| {what} | {processes} | {name} | {median[name]:.0f} | {min(rates):.0f} - {max(rates):.0f} "
            f"| {median[name] / median['2.2.1']:.2f} | {raw} | {f'{wal:.0f}' if wal else ''} "
            f"| {sum(one.lost for one in of_one)} |",
            flush=True,
        )


def report_the_rest(
    contenders: list[Contender], base: dict[str, Any], helper: Worker, options: argparse.Namespace
) -> None:
    """Print what needs no turns: how fast rows are added, and how many statements a task takes."""
    print("| contender | enqueued/s, one row at a time | statements per task |\n|---|---|---|")
    for one in contenders:
        with Worker(one, base) as worker:
            helper.do("fill", 100)
            sent = 2.0 if one.loop == "raw" else worker.do("statements", one.loop, 50)["statements"]
            seconds = [worker.do("enqueue", options.tasks)["seconds"] for _ in range(options.rounds)]
        print(f"| {one.name} | {options.tasks / statistics.median(seconds):.0f} | {sent:.1f} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare this checkout with modelqueue 2.2.1.")
    parser.add_argument("old", help="a Python that has modelqueue 2.2.1")
    parser.add_argument("--tasks", type=int, default=1000, help="tasks of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--history", type=int, default=500_000, help="finished rows in the full table")
    parser.add_argument("--db", action="append", choices=["postgres", "postgres15", "sqlite"])
    options = parser.parse_args()
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"Django {django.__version__}; medians of {options.rounds} rounds of {options.tasks} tasks.\n"
    )
    for name in options.db or ["postgres", "sqlite"]:
        compare(name, options.old, options)


if __name__ == "__main__":
    main()
