"""How soon a task begins while many are added: under half of the load that worker and producers bear."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks.actions import count_told, told
from benchmarks.bench import Bench
from benchmarks.crew import Crew, Load
from benchmarks.figures import Row, Table, median, number, quantile, spread
from benchmarks.roster import OURS
from benchmarks.stores import Postgres

_PRODUCERS = 8
#: Seconds until all of them are up.
_START = 5.0
#: Seconds in which the worker has to have done what is left.
_PATIENCE = 60.0

_RULE = (
    "Milliseconds from when the answer to the commit of a task came back to who added it, to the first line "
    "of its action, by the clock of this machine. {producers} processes add one task per commit at random "
    "moments for {seconds:g} s; a worker of one process with {threads} threads serves them, on PostgreSQL. "
    "All add together half of the maximal rate, which is that of adding what they can for as long, and of "
    "running it to the last. The trigger is that of `AddNotifyTrigger`; the snapshot is one of REPEATABLE "
    "READ, open all the time."
)
_CASES = [(trigger, snapshot) for trigger in (False, True) for snapshot in (False, True)]


@dataclass
class _Turn:
    rate: float
    """Tasks in a second, from the first that was added to the last that was begun."""
    waits: list[float]
    """Milliseconds of each."""


def measure(bench: Bench) -> Iterator[Table]:
    seconds = bench.options.seconds
    maximal = []
    for _ in range(bench.options.further_rounds):
        turn = bench.attempt(
            "maximal rate of worker and producers", lambda: _turn(bench, 0.0, seconds, True, False)
        )
        if turn is not None:
            maximal.append(turn.rate)
    if not maximal:
        return
    rate = median(maximal) / 2
    turns: dict[tuple[bool, bool], list[_Turn]] = {case: [] for case in _CASES}
    for _ in range(bench.options.further_rounds):
        for (trigger, snapshot), found in turns.items():
            what = f"{rate:,.0f} tasks/s; {_words(trigger, snapshot)}"
            turn = bench.attempt(
                what,
                lambda trigger=trigger, snapshot=snapshot: _turn(bench, rate, seconds, trigger, snapshot),
            )
            if turn is not None:
                found.append(turn)
    rows: list[Row] = []
    for (trigger, snapshot), found in turns.items():
        quantiles = [[quantile(turn.waits, percent) for turn in found] for percent in (50, 95, 99)]
        longest = [max(turn.waits) for turn in found]
        rates = [turn.rate for turn in found]
        rows.append((_words(trigger, snapshot), rates, *quantiles, longest))
    yield Table(
        "load",
        "How soon a task begins under load",
        _RULE.format(producers=_PRODUCERS, seconds=seconds, threads=Load(0).threads),
        ("", "tasks/s", "p50", "p95", "p99", "longest"),
        rows,
        (f"Maximal rate: {spread(maximal)} tasks/s, half of it: {number(rate)}.",),
    )


def _words(trigger: bool, snapshot: bool) -> str:
    return f"{'with' if trigger else 'without'} a trigger, {'an open' if snapshot else 'no'} snapshot"


def _turn(bench: Bench, rate: float, seconds: float, trigger: bool, snapshot: bool) -> _Turn:
    """Have tasks added and run; at a rate of 0, as many as can be."""
    with tempfile.TemporaryDirectory(prefix="modelqueue-") as folder:
        begun, produced = Path(folder) / "begun", Path(folder) / "produced"
        crew = bench.crew(
            OURS,
            Load(0),
            BENCHMARK_TOLD=str(begun),
            BENCHMARK_PRODUCED=str(produced),
            BENCHMARK_SECONDS=str(seconds),
            BENCHMARK_RATE=str(rate / _PRODUCERS),
        )
        assert isinstance(crew.store, Postgres)
        crew.do("create", *(["listen"] if trigger else []))
        crew.store.settle()
        with crew.store.snapshot() if snapshot else nullcontext(), crew.working():
            begin = _produce(crew, seconds)
            files = list(Path(folder).glob("produced-*"))
            _wait_for(begun, sum(map(count_told, files)))
        first: dict[int, float] = {}
        for moment, _process, task in sorted(told(begun)):
            first.setdefault(task, moment)
        committed = {task: moment for file in files for moment, _process, task in told(file)}
        waits = [(first[task] - moment) * 1000 for task, moment in committed.items()]
        return _Turn(len(first) / (max(first.values()) - begin), waits)


def _produce(crew: Crew, seconds: float) -> float:
    """Have the tasks added; return when that began."""
    begin, patience = time.time() + _START, _START + seconds + _PATIENCE
    crew.more["BENCHMARK_BEGIN"] = str(begin)
    producers = [crew.start(subprocess.DEVNULL, "produce", number) for number in range(_PRODUCERS)]
    try:
        if any([producer.wait(patience) for producer in producers]):  # noqa: C419  (each is waited for)
            raise RuntimeError("A producer has failed.")
    finally:
        for producer in producers:
            producer.kill()
            producer.wait()
    return begin


def _wait_for(begun: Path, count: int) -> None:
    deadline = time.monotonic() + _PATIENCE
    while count_told(begun) < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"Of {count:,} tasks {count_told(begun):,} were begun.")
        time.sleep(0.05)
