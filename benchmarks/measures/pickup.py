"""How soon a worker begins a task when it has nothing else to do, and what it sends while it has nothing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks.bench import Bench
from benchmarks.crew import Crew, Load
from benchmarks.figures import Row, Table, median, quantile
from benchmarks.moments import moments
from benchmarks.roster import OURS, PGQUEUER, PROCRASTINATE, Contender

_OURS = replace(
    OURS, module="pickup_modelqueue", environment={"BENCHMARK_APPS": "modelqueue benchmarks.shared"}
)
_CONTENDERS = (
    _OURS,
    replace(PGQUEUER, module="pickup_pgqueuer"),
    replace(PROCRASTINATE, module="pickup_procrastinate"),
)

_RULE_BESIDE_OTHERS = (
    "Milliseconds from when the answer to the commit of a task came back to who added it, to the first line "
    "of its action, by the clock of this machine. Each worker is as its documentation begins, with its "
    "defaults, on PostgreSQL; ours has a trigger. They take turns; a turn is {warm_up} tasks, and then "
    "{tasks} that count: one at a time, at random moments while there was work lately."
)
_RULE_OF_OURS = (
    "Milliseconds as before, of a worker of {processes} processes: while there was work lately, and after "
    "{idle:g} s without a task. Queues are of one table. In between the idle worker is looked at for "
    "{look:g} s: what it sends to the database in a second."
)
#: Tasks of a turn before those that count.
_WARM_UP = 20
#: Seconds between two tasks: at least, and at most.
_PAUSE = 0.05, 0.5
#: The same where the worker need not be told of a task: it looks at times of its own.
_LONG_PAUSE = 0.05, 1.0

_PROCESSES = 4
#: Times without a task in a turn.
_IDLES = 3
#: Seconds at the end of each in which is counted what the worker sends, at most.
_LOOK = 5.0
#: The store, and whether there is a trigger.
_CASES = (("postgres", True), ("postgres", False), ("mariadb", False), ("sqlite", False))

_Add = Callable[[int], float]


def measure(bench: Bench) -> Iterator[Table]:
    yield _beside_others(bench)
    if bench.options.idle:
        yield _of_ours(bench)


def _beside_others(bench: Bench) -> Table:
    contenders, tasks = bench.contenders(_CONTENDERS), bench.options.waits
    cells = [(contender, queues) for queues in bench.options.queues for contender in contenders]
    waits: dict[tuple[Contender, int], list[list[float]]] = {cell: [] for cell in cells}
    for _ in range(bench.options.further_rounds):
        for (contender, queues), found in waits.items():
            turn = bench.attempt(
                f"pick-up of {tasks} tasks of {queues} queues: {contender.name}",
                lambda contender=contender, queues=queues: _turn(bench, contender, queues),
            )
            if turn is not None:
                found.append(turn)
    rows: list[Row] = []
    for (contender, queues), found in waits.items():
        quantiles = [[quantile(turn, percent) for turn in found] for percent in (50, 95, 99)]
        rows.append((contender.name, queues, *quantiles, [max(turn) for turn in found]))
    rule = _RULE_BESIDE_OTHERS.format(warm_up=_WARM_UP, tasks=tasks)
    header = "", "queues", "p50", "p95", "p99", "longest"
    return Table("pickup", "How soon a worker begins a task", rule, header, rows)


def _turn(bench: Bench, contender: Contender, queues: int) -> list[float]:
    """Return after how many milliseconds each task was begun."""
    with moments() as begun:
        crew = _crew(bench, contender, queues, 1, begun.address)
        crew.do("create", *(["listen"] if contender is _OURS else []))
        with crew.working(), crew.feeding() as add:
            waits = []
            for _ in range(_WARM_UP + bench.options.waits):
                committed = add(random.randrange(queues))
                waits.append((begun.next() - committed) * 1000)
                time.sleep(random.uniform(*_PAUSE))
            return waits[_WARM_UP:]


def _crew(bench: Bench, contender: Contender, queues: int, processes: int, address: str) -> Crew:
    more = {"BENCHMARK_QUEUES": str(queues), "BENCHMARK_MOMENTS": address}
    return bench.crew(contender, Load(0, processes), **more)


class _Found:
    """Of all rounds of one case."""

    def __init__(self) -> None:
        self.warm: list[float] = []
        self.idle: list[float] = []
        self.transactions: list[float] = []
        self.statements: list[float] = []


def _of_ours(bench: Bench) -> Table:
    cells = [
        (store, trigger, queues)
        for store, trigger in _CASES
        if store in bench.options.databases
        for queues in bench.options.queues
    ]
    found = {cell: _Found() for cell in cells}
    for _ in range(bench.options.further_rounds):
        for (store, trigger, queues), into in found.items():
            bench.attempt(
                f"pick-up after idle times: {store}, {_words(trigger)}, {queues} queues",
                lambda store=store, trigger=trigger, queues=queues, into=into: _turn_of_ours(
                    bench, store, trigger, queues, into
                ),
            )
    rows: list[Row] = []
    for (store, trigger, queues), case in found.items():
        if case.idle:
            begin = _words(trigger), bench.store(store).version, queues
            rows.append((*begin, "work lately", *_waits(case.warm), "", ""))
            sent = [median(one) if one else "" for one in (case.transactions, case.statements)]
            rows.append((*begin, "idle", *_waits(case.idle), *sent))
    rule = _RULE_OF_OURS.format(processes=_PROCESSES, idle=bench.options.idle, look=_look(bench))
    waits, sent_to_it = ("tasks", "p50", "p90", "longest"), ("transactions/s", "statements/s")
    header = "", "store", "queues", "before", *waits, *sent_to_it
    return Table("idle", "How soon after an idle time", rule, header, rows)


def _words(trigger: bool) -> str:
    return "with a trigger" if trigger else "without a trigger"


def _waits(waits: list[float]) -> tuple[float, ...]:
    return len(waits), median(waits), quantile(waits, 90), max(waits)


def _look(bench: Bench) -> float:
    return min(_LOOK, bench.options.idle)


def _turn_of_ours(bench: Bench, store: str, trigger: bool, queues: int, into: _Found) -> None:
    with moments() as begun:
        crew = _crew(bench, replace(_OURS, store=store), queues, _PROCESSES, begun.address)
        crew.do("create", *(["listen"] if trigger else []))
        with crew.working(), crew.feeding() as add:

            def wait() -> float:
                committed = add(random.randrange(queues))
                return (begun.next() - committed) * 1000

            wait()  # until then it starts
            for _ in range(bench.options.waits):
                time.sleep(random.uniform(*_LONG_PAUSE))
                into.warm.append(wait())
            for _ in range(_IDLES):
                time.sleep(bench.options.idle - _look(bench))
                sent = crew.store.sent_within(_look(bench))
                if sent.transactions is not None:
                    into.transactions.append(sent.transactions)
                if sent.statements is not None:
                    into.statements.append(sent.statements)
                time.sleep(random.uniform(0.0, 1.0))  # as the worker's pauses begin with the last task
                into.idle.append(wait())
