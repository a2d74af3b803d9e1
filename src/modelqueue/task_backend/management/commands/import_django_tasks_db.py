"""``manage.py import_django_tasks_db``: take over the rows of django-tasks-db."""

from __future__ import annotations

import argparse
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error

from modelqueue.checks import TAG
from modelqueue.management.choose import WRONG_USAGE
from modelqueue.management.clocks import Clocks
from modelqueue.management.progress import Progress
from modelqueue.management.words import counted, hint, trouble
from modelqueue.report import in_a_line
from modelqueue.status import State
from modelqueue.task_backend.moving_in import MOST_ROWS, Batch, MovingIn

__all__ = ["Command"]


class Command(BaseCommand):
    help = (
        "Move the rows of django-tasks-db in, in batches of a transaction each: those that wait are run by "
        "workers of ModelQueue, and results keep their ids. What is running is left alone. Can be stopped, "
        "and run again, at any time."
    )
    requires_system_checks = ["models", TAG]

    def add_arguments(self, parser: CommandParser) -> None:
        parser.epilog = (
            "Exit codes: 0 done; 1 some rows are left, as they are running, somebody has locked them, there "
            "is a task with that id already, or they can not be moved in; 2 wrong usage."
        )
        add = parser.add_argument
        add(
            "--backend",
            action="append",
            default=[],
            type=_pair,
            metavar="OLD=NEW",
            help="rows of this backend alias of django-tasks-db become those of another one in TASKS; can be "
            "given several times",
        )
        add(
            "--running",
            action="store_true",
            help="move in also what is running, which is run once more: for workers that were killed",
        )
        add(
            "--batch",
            type=_size,
            default=MOST_ROWS,
            metavar="N",
            help=f"how many rows to move in one transaction, 1 to {MOST_ROWS} (default: %(default)s)",
        )
        add("--dry-run", action="store_true", help="say how many would be moved in, and change nothing")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            moving = self._moving(options)
            with Clocks().of(moving.using):
                moving.check()
                is_complete = self._move(moving, options)
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from error
        except Error as error:
            raise CommandError(f"{trouble(error)}: {in_a_line(error)}\n{hint(error)}") from error
        if not is_complete:
            raise SystemExit(1)

    def _moving(self, options: dict[str, Any]) -> MovingIn:
        try:
            return MovingIn(_aliases(options["backend"]), options["running"])
        except ValueError as error:
            raise CommandError(f"--backend {error}", returncode=WRONG_USAGE) from error

    def _move(self, moving: MovingIn, options: dict[str, Any]) -> bool:
        """Move the rows in, and say how it went; return whether none is left."""
        wanted = moving.count()
        if options["dry_run"]:
            self.stdout.write(f"{_listed(Batch(wanted))} would be moved in.")
            return bool(options["running"]) or self._tell_of_running(moving.left()["RUNNING"])
        done, was_stopped = Batch(), False
        try:
            with Progress("moved in", sum(wanted.values())) as progress:
                for batch in moving.move(options["batch"]):
                    progress.add(sum(batch.moved.values()))
                    done += batch
        except KeyboardInterrupt:
            was_stopped = True
        self.stdout.write(f"{_listed(done)} moved in.")
        if was_stopped:
            self.stderr.write("Stopped by Ctrl-C. Run it again to move in the others.")
            return False
        left = moving.left()
        running = left.pop("RUNNING", 0)
        is_complete = self._tell_of_running(running)
        if done.known:
            self.stderr.write(
                f"Left alone, as there is a task with that id already: {counted(done.known, 'row')}."
            )
        if (others := sum(left.values()) - done.known) > 0:
            self.stderr.write(
                f"Left alone, as somebody has locked or added them meanwhile: {counted(others, 'row')}. "
                "Run it again."
            )
        return is_complete and not left.total()

    def _tell_of_running(self, count: int) -> bool:
        if not count:
            return True
        self.stderr.write(
            f"Left alone, as they are running: {counted(count, 'row')}. Run it again when they have ended; "
            "or with --running, if the workers that ran them are gone."
        )
        return False


def _listed(batch: Batch) -> str:
    parts = [
        f"{batch.moved[state]:,} {state.name}" for state in (State.waiting, State.finished, State.canceled)
    ]
    return f"{counted(sum(batch.moved.values()), 'task')} ({', '.join(parts)})"


def _pair(text: str) -> tuple[str, str]:
    old, _, new = text.partition("=")
    if not (old and new):
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD=NEW, such as default=tasks.")
    return old, new


def _size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_ROWS:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {MOST_ROWS}.")
    return int(text)


def _aliases(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Return the pairs as a dictionary.

    Raises:
        ValueError: one alias is to become two.
    """
    aliases = dict(pairs)
    for old, new in pairs:
        if aliases[old] != new:
            raise ValueError(f"{old}={new}: and {old}={aliases[old]}. Give one of them.")
    return aliases
