"""How many tasks a second one process adds: one at a time, and many at once."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench import Bench
from benchmarks.crew import Load
from benchmarks.figures import Table
from benchmarks.roster import RAW, Contender

#: Tasks of a turn in which each is committed by itself, at most.
_MOST_SINGLE = 2000

_RULE = (
    "Tasks per second that one process adds while no worker runs: one at a time, each committed by itself, "
    "and as many at once as its interface takes."
)


def measure(bench: Bench) -> Iterator[Table]:
    contenders = [one for one in bench.contenders() if one.module != RAW.module]  # they add as ours does
    rates: dict[Contender, dict[str, list[float]]] = {
        contender: {"enqueue_singly": [], **({"enqueue": []} if contender.adds_many else {})}
        for contender in contenders
    }
    for _ in range(bench.options.further_rounds):
        for contender in contenders:
            for function, found in rates[contender].items():
                if (rate := _turn(bench, contender, function)) is not None:
                    found.append(rate)
    yield Table(
        "enqueue",
        "Enqueue",
        _RULE,
        ("", "store", "one at a time", "many at once"),
        [
            (
                contender.name,
                bench.store(contender.store).version,
                found["enqueue_singly"],
                found.get("enqueue", ""),
            )
            for contender, found in rates.items()
            if any(found.values())
        ],
    )


def _turn(bench: Bench, contender: Contender, function: str) -> float | None:
    tasks = bench.options.tasks if function == "enqueue" else min(bench.options.tasks, _MOST_SINGLE)

    def turn() -> float:
        return tasks / bench.crew(contender, Load(tasks)).do("create", function, tasks)[function]

    return bench.attempt(f"{function} of {tasks:,} tasks: {contender.name} on {contender.store}", turn)
