"""Measures, and prints tables as Markdown: `python -m benchmarks`, which is `make bench`.

Without --long it takes less than ten minutes. Each contender gets its packages from the package index, into
an environment of its own below build/peers. What this machine lacks is called "not run".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial

from benchmarks import machine
from benchmarks.bench import Bench, Options
from benchmarks.figures import Table
from benchmarks.measures import cost, decay, drain, enqueue, kinds, load

MEASURES: dict[str, Callable[[Bench], Iterator[Table]]] = {
    "drain": drain.measure,
    "enqueue": enqueue.measure,
    "kinds": kinds.measure,
    "decay": decay.measure,
    "load": load.measure,
    "cost": cost.measure,
}


DATABASES = ("postgres", "mariadb", "sqlite", "redis")


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    long, servers = arguments.long, arguments.db or DATABASES
    databases = [name.rstrip("0123456789") for name in servers]
    _refuse(parser, "measure", set(arguments.measures) - set(MEASURES), MEASURES)
    _refuse(parser, "database", set(databases) - set(DATABASES), DATABASES)
    options = Options(
        tasks=arguments.tasks or (100_000 if long else 20_000),
        rounds=arguments.rounds or (5 if long else 3),
        further_rounds=arguments.rounds or (5 if long else 1),
        processes=arguments.processes or ([1, 2, 4] if long else [1, 2]),
        databases=databases,
        postgres=next((name for name in servers if name.startswith("postgres")), "postgres"),
        only=arguments.only or [],
        history=arguments.history or ([1_000_000] if long else [200_000]),
        decay_tasks=arguments.decay_tasks or (300_000 if long else 30_000),
        seconds=arguments.seconds or (20.0 if long else 5.0),
    )
    with ExitStack() as stack:
        bench = Bench(options, stack)
        before = machine.load()
        tables: list[Table] = []
        for name in arguments.measures or MEASURES:
            tables += bench.attempt(name, partial(_tables, bench, name)) or []
        print(machine.description(sorted(bench.versions)))
        print(
            f"Medians of {options.rounds} rounds, of slow contenders and of the other measures than `drain` "
            f"{options.further_rounds}. Load of the machine before: {before}.\n"
        )
        for table in tables:
            print(table.markdown())
        for what, why in bench.failures.items():
            print(f"- {what}: not run: {why}")


def _tables(bench: Bench, name: str) -> list[Table]:
    return list(MEASURES[name](bench))


def _refuse(parser: argparse.ArgumentParser, what: str, unknown: set[str], known: Iterable[str]) -> None:
    if unknown:
        parser.error(f"there is no {what} {' or '.join(sorted(unknown))}, only {', '.join(known)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("measures", nargs="*", metavar="MEASURE", help=f"{', '.join(MEASURES)}; all of them by default")
    add("--long", action="store_true", help="more tasks, more rounds, also four processes")
    servers = f"{', '.join(DATABASES)} (all by default), or an installed PostgreSQL, as postgres15"
    add("--db", action="append", metavar="NAME", help=f"{servers}; can be given several times")
    add("--only", action="append", metavar="NAME", help="a contender; can be given several times")
    add("--tasks", type=int, help="of a turn of the fastest")
    add("--rounds", type=int)
    add("--processes", type=int, nargs="+")
    add("--history", type=int, nargs="+", help="finished rows in the full table")
    add("--decay-tasks", type=int, help="of a turn under an open snapshot")
    add("--seconds", type=float, help="of a turn under load")
    return parser


if __name__ == "__main__":
    main()
