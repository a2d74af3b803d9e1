"""What several sub-commands read off the command line: queues, a database, durations, states."""

from __future__ import annotations

import argparse
import datetime as dt
import difflib
import logging
from collections.abc import Callable, Collection
from typing import Any

from django.core.management.base import CommandError
from django.db import connections

from modelqueue.durations import parse_duration
from modelqueue.management.words import SOURCE_HINT
from modelqueue.queues import Queue, declared_queues
from modelqueue.report import in_a_line
from modelqueue.status import State, Status

__all__ = [
    "WRONG_USAGE",
    "add_database",
    "add_queues",
    "checked_using",
    "chosen_queues",
    "duration",
    "one_of_the_states",
]

logger = logging.getLogger("modelqueue")

#: The exit code of a call that can not be meant; argparse has the same.
WRONG_USAGE = 2


def add_queues(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "queues", nargs="*", metavar="QUEUE", help="the names of queues; all that are declared by default"
    )


def add_database(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--database", metavar="ALIAS", help="only queues whose tasks are in this database")


def chosen_queues(
    names: Collection[str], exclude: Collection[str] = (), using: str | None = None
) -> list[Queue[Any]]:
    """Return the declared queues of these names, or all.

    Raises:
        CommandError: there is none, one of the names is none's, or one that was named is in another database.
    """
    declared = {queue.name: queue for queue in declared_queues()}
    if not declared:
        raise CommandError(
            'No queue is declared. Decorate a function with @modelqueue.queue(Model, "status") in the module '
            "queues.py of an installed app."
        )
    for name in [*names, *exclude]:
        if name not in declared:
            raise CommandError(
                f"There is no queue {name!r}. {did_you_mean(name, declared)}"
                f"Declared are: {', '.join(declared)}.",
                returncode=WRONG_USAGE,
            )
    if using is not None and using not in connections:
        raise CommandError(
            f"There is no database {using!r}. DATABASES has: {', '.join(connections)}.",
            returncode=WRONG_USAGE,
        )
    chosen = [
        queue for name, queue in declared.items() if name in (names or declared) and name not in exclude
    ]
    if not chosen:
        raise CommandError(
            f"--exclude leaves none of {', '.join(names or declared)}.", returncode=WRONG_USAGE
        )
    if using is None:
        return chosen
    places = {queue.name: _using(queue) for queue in chosen}
    elsewhere = [
        f"{name} is in {place or 'none that is known'}" for name, place in places.items() if place != using
    ]
    if elsewhere and (names or len(elsewhere) == len(chosen)):
        raise CommandError(f"--database {using} leaves out: {', '.join(elsewhere)}.", returncode=WRONG_USAGE)
    return [queue for queue in chosen if places[queue.name] == using]


def _using(queue: Queue[Any]) -> str | None:
    try:
        return queue.using
    except Exception as error:  # of the callable that makes its queryset
        logger.warning("Left out, as nobody knows where the tasks of %s are: %s", queue.name, error)
        return None


def checked_using(queue: Queue[Any]) -> str:
    """Return in which database the tasks of a queue are.

    Raises:
        CommandError: nobody knows, as what makes its queryset fails.
    """
    try:
        return queue.using
    except Exception as error:
        raise CommandError(
            f"{queue.name} has no tasks to look for: {in_a_line(error)}\n{SOURCE_HINT}"
        ) from error


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Return the question whether the most similar of the known words was meant, or nothing."""
    close = difflib.get_close_matches(word, known, 1)
    return f"Did you mean {close[0]!r}? " if close else ""


def duration(text: str, needs_unit: bool = False) -> dt.timedelta:
    """Read a duration from the command line, see `parse_duration`."""
    try:
        return parse_duration(text, needs_unit)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def one_of_the_states(*allowed: State) -> Callable[[str], State]:
    """Return how to read from the command line a state that is one of these."""
    names = [state.name for state in allowed]

    def state(text: str) -> State:
        if text in names:
            return State.of(text)
        known = [one.name for one in Status.states]
        if text in known:
            what = f"{text} tasks are left alone by this."
        else:
            what = f"there is no state {text!r}. {did_you_mean(text, known)}".strip()
        raise argparse.ArgumentTypeError(f"{what} Give {' or '.join(names)}.")

    return state
