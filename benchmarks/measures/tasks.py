"""Django tasks: how fast they are added and run, and how soon one runs again whose worker was killed."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.actions import count_told, told
from benchmarks.bench import Bench
from benchmarks.crew import Load, end
from benchmarks.figures import Cell, Row, Table, number, ratio
from benchmarks.roster import DJANGO_TASKS, OUR_TASKS, Contender

#: Tasks of a turn in which each is committed by itself, at most; no turn of a drain has fewer than these.
_MOST_SINGLE, _FEWEST = 2000, 500
#: Seconds in which a worker is up, and those for which a task is waited for.
_START, PATIENCE = 5.0, 60.0

_RULE = (
    "Tasks per second that do nothing, on PostgreSQL: added by one process one at a time, each committed by "
    "itself, and as many at once as the interface takes; and run with {processes} processes, from when all "
    "are up to the commit of the last outcome, as in the measure `drain`. Contenders take turns."
)
_RULE_OF_RECOVERY = (
    "Seconds from SIGKILL of all processes of one worker, which runs a task, until that is begun by another "
    "one, which has nothing to do; not waited for longer than {patience:.0f} s."
)

_Found = dict[str, list[float]]


def measure(bench: Bench) -> Iterator[Table]:
    yield _of_rates(bench)
    yield _of_recovery(bench)


# How fast


def _of_rates(bench: Bench) -> Table:
    contenders, processes = bench.contenders(DJANGO_TASKS), bench.options.processes
    kinds = ["enqueue_singly", "enqueue", *map(str, processes)]
    rates: dict[Contender, _Found] = {one: {kind: [] for kind in kinds} for one in contenders}
    for done in range(bench.options.rounds):
        for contender in contenders:
            if contender.is_slow and done >= bench.options.further_rounds:
                continue
            for kind in kinds:
                if (rate := _rate(bench, contender, kind)) is not None:
                    rates[contender][kind].append(rate)
    ours = rates.get(OUR_TASKS, {})
    return Table(
        "tasks",
        "Django tasks",
        _RULE.format(processes=" and ".join(map(str, processes))),
        (
            *("", "settings", "one at a time", "many at once"),
            *(f"run by {n} process{'es' if n > 1 else ''}" for n in processes),
            "ModelQueue to it",
        ),
        [
            (
                one.name,
                one.settings,
                *(found[kind] or "" for kind in kinds),
                " / ".join(ratio(ours.get(kind, []), found[kind]) or "-" for kind in kinds),
            )
            for one, found in rates.items()
            if any(found.values())
        ],
    )


def _rate(bench: Bench, contender: Contender, kind: str) -> float | None:
    """Add tasks ("enqueue", "enqueue_singly"), or have them run by so many processes."""
    if kind == "enqueue" and not contender.adds_many:
        return None
    if kind.startswith("enqueue"):
        tasks = bench.options.tasks if kind == "enqueue" else min(bench.options.tasks, _MOST_SINGLE)

        def add() -> float:
            return tasks / bench.crew(contender, Load(tasks)).do("create", kind, tasks)[kind]

        return bench.attempt(f"{kind} of {tasks:,} Django tasks: {contender.name}", add)
    tasks = max(_FEWEST, int(bench.options.tasks * contender.share))
    what = f"drain of {tasks:,} Django tasks: {contender.name}, {kind} at work"
    return bench.attempt(what, lambda: bench.crew(contender, Load(tasks, int(kind))).drain().rate)


# How soon again


def _of_recovery(bench: Bench) -> Table:
    cases = [
        (one, words, environment)
        for one in bench.contenders(DJANGO_TASKS)
        for words, environment in [
            ("defaults", {}),
            *([(one.quickest_in_words, one.quickest)] if one.quickest else []),
        ]
    ]
    rows: list[Row] = []
    for contender, words, environment in cases:
        times: list[float] = []
        turns = 0
        for _ in range(bench.options.further_rounds):
            what = f"recovery of a task: {contender.name}, {words}"
            found = bench.attempt(
                what, lambda contender=contender, more=environment: (_seconds(bench, contender, **more),)
            )
            if found is not None:
                turns += 1
                times += [one for one in found if one is not None]
        if turns:
            rows.append((contender.name, words, _in_words(times, turns)))
    return Table(
        "recovery",
        "How soon the task of a killed worker runs again",
        _RULE_OF_RECOVERY.format(patience=PATIENCE),
        ("", "settings", "seconds"),
        rows,
    )


def _in_words(times: list[float], turns: int) -> Cell:
    if len(times) == turns:
        return times
    never = f"not in {PATIENCE:.0f} s"
    return f"{never} ({number(turns - len(times))} of {turns})" if turns > 1 else never


def _seconds(bench: Bench, contender: Contender, **environment: str) -> float | None:
    """Kill the worker that runs a task; return after how long another one begins it; None: it does not."""
    crew = bench.crew(contender, Load(0, kind="sleep 10 min"), **environment)
    with tempfile.TemporaryDirectory(prefix="modelqueue-") as folder, tempfile.TemporaryFile("w+") as log:
        path = Path(folder) / "told"
        crew.more["BENCHMARK_TOLD"] = str(path)
        crew.do("create")
        workers = [crew.start(log, "work") for _ in range(2)]
        try:
            time.sleep(_START)
            crew.do("enqueue_singly", 1)
            if not _waited(path, 1, PATIENCE):
                raise RuntimeError("no worker has begun the task")
            ((_moment, process, _task),) = told(path)
            os.killpg(os.getpgid(process), signal.SIGKILL)
            killed = time.time()
            if not _waited(path, 2, PATIENCE):
                return None
            return max(moment for moment, _process, _task in told(path)) - killed
        finally:
            for worker in workers:
                worker.kill()  # as the task would not let it end
            end(workers)


def _waited(path: Path, count: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while count_told(path) < count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
