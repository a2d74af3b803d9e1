"""How many tasks a second: of each contender, in each store, with one and with several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.bench import Bench
from benchmarks.crew import Load
from benchmarks.figures import Row, Table, ratio
from benchmarks.roster import OURS, RAW, Contender

#: No turn has fewer tasks.
_FEWEST = 500

_RULE = (
    "Tasks per second that do nothing: the median of the rounds, with the lowest and the highest. Contenders "
    "take turns; a slow one gets fewer tasks. PostgreSQL: from when all processes are up (until then a lock "
    "on the table holds back their claims) to the commit of the last outcome, both by the server's clock. "
    "Elsewhere: from when the last of the processes has begun its first task, as the tasks "
    "themselves tell, to when no row is left without an outcome (huey, dramatiq and Celery: to when the last "
    "task begins). Of ratios, one for each number of processes."
)

_Rates = dict[int, list[float]]


def measure(bench: Bench) -> Iterator[Table]:
    options = bench.options
    contenders = bench.contenders()
    rates: dict[Contender, _Rates] = {
        contender: {n: [] for n in options.processes if n <= contender.most_processes}
        for contender in contenders
    }
    for done in range(options.rounds):
        for contender in contenders:
            if contender.is_slow and done >= options.further_rounds:
                continue
            for processes, found in rates[contender].items():
                if (rate := _turn(bench, contender, processes)) is not None:
                    found.append(rate)
    yield Table(
        "drain",
        "Drain",
        _RULE,
        (
            *("", "store", "settings", "tasks"),
            *(f"{n} process{'es' if n > 1 else ''}" for n in options.processes),
            *("ModelQueue to it", "it to raw SQL"),
        ),
        [_row(bench, contender, rates) for contender in contenders if any(rates[contender].values())],
    )


def _turn(bench: Bench, contender: Contender, processes: int) -> float | None:
    tasks = _tasks(bench, contender)
    what = f"drain of {tasks:,} tasks: {contender.name} on {contender.store}, {processes} at work"
    return bench.attempt(what, lambda: bench.crew(contender, Load(tasks, processes)).drain().rate)


def _tasks(bench: Bench, contender: Contender) -> int:
    return max(_FEWEST, int(bench.options.tasks * contender.share))


def _row(bench: Bench, contender: Contender, rates: dict[Contender, _Rates]) -> Row:
    processes, found = bench.options.processes, rates[contender]
    ours = next(
        (of for one, of in rates.items() if one.name == OURS.name and one.store == contender.store), {}
    )
    raw = rates.get(RAW, {}) if contender.store == RAW.store else {}
    return (
        contender.name,
        bench.store(contender.store).version,
        contender.settings,
        _tasks(bench, contender),
        *(found.get(n, []) for n in processes),
        _ratios(ours, found, processes),
        _ratios(found, raw, processes),
    )


def _ratios(values: _Rates, to: _Rates, processes: Sequence[int]) -> str:
    ratios = [ratio(values.get(n, []), to.get(n, [])) for n in processes]
    return " / ".join(filter(None, ratios))
