"""Measures, and prints tables as Markdown: `python -m benchmarks`, which is `make bench`.

Without --long it takes less than ten minutes. Each contender gets its packages from the package index, into
an environment of its own below build/contenders. What this machine lacks is called "not run".
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks import charts, machine
from benchmarks.bench import Bench, Options, say
from benchmarks.figures import Table
from benchmarks.measures import (
    bulk,
    cost,
    decay,
    drain,
    enqueue,
    existing,
    indexes,
    kinds,
    load,
    neighbour,
    pickup,
    tasks,
    trigger,
)
from benchmarks.report import Report
from benchmarks.roster import CONTENDERS

MEASURES: dict[str, Callable[[Bench], Iterator[Table]]] = {
    "drain": drain.measure,
    "enqueue": enqueue.measure,
    "kinds": kinds.measure,
    "decay": decay.measure,
    "load": load.measure,
    "pickup": pickup.measure,
    "cost": cost.measure,
    "neighbour": neighbour.measure,
    "tasks": tasks.measure,
    "trigger": trigger.measure,
    "bulk": bulk.measure,
    "indexes": indexes.measure,
    "existing": existing.measure,
}
#: What is measured with --long, or by its name, and not else.
APART = ("tasks", "trigger", "bulk", "indexes", "existing")

DATABASES = ("postgres", "mariadb", "sqlite", "redis")


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.stored is None:
        report = _measured(_options(parser, arguments), arguments)
    else:
        report = _stored(parser, arguments)
    print(report.markdown())
    if arguments.save is not None:
        report.save(arguments.save)
    if arguments.charts is not None:
        for image in charts.draw(report.tables, arguments.charts):
            print(image)


def _stored(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Report:
    if arguments.measures:
        parser.error("with --from nothing is measured, so that no measure can be named")
    try:
        return Report.load(arguments.stored)
    except (OSError, ValueError) as error:
        parser.error(f"--from: {error}")


def _measured(options: Options, arguments: argparse.Namespace) -> Report:
    measures = arguments.measures or [name for name in MEASURES if arguments.long or name not in APART]
    with ExitStack() as stack:
        bench = Bench(options, stack)
        before = machine.load()
        tables: list[Table] = []
        for name in measures:
            began = time.monotonic()
            tables += bench.attempt(name, partial(_tables, bench, name)) or []
            say(f"{name} took {time.monotonic() - began:.0f} s")
        heading = (
            f"{machine.description(sorted(bench.versions))}\n"
            f"Medians of {options.rounds} rounds, of slow contenders and of the other measures than `drain` "
            f"{options.further_rounds}. Load of the machine before: {before}.\n"
        )
        return Report(heading, tables, bench.failures)


def _options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Options:
    long, servers = arguments.long, arguments.db or DATABASES
    full = tuple(MEASURES) if long else tuple(arguments.measures)
    is_full = "pickup" in full
    databases = [re.sub(r"^postgres\d+$", "postgres", name) for name in servers]
    _refuse(parser, "measure", arguments.measures, MEASURES)
    _refuse(parser, "database", databases, DATABASES)
    _refuse(parser, "contender", arguments.only or [], dict.fromkeys(one.name for one in CONTENDERS))
    return Options(
        full=full,
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
        waits=arguments.waits or (60 if is_full else 20),
        queues=arguments.queues or ([1, 10] if is_full else [1]),
        idle=(15.0 if is_full else 0.0) if arguments.idle is None else arguments.idle,
    )


def _tables(bench: Bench, name: str) -> list[Table]:
    return list(MEASURES[name](bench))


def _refuse(parser: argparse.ArgumentParser, what: str, given: Iterable[str], known: Iterable[str]) -> None:
    if unknown := set(given) - set(known):
        parser.error(f"there is no {what} {' or '.join(sorted(unknown))}, only {', '.join(known)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ", ".join(MEASURES)
    apart = ", ".join(APART)
    add("measures", nargs="*", metavar="MEASURE", help=f"{names}; without --long all but {apart} by default")
    add("--long", action="store_true", help="more tasks, more rounds, also four processes, and all measures")
    servers = f"{', '.join(DATABASES)} (all by default), or an installed PostgreSQL, as postgres15"
    add("--db", action="append", metavar="NAME", help=f"{servers}; can be given several times")
    add("--only", action="append", metavar="NAME", help="a contender; can be given several times")
    add("--tasks", type=_count, help="of a turn of the fastest")
    add("--rounds", type=_count)
    add("--processes", type=_count, nargs="+")
    add("--history", type=_size, nargs="+", help="finished rows in the full table")
    add("--decay-tasks", type=_count, help="of a turn under an open snapshot")
    add("--seconds", type=_seconds, help="of a turn of load or trigger, and of the client of neighbour alone")
    add("--waits", type=_count, help="tasks of a turn of pickup")
    add("--queues", type=_count, nargs="+", help="of one table, that a worker of pickup serves")
    add("--save", type=_file, metavar="FILE", help="store the figures there, as JSON")
    add("--charts", type=_folder, metavar="FOLDER", help="draw the charts of the tables into it, as SVG")
    stored = "measure nothing: print, and draw, what --save has stored"
    add("--from", type=Path, metavar="FILE", dest="stored", help=stored)
    add("--idle", type=_idle, help="seconds without a task, in pickup; 0: it is not measured")
    return parser


def _file(text: str) -> Path:
    if (file := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(file.parent)!r}")
    return file


def _folder(text: str) -> Path:
    if not charts.is_possible():
        raise argparse.ArgumentTypeError("charts need matplotlib, which `make .venv/.charts` installs")
    if (folder := Path(text)).exists() and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return folder


def _count(text: str) -> int:
    if not text.isdigit() or (count := int(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return count


def _size(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, more than 0 and up to 3600")
    return seconds


def _idle(text: str) -> float:
    return 0.0 if text == "0" else _seconds(text)


if __name__ == "__main__":
    main()
