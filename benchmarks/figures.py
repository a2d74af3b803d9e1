"""Tables of figures, and how they are written: medians with their spread, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["Cell", "Row", "Table", "median", "number", "quantile", "ratio", "spread", "text"]

#: A text, a figure, or what the rounds have given.
Cell = str | float | list[float]
Row = tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    name: str
    """By which a chart finds it."""
    title: str
    rule: str
    """How it was measured."""
    header: tuple[str, ...]
    rows: Sequence[Row]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", self.rule, ""]
        lines += [
            _line(self.header),
            _line(["---"] * len(self.header)),
            *(_line(list(map(text, row))) for row in self.rows),
        ]
        for note in self.notes:
            lines += ["", note]
        return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def text(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    return spread(cell) if isinstance(cell, list) else number(cell)


def quantile(values: list[float], percent: int) -> float:
    """Return what so many of a hundred values are below; of a single one, that."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def spread(values: Sequence[float]) -> str:
    """Return the median, with the lowest and the highest in brackets."""
    if not values:
        return "not measured"
    if len(values) == 1:
        return number(values[0])
    to = " to " if min(values) < 0 else "-"
    return f"{number(median(values))} ({number(min(values))}{to}{number(max(values))})"


def ratio(values: Sequence[float], to: Sequence[float]) -> str:
    """Return how many times the median of the others the median of these is."""
    if not values or not to:
        return ""
    return f"{median(values) / median(to):.2f}"


def number(value: float) -> str:
    """Return it with as many digits as mean something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
