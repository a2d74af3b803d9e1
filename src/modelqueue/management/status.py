"""``manage.py modelqueue status``: how the queues are doing."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from django.core.management.base import BaseCommand
from django.db import close_old_connections

from modelqueue.clock import now
from modelqueue.durations import in_short
from modelqueue.management.choose import add_queues, chosen_queues
from modelqueue.management.clocks import Clocks
from modelqueue.management.words import hint
from modelqueue.report import LATELY, Failure, Figures, report
from modelqueue.status import State, Status

HELP = "show how queues are doing"
DESCRIPTION = (
    "Show of each queue how many tasks are in each state, how long the oldest due one has been waiting (the "
    "queue of the longest wait comes first), how many are due and how many scheduled for later, which are "
    "running and when their leases were renewed last, how many ended in the last 5 minutes, and when at "
    "that rate those will have ended that are due. Nothing is counted beyond 10,000, which is shown as "
    "10,000+, so that a look is cheap also on large tables."
)

CLEAR_SCREEN = "\x1b[2J\x1b[H"
HEADERS = [
    "queue",
    "wait",
    "due",
    "scheduled",
    *map(str, Status.states),
    f"last {LATELY.seconds // 60} min",
    "ETA",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.epilog = (
        "Exit codes: 0 shown; 1 a queue can not be looked at; 2 wrong usage, or there is no such queue."
    )
    add_queues(parser)
    add(
        "--json",
        action="store_true",
        help="print one JSON document; with --watch one a second, on a line each",
    )
    add("--watch", action="store_true", help="show it again each second, until Ctrl-C")


def handle(command: BaseCommand, options: dict[str, Any]) -> int:
    queues, clocks = chosen_queues(options["queues"]), Clocks()
    if not options["watch"]:
        found = report(queues, clock_of=clocks.of)
        command.stdout.write(shown(found, options["json"]))
        return 1 if has_failed(found) else 0
    clear = CLEAR_SCREEN if command.stdout.isatty() and not options["json"] else ""
    try:
        while True:
            found = report(queues, clock_of=clocks.of)
            command.stdout.write(clear + shown(found, options["json"]))
            command.stdout.flush()
            if has_failed(found):
                with suppress(Exception):  # of a driver, about what is closed already
                    close_old_connections()  # those that are broken, so that the next look opens others
            time.sleep(1)
    except KeyboardInterrupt:  # the way to end it
        return 0


def has_failed(found: list[Figures | Failure]) -> bool:
    return any(isinstance(one, Failure) for one in found)


def shown(found: list[Figures | Failure], as_json: bool) -> str:
    """Return what was found of queues, as a table or as a JSON document."""
    if as_json:
        document = {"at": now().isoformat(), "queues": [one.as_dict() for one in found]}
        return json.dumps(document, default=str)
    figures = [one for one in found if isinstance(one, Figures)]
    failures = [one for one in found if isinstance(one, Failure)]
    lines = [*table([HEADERS, *map(cells, figures)]), ""] if figures else []
    for one in figures:
        lines += [f"running: {one.queue.name} {task}" for task in running(one)]
    lines += [f"error: {one.queue.name} can not be looked at: {one}" for one in failures]
    lines += dict.fromkeys(hint(one.error) for one in failures)
    return "\n".join(lines)


def cells(one: Figures) -> list[str]:
    """Return the cells of a queue's row, in the order of the headers."""
    ended = str(one.finished_lately)
    if one.canceled_lately.number:
        ended += f", {one.canceled_lately} canceled"
    return [
        one.queue.name,
        "-" if one.longest_wait is None else in_short(one.longest_wait),
        str(one.due),
        str(one.scheduled),
        *map(str, one.counts.values()),
        ended,
        eta(one),
    ]


def eta(one: Figures) -> str:
    if not one.due.number:
        return "-"
    return "unknown" if one.eta is None else f"{in_short(one.eta)}{'+' if one.due.is_capped else ''}"


def running(one: Figures) -> list[str]:
    """Return a line for each running task that is listed, and one for the others."""
    lines = []
    for task in one.running:
        renewed = "" if task.renewed_ago is None else f" renewed {in_short(task.renewed_ago)} ago,"
        abandoned = ", its lease has run out" if task.is_abandoned else ""
        lines.append(f"{task.pk}{renewed} attempt {task.attempts + 1}{abandoned}")
    working = one.counts[State.working]
    if working.number > len(lines):
        lines.append(f"and {working.number - len(lines):,}{'+' if working.is_capped else ''} more")
    return lines


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: the first column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
