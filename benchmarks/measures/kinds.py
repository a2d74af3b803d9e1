"""How near the worker comes to what tasks that take time allow at most: processor, threads, an event loop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.actions import SLEEPS, SPINS
from benchmarks.bench import Bench
from benchmarks.crew import Load
from benchmarks.figures import Row, Table
from benchmarks.roster import OURS, PGQUEUER, PROCRASTINATE, Contender

_RULE = (
    "Tasks per second, counted as in the first table, on PostgreSQL. The ideal, which is the ceiling here, "
    "is what all slots would do that never wait for a next task: slots by seconds of a task, and for tasks "
    "of the processor cores by seconds."
)
#: Seconds that a turn would take ideally.
_SECONDS = 2.0


@dataclass(frozen=True)
class _Case:
    kind: str
    processes: int
    threads: int = 4
    slots: int = 0
    tasks: int = 0
    """0: as many as take some seconds."""

    @property
    def ideal(self) -> float:
        if self.kind in SPINS:
            return min(self.processes, os.cpu_count() or 1) / SPINS[self.kind]
        return self.processes * (self.slots or self.threads) / SLEEPS[self.kind]

    @property
    def slots_in_words(self) -> str:
        return f"{self.processes} x {f'{self.slots} of a loop' if self.slots else f'{self.threads} threads'}"


_THREADED = [
    _Case("1 ms of CPU", 1),
    _Case("1 ms of CPU", 2),
    _Case("sleep 10 ms", 1, threads=8),
    _Case("sleep 10 ms", 2, threads=8),
    _Case("sleep 50 ms", 2, threads=8, tasks=1000),
]
_ASYNCHRONOUS = [
    _Case("sleep 10 ms", 1, slots=100),
    _Case("sleep 50 ms", 1, slots=200),
]


def measure(bench: Bench) -> Iterator[Table]:
    cells: list[tuple[Contender, _Case]] = [(OURS, case) for case in [*_THREADED, *_ASYNCHRONOUS]]
    cells += [(peer, case) for case in _ASYNCHRONOUS for peer in (PGQUEUER, PROCRASTINATE)]
    wanted = bench.contenders((OURS, PGQUEUER, PROCRASTINATE))
    cells = [(contender, case) for contender, case in cells if contender in wanted]
    rates: dict[tuple[Contender, _Case], list[float]] = {cell: [] for cell in cells}
    for _ in range(bench.options.further_rounds):
        for contender, case in cells:
            if (rate := _turn(bench, contender, case)) is not None:
                rates[contender, case].append(rate)
    rows: list[Row] = []
    for (contender, case), found in rates.items():
        shares = [rate / case.ideal for rate in found]
        rows.append((contender.name, case.kind, case.slots_in_words, found, case.ideal, shares))
    header = "", "a task", "slots", "tasks/s", "ideal", "share of it"
    yield Table("kinds", "Tasks that take time", _RULE, header, rows)


def _turn(bench: Bench, contender: Contender, case: _Case) -> float | None:
    tasks = case.tasks or int(case.ideal * _SECONDS * contender.share)
    load = Load(tasks, case.processes, case.kind, case.threads, case.slots)
    what = f"{tasks:,} tasks, {case.kind}: {contender.name}, {case.slots_in_words}"
    return bench.attempt(what, lambda: bench.crew(contender, load).drain().rate)
