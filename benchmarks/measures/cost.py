"""What a task costs the database and the processor, and how much memory a worker takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from benchmarks.bench import Bench
from benchmarks.crew import Load, Turn
from benchmarks.figures import Row, Table
from benchmarks.machine import memory, processor
from benchmarks.roster import OURS, PGQUEUER, PROCRASTINATE, RAW, Contender

_INDEXES = (0, 4, 8)
#: Each statement of theirs goes into the server's log.
_LOGGED_TASKS = 2000

_RULE_OF_TASKS = (
    "For each task, from before the first claim to the end of the worker, one process on PostgreSQL. The log "
    "is that of {tasks} tasks, whole pages after a checkpoint among it; statements (BEGIN and COMMIT too) "
    "are those that the server writes down when it is told to log all, of {logged} tasks. The "
    "microseconds of the processor are those of the worker with all its processes, from its first claim on, "
    "and those of the server."
)
_RULE_OF_MEMORY = (
    "MiB of the worker with one process and of all that it has started, the most that was seen during a "
    "drain; memory that processes share counts once (PSS)."
)
#: As many take a worker of the fastest a second.
_SEEN_TASKS = 10_000
#: Seconds between two looks.
_PAUSE = 0.2


def measure(bench: Bench) -> Iterator[Table]:
    yield _of_tasks(bench)
    yield _of_memory(bench)


def _of_tasks(bench: Bench) -> Table:
    rows: list[Row] = []
    for contender in bench.contenders((OURS, RAW, PGQUEUER)):
        for indexes in _INDEXES if contender.table == OURS.table else (0,):
            found = bench.attempt(
                f"what a task costs: {contender.name}, {indexes} further indexes",
                lambda contender=contender, indexes=indexes: _cost(bench, contender, indexes),
            )
            if found is not None:
                rows.append((contender.name, indexes, *found))
    rule = _RULE_OF_TASKS.format(tasks=f"{bench.options.tasks:,}", logged=f"{_LOGGED_TASKS:,}")
    costs = "bytes of the log", "transactions", "statements", "us of the worker", "us of the server"
    return Table("cost", "What a task costs", rule, ("", "further indexes", *costs), rows)


def _cost(bench: Bench, contender: Contender, indexes: int) -> list[float]:
    taken: list[float] = []

    def look(worker: int) -> None:
        taken.append(processor(worker))

    turn = _turn(bench, contender, indexes, bench.options.tasks, look)
    with bench.postgres().logging():
        logged = _turn(bench, contender, indexes, _LOGGED_TASKS, lambda worker: None)
    spent, tasks = turn.spent, len(turn.outcomes)
    seconds = max(taken) - taken[0], spent.processor
    return [
        spent.bytes / tasks,
        spent.transactions / tasks,
        logged.spent.statements / len(logged.outcomes),
        *(one / tasks * 1_000_000 for one in seconds),
    ]


def _turn(bench: Bench, contender: Contender, indexes: int, tasks: int, watch: Callable[[int], None]) -> Turn:
    return bench.crew(contender, Load(tasks), BENCHMARK_INDEXES=str(indexes)).drain(watch=watch)


def _of_memory(bench: Bench) -> Table:
    rows: list[Row] = []
    is_full = "cost" in bench.options.full
    for contender in bench.contenders() if is_full else bench.contenders((OURS, PGQUEUER, PROCRASTINATE)):
        if contender is not RAW:
            most = bench.attempt(
                f"memory of {contender.name} on {contender.store}",
                lambda contender=contender: _memory(bench, contender),
            )
            if most is not None:
                rows.append((contender.name, bench.store(contender.store).version, most))
    return Table("memory", "Memory", _RULE_OF_MEMORY, ("", "store", "MiB"), rows)


def _memory(bench: Bench, contender: Contender) -> float:
    seen = [0.0]

    def look(process: int) -> None:
        seen.append(memory(process))
        time.sleep(_PAUSE)

    tasks = max(500, int(_SEEN_TASKS * contender.share))
    bench.crew(contender, Load(tasks)).drain(watch=look)
    return max(seen)
