"""Whether the worker stays as fast as it is: under old transactions, and with many finished rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from benchmarks.bench import Bench
from benchmarks.crew import Crew, Load
from benchmarks.figures import Row, Table, ratio
from benchmarks.roster import OURS
from benchmarks.stores import Postgres

_SNAPSHOTS = ("none", "a new one every 2 s", "one all the time")


@dataclass(frozen=True)
class _Rates:
    of_all: float
    tenths: list[float]


_RULE_OF_SNAPSHOTS = (
    "Tasks per second of one process on PostgreSQL, among the first and among the last tenth of {tasks} "
    "tasks, by when their outcomes were committed, while a transaction of REPEATABLE READ is open elsewhere."
)
_RULE_OF_TENTHS = "Tasks per second of the same turns, of each tenth of the tasks."
_RULE_OF_HISTORY = (
    "Tasks per second of one process on PostgreSQL, counted as in the first table; {tasks} tasks in a table "
    "that has so many finished rows already."
)


def measure(bench: Bench) -> Iterator[Table]:
    yield from _under_snapshots(bench)
    yield _with_history(bench)


def _under_snapshots(bench: Bench) -> Iterator[Table]:
    tasks = bench.options.decay_tasks
    turns: dict[str, list[_Rates]] = {snapshot: [] for snapshot in _SNAPSHOTS}
    for _ in range(bench.options.further_rounds):
        for snapshot, found in turns.items():
            turn = bench.attempt(
                f"{tasks:,} tasks, snapshots: {snapshot}",
                lambda snapshot=snapshot: _turn_under(bench.crew(OURS, Load(tasks)), snapshot),
            )
            if turn is not None:
                found.append(turn)
    rows: list[Row] = []
    rows_of_tenths: list[Row] = []
    for snapshot, found in turns.items():
        tenths = [[rates.tenths[place] for rates in found] for place in range(10)]
        kept = [rates.tenths[-1] / rates.tenths[0] for rates in found]
        rows.append((snapshot, [rates.of_all for rates in found], tenths[0], tenths[-1], kept))
        rows_of_tenths.append((snapshot, *tenths))
    header = "open snapshots", "tasks/s", "first tenth", "last tenth", "last to first"
    rule = _RULE_OF_SNAPSHOTS.format(tasks=f"{tasks:,}")
    yield Table("snapshots", "Old transactions", rule, header, rows)
    header_of_tenths = "open snapshots", *(str(place) for place in range(1, 11))
    yield Table("tenths", "Old transactions, by tenths", _RULE_OF_TENTHS, header_of_tenths, rows_of_tenths)


def _turn_under(crew: Crew, snapshot: str) -> _Rates:
    assert isinstance(crew.store, Postgres)
    beside: dict[str, AbstractContextManager[None]] = {
        "none": nullcontext(),
        "a new one every 2 s": crew.store.snapshot(2.0),
        "one all the time": crew.store.snapshot(),
    }
    turn = crew.drain(beside=beside[snapshot])
    return _Rates(turn.rate, [turn.rate_of_tenth(place) for place in range(10)])


def _with_history(bench: Bench) -> Table:
    tasks, sizes = bench.options.tasks, [0, *bench.options.history]
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(bench.options.further_rounds):
        for size, found in rates.items():
            rate = bench.attempt(
                f"{tasks:,} tasks after {size:,} finished ones", lambda size=size: _rate_after(bench, size)
            )
            if rate is not None:
                found.append(rate)
    rows = [(size, found, ratio(found, rates[0])) for size, found in rates.items()]
    rule = _RULE_OF_HISTORY.format(tasks=f"{tasks:,}")
    return Table("history", "History", rule, ("finished rows", "tasks/s", "to none"), rows)


def _rate_after(bench: Bench, size: int) -> float:
    return bench.crew(OURS, Load(bench.options.tasks)).drain(history=size).rate
