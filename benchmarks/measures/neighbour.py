"""How much slower the application's own queries get while a worker is busy in the same database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.bench import Bench
from benchmarks.client import Client, make_table
from benchmarks.crew import Load
from benchmarks.figures import Row, Table, median, quantile, ratio
from benchmarks.roster import OURS, PGQUEUER, PROCRASTINATE, RAW, Contender

_STATEMENTS = {"select": "SELECT by primary key", "insert": "INSERT with commit"}
#: No turn has fewer tasks.
_FEWEST = 500

_RULE = (
    "Statements per second of one client of PostgreSQL (psycopg) that sends one after the other to a table "
    "of its own, as fast as it can, and milliseconds of each: alone for {seconds:g} s, and while a worker of "
    "one process drains tasks that do nothing, from its first claim to its last outcome; a slow one gets "
    "fewer tasks. A worker that does little takes little from the client, so the last column counts by what "
    "was done: how many milliseconds of its time the client has lost for a thousand tasks, which is the time "
    "of the drain times the part by which the client was slower than alone."
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
    contenders = [None, *bench.contenders((OURS, RAW, PGQUEUER, PROCRASTINATE))]
    turns: dict[tuple[str, Contender | None], list[_Turn]] = {
        (statement, contender): [] for statement in _STATEMENTS for contender in contenders
    }
    for _ in range(bench.options.further_rounds):
        for (statement, contender), found in turns.items():
            turn = bench.attempt(
                f"{_STATEMENTS[statement]} beside {contender.name if contender else 'no worker'}",
                lambda statement=statement, contender=contender: _turn(bench, statement, contender),
            )
            if turn is not None:
                found.append(turn)
    header = "", "worker", "statements/s", "to alone", "p50", "p99", "tasks/s", "ms lost per 1,000 tasks"
    rows = [
        _row(statement, contender, found, turns[statement, None])
        for (statement, contender), found in turns.items()
        if found
    ]
    rule = _RULE.format(seconds=bench.options.seconds)
    yield Table("neighbour", "Other queries beside a worker", rule, header, rows)


def _turn(bench: Bench, statement: str, contender: Contender | None) -> _Turn:
    store = bench.postgres()
    make_table(store)
    client = Client(store, statement)
    if contender is None:
        store.settle()
        with client:
            began = time.time()
            time.sleep(bench.options.seconds)
            ended = time.time()
        return _Turn(ended - began, client.within(began, ended))
    load = Load(max(_FEWEST, int(bench.options.tasks * contender.share)))
    turn = bench.crew(contender, load).drain(beside=client)
    answers = client.within(turn.began, turn.ended)
    return _Turn(turn.ended - turn.began, answers, len(turn.outcomes))


def _row(statement: str, contender: Contender | None, turns: list[_Turn], alone: list[_Turn]) -> Row:
    rates, rates_alone = [turn.rate for turn in turns], [turn.rate for turn in alone]
    quantiles = [[turn.quantile(percent) for turn in turns] for percent in (50, 99)]
    begin = _STATEMENTS[statement], contender.name if contender else "none", rates, ratio(rates, rates_alone)
    if contender is None:
        return *begin, *quantiles, "", ""
    lost = [turn.lost(median(rates_alone)) for turn in turns] if alone else ""
    return *begin, *quantiles, [turn.tasks / turn.seconds for turn in turns], lost
