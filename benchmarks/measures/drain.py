"""How many tasks a second: of each contender, in each store, with one and with several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.bench import Bench
from benchmarks.client import commits_per_second
from benchmarks.crew import Load
from benchmarks.figures import Row, Table, median, number, ratio
from benchmarks.roster import OURS, RAW, Contender

#: No turn has fewer tasks.
_FEWEST = 500
#: Seconds in which commits are counted.
_SECONDS = 2.0

_RULE = (
    "Tasks per second that do nothing: the median of the rounds, with the lowest and the highest. Contenders "
    "take turns; a slow one gets fewer tasks. PostgreSQL: from when all processes are up (until then a lock "
    "on the table holds back their claims) to the commit of the last outcome, both by the server's clock. "
    "Elsewhere: from when the last of the processes has begun its first task, as the tasks "
    "themselves tell, to when no row is left without an outcome (huey, dramatiq and Celery: to when the last "
    "task begins). Of ratios and ceilings, one for each number of processes. The ceiling is the rate of a "
    "contender that does nothing but wait for its commits: those per second of as many clients as it has "
    "sessions that commit, of which each changes one row after the other of a table of 100,000, by psycopg, "
    "times the tasks that it did with each commit that changed something. It is empty where the sessions "
    "depend on the tasks (procrastinate), and where the server does not count commits. No contender waits "
    "for a poll while there are tasks."
)


@dataclass
class _Found:
    """Of all rounds of a contender with so many processes."""

    rates: list[float] = field(default_factory=list)
    tasks_per_commit: list[float] = field(default_factory=list)
    """As far as the server tells."""


_Turns = dict[int, _Found]
"""By the number of processes."""
_Commits = dict[int, list[float]]
"""Per second, by the number of clients."""


def measure(bench: Bench) -> Iterator[Table]:
    options = bench.options
    contenders = bench.contenders()
    turns: dict[Contender, _Turns] = {
        contender: {n: _Found() for n in options.processes if n <= contender.most_processes}
        for contender in contenders
    }
    commits: _Commits = {n * one.sessions: [] for one in contenders if one.sessions for n in turns[one]}
    for done in range(options.rounds):
        if done < options.further_rounds:
            for clients, rates in sorted(commits.items()):
                rates += _commits(bench, clients)
        for contender in contenders:
            if contender.is_slow and done >= options.further_rounds:
                continue
            for processes, found in turns[contender].items():
                _turn(bench, contender, processes, found)
    counts = [f"{clients} {number(median(rates))}" for clients, rates in sorted(commits.items()) if rates]
    yield Table(
        "drain",
        "Drain",
        _RULE,
        (
            *("", "store", "settings", "tasks"),
            *(f"{n} process{'es' if n > 1 else ''}" for n in options.processes),
            *("ModelQueue to it", "it to raw SQL", "ceiling", "commits/s x tasks of each"),
        ),
        [
            _row(bench, contender, turns, commits)
            for contender in contenders
            if any(found.rates for found in turns[contender].values())
        ],
        (f"Commits per second, by the number of clients: {', '.join(counts)}.",) if counts else (),
    )


def _commits(bench: Bench, clients: int) -> list[float]:
    rate = bench.attempt(
        f"commits of {clients} clients", lambda: commits_per_second(bench.postgres(), clients, _SECONDS)
    )
    return [] if rate is None else [rate]


def _turn(bench: Bench, contender: Contender, processes: int, into: _Found) -> None:
    tasks = _tasks(bench, contender)
    what = f"drain of {tasks:,} tasks: {contender.name} on {contender.store}, {processes} at work"
    turn = bench.attempt(what, lambda: bench.crew(contender, Load(tasks, processes)).drain())
    if turn is not None:
        into.rates.append(turn.rate)
        if turn.spent.commits:
            into.tasks_per_commit.append(len(turn.outcomes) / turn.spent.commits)


def _tasks(bench: Bench, contender: Contender) -> int:
    return max(_FEWEST, int(bench.options.tasks * contender.share))


def _row(bench: Bench, contender: Contender, turns: dict[Contender, _Turns], commits: _Commits) -> Row:
    processes, found = bench.options.processes, turns[contender]
    ours = next(
        (of for one, of in turns.items() if one.name == OURS.name and one.store == contender.store), {}
    )
    raw = turns.get(RAW, {}) if contender.store == RAW.store else {}
    return (
        contender.name,
        bench.store(contender.store).version,
        contender.settings,
        _tasks(bench, contender),
        *(_rates(found, n) for n in processes),
        _ratios(ours, found, processes),
        _ratios(found, raw, processes),
        *_ceilings(contender, found, commits),
    )


def _rates(turns: _Turns, processes: int) -> list[float]:
    return turns[processes].rates if processes in turns else []


def _ratios(values: _Turns, to: _Turns, processes: Sequence[int]) -> str:
    return " / ".join(filter(None, [ratio(_rates(values, n), _rates(to, n)) for n in processes]))


def _ceilings(contender: Contender, turns: _Turns, commits: _Commits) -> tuple[str, str]:
    """Return them for each number of processes, and of what they are made; nothing where none is known."""
    ceilings, parts = [], []
    for processes, found in turns.items():
        rates = commits.get(processes * contender.sessions, [])
        if rates and found.tasks_per_commit:
            rate, tasks = median(rates), median(found.tasks_per_commit)
            ceilings.append(number(rate * tasks))
            parts.append(f"{number(rate)} x {number(tasks)}")
    return " / ".join(ceilings), " / ".join(parts)
