"""What ``retry``, ``cancel`` and ``enqueue`` have in common: which tasks, and what is said of them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from modelqueue.management.choose import (
    WRONG_USAGE,
    checked_using,
    chosen_queues,
    duration,
    one_of_the_states,
)
from modelqueue.management.clocks import Clocks
from modelqueue.management.words import counted
from modelqueue.queues import Queue
from modelqueue.selection import Change, Selection, Verb, change, parse_key

EXIT_CODES = (
    "Exit codes: 0 done; 1 there is no such task, or some tasks could not be changed, as their "
    "state forbids it or somebody has locked them; 2 wrong usage, or there is no such queue."
)
#: The most primary keys that are listed.
LISTED = 20


def add_arguments(parser: argparse.ArgumentParser, verb: Verb) -> None:
    add = parser.add_argument
    states = " or ".join(state.name for state in verb.states)
    parser.epilog = EXIT_CODES
    add("queue", metavar="QUEUE", help="the name of the queue")
    add(
        "--pk",
        action="extend",
        nargs="+",
        metavar="PK",
        help="the tasks with these primary keys; can be given several times",
    )
    add(
        "--state",
        action="append",
        type=one_of_the_states(*verb.states),
        metavar="STATE",
        help=f"tasks in this state: {states}; can be given several times",
    )
    add(
        "--older-than",
        type=duration,
        metavar="AGE",
        help="tasks whose status has a time that is at least so long ago: when they became due, were claimed "
        "or renewed, finished or canceled; in seconds, or as 90s, 5m, 12h, 30d",
    )
    add(
        "--younger-than",
        type=duration,
        metavar="AGE",
        help="tasks for which that time is less long ago, or is to come",
    )
    add("--all", action="store_true", help="all tasks of the queue that can be changed")
    add("--dry-run", action="store_true", help="say how many would be changed, and change nothing")
    add("--json", action="store_true", help="print one JSON document")


def handle(command: BaseCommand, options: dict[str, Any], verb: Verb) -> int:
    (queue,) = chosen_queues([options["queue"]])
    selection = selected(queue, options, verb)
    with Clocks().of(checked_using(queue)):
        result = change(queue, selection, verb, options["dry_run"])
    if options["json"]:
        command.stdout.write(json.dumps(as_dict(queue, verb, result, options["dry_run"]), default=str))
    else:
        tell(command, queue, verb, result, options["dry_run"])
    return 0 if result.is_complete else 1


def selected(queue: Queue[Any], options: dict[str, Any], verb: Verb) -> Selection:
    """Return which tasks the options mean.

    Raises:
        CommandError: they mean nothing, or the whole queue without saying so.
    """
    try:
        keys = options["pk"] and [parse_key(queue.model, str(text)) for text in options["pk"]]
    except ValueError as error:
        raise CommandError(str(error), returncode=WRONG_USAGE) from error
    selection = Selection(
        keys and list(dict.fromkeys(keys)),
        options["state"],
        options["older_than"],
        options["younger_than"],
    )
    older, younger = selection.older_than, selection.younger_than
    if options["all"] and not selection.is_everything:
        raise CommandError(
            "--all means the whole queue, and the other options a part of it. Give either.",
            returncode=WRONG_USAGE,
        )
    if selection.is_everything and not options["all"]:
        raise CommandError(
            f"This would {verb.name} every task of {queue.name}. Say which: --pk, --state, --older-than, "
            "--younger-than; or --all.",
            returncode=WRONG_USAGE,
        )
    if older is not None and younger is not None and older >= younger:
        raise CommandError(
            f"No task is older than {older} and younger than {younger}.", returncode=WRONG_USAGE
        )
    return selection


def as_dict(queue: Queue[Any], verb: Verb, result: Change, dry_run: bool) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    return {
        "command": verb.name,
        "queue": queue.name,
        "dry_run": dry_run,
        "matching": result.matching,
        "changed": result.changed,
        "locked": result.locked,
        "locked_pks": result.locked_keys,
        "missing_pks": result.missing,
        "left": [{"pk": key, "state": state} for key, state in result.left.items()],
    }


def tell(command: BaseCommand, queue: Queue[Any], verb: Verb, result: Change, dry_run: bool) -> None:
    """Write what was done, and to the standard error what was not."""
    if dry_run:
        command.stdout.write(f"{counted(result.matching, 'task')} of {queue.name} would be {verb.done}.")
    else:
        command.stdout.write(f"{counted(result.changed, 'task')} of {queue.name} made {verb.done}.")
    if result.missing:
        command.stderr.write(f"{queue.name} has no task {_listed(result.missing)}.")
    for state in sorted(set(result.left.values())):
        keys = [key for key, one in result.left.items() if one == state]
        what = "not in the queue" if state == "null" else state
        command.stderr.write(f"Left alone, as {what}: {_listed(keys)}.")
    if result.locked:
        which = f": {_listed(result.locked_keys)}" if result.locked_keys else ""
        command.stderr.write(
            f"Left alone, as somebody has locked them: {counted(result.locked, 'task')}{which}."
        )


def _listed(keys: list[Any]) -> str:
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(map(str, keys[:LISTED])) + more
