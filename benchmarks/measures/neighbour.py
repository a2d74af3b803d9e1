"""How much slower the application's own queries get while a worker is busy in the same database."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from benchmarks.bench import Bench
from benchmarks.client import Client, make_table
from benchmarks.crew import Load
from benchmarks.figures import Row, Table, median, quantile, ratio
from benchmarks.roster import OURS, PGQUEUER, PROCRASTINATE, RAW, Contender

_IDLE, _BUSY = "nothing", "a process that computes"
_STATEMENTS = {"select": "SELECT by primary key", "insert": "INSERT with commit"}
#: No turn has fewer tasks.
_FEWEST = 500

_RULE = (
    "Statements per second of one client of PostgreSQL (psycopg) that sends one after the other to a table "
    "of its own, as fast as it can, and milliseconds of each: alone for {seconds:g} s, and while a worker of "
    "one process drains tasks that do nothing, from its first claim to its last outcome; a slow one gets "
    "fewer tasks. Processors that have nothing to do between two statements fall asleep, and those of a "
    "virtual machine wake up slowly: so the others are compared with a client beside a process that only "
    "computes. A worker that does little takes little from the client, so the last column counts by what "
    "was done: how many milliseconds of its time the client has lost for a thousand tasks, which is the time "
    "of the drain times the part by which the client was slower than beside that process."
)


@dataclass
class _Turn:
    seconds: float
    answers: list[float]
    """Seconds of each."""
    tasks: int = 0

    @property
    def rate(self) -> float:
        return len(self.answers) / self.seconds

    def quantile(self, percent: int) -> float:
        return quantile(self.answers, percent) * 1000

    def lost(self, alone: float) -> float:
        """Return the milliseconds that a thousand tasks have cost the client, which alone has this rate."""
        return self.seconds * (1 - self.rate / alone) / self.tasks * 1_000_000


def measure(bench: Bench) -> Iterator[Table]:
    contenders = bench.contenders((OURS, RAW, PGQUEUER, PROCRASTINATE))
    beside: dict[str, Contender | None] = {_IDLE: None, _BUSY: None, **{one.name: one for one in contenders}}
    turns: dict[tuple[str, str], list[_Turn]] = {
        (statement, name): [] for statement in _STATEMENTS for name in beside
    }
    for _ in range(bench.options.further_rounds):
        for (statement, name), found in turns.items():
            turn = bench.attempt(
                f"{_STATEMENTS[statement]} beside {name}",
                lambda statement=statement, name=name: _turn(bench, statement, name, beside[name]),
            )
            if turn is not None:
                found.append(turn)
    header = "", "beside", "statements/s", "to computing", "p50", "p99", "tasks/s", "ms lost per 1,000 tasks"
    rows = [
        _row(statement, name, found, [turn.rate for turn in turns[statement, _BUSY]])
        for (statement, name), found in turns.items()
        if found
    ]
    rule = _RULE.format(seconds=bench.options.seconds)
    yield Table("neighbour", "Other queries beside a worker", rule, header, rows)


def _turn(bench: Bench, statement: str, name: str, contender: Contender | None) -> _Turn:
    store = bench.postgres()
    make_table(store)
    client = Client(store, statement)
    if contender is not None:
        load = Load(max(_FEWEST, int(bench.options.tasks * contender.share)))
        turn = bench.crew(contender, load).drain(beside=client)
        answers = client.within(turn.began, turn.ended)
        return _Turn(turn.ended - turn.began, answers, len(turn.outcomes))
    store.settle()
    with _computing() if name == _BUSY else nullcontext(), client:
        began = time.time()
        time.sleep(bench.options.seconds)
        ended = time.time()
    return _Turn(ended - began, client.within(began, ended))


@contextmanager
def _computing() -> Iterator[None]:
    """Have a process that keeps one of the processors awake."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _row(statement: str, name: str, turns: list[_Turn], rates_alone: list[float]) -> Row:
    rates = [turn.rate for turn in turns]
    quantiles = [[turn.quantile(percent) for turn in turns] for percent in (50, 99)]
    begin = _STATEMENTS[statement], name, rates, ratio(rates, rates_alone), *quantiles
    if not all(turn.tasks for turn in turns):
        return *begin, "", ""
    lost = [turn.lost(median(rates_alone)) for turn in turns] if rates_alone else ""
    return *begin, [turn.tasks / turn.seconds for turn in turns], lost
