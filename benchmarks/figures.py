"""Tables: medians with their spread, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    title: str
    rule: str
    """How it was measured."""
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", self.rule, ""]
        lines += [_line(self.header), _line(["---"] * len(self.header)), *map(_line, self.rows)]
        for note in self.notes:
            lines += ["", note]
        return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    """Return the median, with the lowest and the highest in brackets."""
    if not values:
        return "not measured"
    median = statistics.median(values)
    if len(values) == 1:
        return number(median)
    return f"{number(median)} ({number(min(values))}-{number(max(values))})"


def ratio(values: Sequence[float], to: Sequence[float]) -> str:
    """Return how many times the median of the others the median of these is."""
    if not values or not to:
        return ""
    return f"{statistics.median(values) / statistics.median(to):.2f}"


def number(value: float) -> str:
    """Return it with as many digits as mean something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
