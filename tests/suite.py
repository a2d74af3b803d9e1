"""Run the test suite on one database or on each that this machine has.

    python -m tests.suite                          on one of each kind
    python -m tests.suite --db sqlite -k status    on one; what follows goes to pytest
    python -m tests.suite --db postgres15 --part   on another version: what it may take differently
    python -m tests.suite --engine portable        with the way to claim that works on every database

A server is started once for the whole run, not by each worker of pytest. Where all databases are asked for,
what can find nothing new on one of them is left out there: it has passed "in part". A database that can not
be had here is called "not run" at the end, and is an error only where it was asked for by name.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import django

from modelqueue import conf
from tests import servers

ROOT = Path(__file__).parent.parent
COVERAGE = ROOT / "build" / "coverage"
EVERYWHERE = ("sqlite", "postgres", "mariadb")
#: Where the portable engine claims in another way than the one that is chosen by itself.
WITH_OWN_CLAIM = ("sqlite", "postgres")


def files(*names: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in names]


#: What another version may take differently: the statements, how they are planned, and when they wait.
OF_STATEMENTS = files(
    "changes",
    "claims",
    "connections",
    "doctor",
    "enqueue",
    "fence",
    "migrations",
    "operations",
    "outer_transaction",
    "prepared",
    "processes",
    "query_plan",
    "querysets",
    "races",
    "recovery",
    "renewal",
    "run",
    "written_where_assigned",
)
#: What may come of another way to claim. (The faults draw the way, or come at what all have in common.)
OF_CLAIMS = files(
    "arun",
    "atomic",
    "changes",
    "claims",
    "connections",
    "fence",
    "hooks",
    "kept_leases",
    "kill",
    "leases",
    "outcomes_together",
    "outer_transaction",
    "prepared",
    "query_plan",
    "querysets",
    "queues",
    "races",
    "recovery",
    "renewal",
    "rollbacks",
    "run",
    "signals_and_logs",
    "testing",
    "written_where_assigned",
)
#: What has to do with no database, or starts one itself: run with the first.
NEED_NO_DATABASE = files(
    "backoff",
    "benchmarks",
    "demo",
    "outcomes",
    "package",
    "status",
    "threads",
    "tutorial",
) + [f"tests/worker/test_{name}.py" for name in ("board", "pools", "reload", "slots", "suspects", "system")]
PYTEST = ["-m", "pytest"]
#: Takes a third longer, so only where it is asked for.
COVERED = ["-m", "coverage", "run", *PYTEST]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.suite", description="Run the test suite.")
    parser.add_argument("--db", action="append", metavar="NAME", help=f"{', '.join(servers.ALL)}; or: all")
    parser.add_argument("--engine", choices=conf.SETTINGS["ENGINE"].choices, default="auto")
    parser.add_argument(
        "--part",
        action="store_true",
        help="leave out what can find nothing new there, and all of it where there is no such database",
    )
    parser.add_argument("--cover", action="store_true", help="also write down what is covered")
    options, arguments = parser.parse_known_args()
    asked = options.db or ["all"]
    everywhere = WITH_OWN_CLAIM if options.engine == "portable" else EVERYWHERE
    names = dict.fromkeys(name for one in asked for name in (everywhere if one == "all" else [one]))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    # Who names files means those.
    is_part = options.part or ("all" in asked and all(one.startswith("-") for one in arguments))
    results: dict[str, str] = {}
    failed = False
    for name in names:
        started = time.monotonic()
        try:
            with servers.start(name) as server:
                part = part_for(name, options.engine) if is_part else []
                code = run(name, server, options, [*arguments, *part])
        except servers.Unavailable as reason:
            results[name] = f"not run: {reason}"
            failed |= not options.part and "all" not in asked
        else:
            seconds = f"{time.monotonic() - started:.0f} s"
            results[name] = f"{'FAILED' if code else 'passed'} in {seconds}{', in part' * bool(part)}"
            failed |= bool(code)
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    print(f"\n{python}, Django {django.__version__}, engine {options.engine}")
    for name, result in results.items():
        print(f"  {name:<11} {result}")
    return int(failed)


def part_for(name: str, engine: str) -> list[str]:
    """Tell pytest what can find something here which is not found elsewhere."""
    if engine == "portable":
        return OF_CLAIMS
    if is_twin(name):
        return OF_STATEMENTS
    return [] if name == EVERYWHERE[0] else [f"--ignore={file}" for file in NEED_NO_DATABASE]


def is_twin(name: str) -> bool:
    """Say whether it is another version of a server: its engine is one, and is covered on the newer one."""
    return name.startswith("postgres") and name != "postgres"


def stop(number: int, frame: object) -> None:
    """Leave in order: pytest ends, the server is stopped. A second Ctrl-C does not cut that short."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)


def run(name: str, server: dict[str, object], options: argparse.Namespace, arguments: list[str]) -> int:
    """Run pytest on a started server; under coverage if asked, unless another run covers the same code."""
    print(f"\n=== {name} ===", flush=True)
    engine = options.engine
    cell = (
        f"py{'.'.join(map(str, sys.version_info[:2]))}-django{'.'.join(map(str, django.VERSION[:2]))}"
        f"-{name}-{engine}"
    )
    # Some images set it: then each process that a test starts compiles all of Django, which is four times as
    # much work.
    inherited = {name: os.environ[name] for name in os.environ if name != "PYTHONDONTWRITEBYTECODE"}
    COVERAGE.mkdir(parents=True, exist_ok=True)
    is_covered = options.cover and not is_twin(name) and engine != "portable"
    for old in COVERAGE.glob(f"data.{cell}.*") if is_covered else []:
        old.unlink()
    process = subprocess.Popen(
        [sys.executable, *(COVERED if is_covered else PYTEST), *arguments],
        cwd=ROOT,
        env=inherited
        | {
            "COVERAGE_FILE": str(COVERAGE / f"data.{cell}"),
            "MODELQUEUE_TEST_DATABASES": json.dumps(servers.databases(server)),
            "MODELQUEUE_TEST_ENGINE": engine,
            "MODELQUEUE_TEST_SERVER": name,
        },
    )
    try:
        return process.wait()
    finally:
        # After Ctrl-C pytest has got it too and needs a moment to say what failed so far.
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
