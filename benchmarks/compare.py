"""Compare this checkout with modelqueue 2.2.1: tasks per second of one process on SQLite and PostgreSQL.

    python benchmarks/compare.py PYTHON_WITH_2.2.1 [--count 1000] [--rounds 5]

The two take turns, so that a machine that gets slower meanwhile slows both. Commits are durable, as in
production. One process and an action that does next to nothing: this shows what a task costs, not how many
workers help.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import django

from tests import servers

RATE = Path(__file__).parent / "rate.py"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare this checkout with modelqueue 2.2.1.")
    parser.add_argument("old", help="a Python that has modelqueue 2.2.1")
    parser.add_argument("--count", type=int, default=1000, help="tasks of a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    print(f"{platform.platform()}, Python {platform.python_version()}, Django {django.__version__}")
    print(f"medians of {options.rounds} rounds of {options.count} tasks, in tasks per second\n")
    print(f"{'':38}{'2.2.1':>8}{'now':>8}{'ratio':>8}")
    for database in ("sqlite", "postgres"):
        with (
            servers.start(database, durable=True) as server,
            tempfile.TemporaryDirectory(prefix="modelqueue-") as folder,
        ):
            name = "postgres" if database == "postgres" else str(Path(folder) / "tasks.sqlite3")
            old, new = [], []
            for _ in range(options.rounds):
                for python, rates in [(options.old, old), (sys.executable, new)]:
                    rates.append(measure(python, {**server, "NAME": name}, options.count))
        for what in new[0]:
            before, after = (statistics.median(rates[what] for rates in side) for side in (old, new))
            print(f"{database + ': ' + what:38}{before:8.0f}{after:8.0f}{after / before:8.2f}")


def measure(python: str, database: dict[str, object], count: int) -> dict[str, float]:
    output = subprocess.check_output([python, RATE, json.dumps(database), str(count)], text=True)
    return json.loads(output.splitlines()[-1])


if __name__ == "__main__":
    main()
