"""Run the test suite on one database or on each that this machine has.

    python -m tests.suite                          all of them
    python -m tests.suite --db sqlite -k status    one; what follows goes to pytest
    python -m tests.suite --engine portable        with the way to claim that works on every database

A server is started once for the whole run, not by each worker of pytest. A database that can not be had here
is called "not run" at the end, and is an error only where it was asked for by name.
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
#: The engine of two versions of a server is one: it is killed and cut off, and covered, on the newer one.
TWIN = "postgres15"
WITH_PROCESSES = ["--ignore=tests/faults", "--ignore=tests/worker"]
PYTEST = ["-m", "pytest"]
#: Takes a third longer.
COVERED = ["-m", "coverage", "run", *PYTEST]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.suite", description="Run the test suite.")
    parser.add_argument("--db", action="append", metavar="NAME", help=f"{', '.join(servers.ALL)}; or: all")
    parser.add_argument("--engine", choices=conf.SETTINGS["ENGINE"].choices, default="auto")
    options, arguments = parser.parse_known_args()
    asked = options.db or ["all"]
    names = servers.ALL if "all" in asked else tuple(asked)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    is_whole = "all" in asked and not any(not one.startswith("-") for one in arguments)
    results: dict[str, str] = {}
    failed = False
    for name in names:
        started = time.monotonic()
        try:
            with servers.start(name) as server:
                without = WITH_PROCESSES if is_whole and name == TWIN else []
                code = run(name, server, options.engine, [*arguments, *without])
        except servers.Unavailable as reason:
            results[name] = f"not run: {reason}"
            failed |= "all" not in asked
        else:
            seconds = f"{time.monotonic() - started:.0f} s"
            results[name] = f"{'FAILED' if code else 'passed'} in {seconds} {' '.join(without)}"
            failed |= bool(code)
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    print(f"\n{python}, Django {django.__version__}, engine {options.engine}")
    for name, result in results.items():
        print(f"  {name:<11} {result}")
    return int(failed)


def stop(number: int, frame: object) -> None:
    """Leave in order: pytest ends, the server is stopped. A second Ctrl-C does not cut that short."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)


def run(name: str, server: dict[str, object], engine: str, arguments: list[str]) -> int:
    """Run pytest on a started server; under coverage unless another run covers the same code."""
    print(f"\n=== {name} ===", flush=True)
    cell = (
        f"py{'.'.join(map(str, sys.version_info[:2]))}-django{'.'.join(map(str, django.VERSION[:2]))}"
        f"-{name}-{engine}"
    )
    COVERAGE.mkdir(parents=True, exist_ok=True)
    for old in COVERAGE.glob(f"data.{cell}.*"):
        old.unlink()
    pytest = PYTEST if name == TWIN or engine == "portable" else COVERED
    process = subprocess.Popen(
        [sys.executable, *pytest, *arguments],
        cwd=ROOT,
        env=os.environ
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
