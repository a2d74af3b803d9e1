"""Charts of tables, as SVG, by matplotlib; what is not in a table is in no chart.

They have no background, and colours that stand out from a light page and from a dark one. Who does not see
them is told title and figures, in the file and in the text that is returned for the page.
"""

from __future__ import annotations

import html
import importlib.util
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Cell, Row, Table, median, number

__all__ = ["CHARTS", "Bars", "Lines", "draw", "is_possible"]

_COLOURS = "#3b82c4", "#c9761a", "#3c9466"
_INK = "#7a7a7a"


@dataclass(frozen=True)
class Bars:
    """For each row a group of bars: one for each of these columns that the table has."""

    title: str
    columns: tuple[str, ...]
    label: Callable[[Row], str] = lambda row: str(row[0])

    def draw(self, table: Table, axes: Any) -> None:
        columns = self._columns(table)
        thickness = 0.8 / max(len(columns), 1)  # other numbers of processes were measured, perhaps
        longest = 0.0
        for place, column in enumerate(columns):
            for position, row in enumerate(table.rows):
                if values := _values(row[table.header.index(column)]):
                    at = position + (place - (len(columns) - 1) / 2) * thickness
                    longest = max(longest, *values)
                    axes.barh(at, median(values), thickness * 0.9, color=_COLOURS[place % len(_COLOURS)])
                    axes.plot([min(values), max(values)], [at, at], color=_INK, linewidth=1.5)
                    axes.text(max(values), at, f" {number(median(values))}", va="center", color=_INK, size=8)
            axes.barh(0, 0, color=_COLOURS[place % len(_COLOURS)], label=column)
        axes.set_yticks(range(len(table.rows)), [self.label(row) for row in table.rows])
        if longest:
            axes.set_xlim(0, longest * 1.12)
        axes.invert_yaxis()
        if len(columns) > 1:
            axes.legend(frameon=False, labelcolor=_INK, loc="best")

    def size(self, table: Table) -> tuple[float, float]:
        return 8.0, 1.0 + len(table.rows) * (0.2 + 0.17 * len(self._columns(table)))

    def words(self, table: Table) -> list[str]:
        """Return the figures of each row, in words."""
        columns = self._columns(table)
        return [
            f"{self.label(row)}: "
            + ", ".join(f"{column} {_middle(row[table.header.index(column)])}" for column in columns)
            for row in table.rows
        ]

    def _columns(self, table: Table) -> list[str]:
        return [column for column in self.columns if column in table.header]


@dataclass(frozen=True)
class Lines:
    """For each row a line through all columns but the first."""

    title: str
    steps: str
    unit: str

    def draw(self, table: Table, axes: Any) -> None:
        names = table.header[1:]
        for row, colour in zip(table.rows, itertools.cycle(_COLOURS), strict=False):
            found = [_values(cell) for cell in row[1:]]
            places = [place for place, values in enumerate(found) if values]
            measured = [values for values in found if values]
            axes.plot(places, list(map(median, measured)), color=colour, marker="o", label=row[0])
            low, high = list(map(min, measured)), list(map(max, measured))
            axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(self.steps)
        axes.set_ylabel(self.unit)
        axes.legend(frameon=False, labelcolor=_INK, loc="best")

    def size(self, table: Table) -> tuple[float, float]:
        return 8.0, 4.0

    def words(self, table: Table) -> list[str]:
        return [f"{row[0]}: from {_middle(row[1])} to {_middle(row[-1])}" for row in table.rows]


def _of_drain(row: Row) -> str:
    return f"{row[0]}\n{str(row[1]).partition(',')[0]}, {row[2]}"


#: By the name of the table.
CHARTS: dict[str, Bars | Lines] = {
    "drain": Bars("Tasks per second that do nothing", ("1 process", "2 processes", "4 processes"), _of_drain),
    "tenths": Lines(
        "Tasks per second while a transaction is open elsewhere", "tenth of the tasks", "tasks/s"
    ),
    "load": Bars("Milliseconds until a task begins under load", ("p50", "p99")),
    "pickup": Bars(
        "Milliseconds until a task begins while there is nothing else to do",
        ("p50", "p99"),
        lambda row: f"{row[0]}, {row[1]} queue{'s' if row[1] != 1 else ''}",
    ),
    "neighbour": Bars(
        "Statements per second of a client beside a worker",
        ("statements/s",),
        lambda row: f"{row[0]}\nbeside {row[1]}",
    ),
}


def is_possible() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(tables: Sequence[Table], folder: Path) -> list[str]:
    """Write the charts of those tables that have one; return how each stands in a page, as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for table in tables:
        if (chart := CHARTS.get(table.name)) is not None and table.rows:
            words = "; ".join(chart.words(table)).replace("\n", ", ") + "."
            file = folder / f"{table.name}.svg"
            file.write_text(_drawn(chart, table, words), encoding="utf-8")
            images.append(f"![{chart.title}. {words}]({folder.name}/{file.name})")
    return images


def _drawn(chart: Bars | Lines, table: Table, words: str) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    # The same figures give the same file, and text is text, which can be found and read out.
    with matplotlib.rc_context({"svg.hashsalt": "modelqueue", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=chart.size(table), layout="constrained")
        axes = figure.subplots()
        axes.set_title(chart.title, color=_INK)
        chart.draw(table, axes)
        axes.tick_params(colors=_INK)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_INK)
        output = io.StringIO()
        metadata = {"Title": chart.title, "Date": None, "Creator": None}
        figure.savefig(output, format="svg", transparent=True, metadata=metadata)
    svg = output.getvalue().replace("<svg ", '<svg role="img" ', 1)
    return svg.replace("</title>", f"</title>\n <desc>{html.escape(words)}</desc>", 1)


def _middle(cell: Cell) -> str:
    values = _values(cell)
    return number(median(values)) if values else "not measured"


def _values(cell: Cell) -> list[float]:
    """Return what the rounds have given; nothing of a text."""
    if isinstance(cell, str):
        return []
    return cell if isinstance(cell, list) else [cell]
