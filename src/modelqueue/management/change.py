"""What ``retry``, ``cancel`` and ``enqueue`` have in common: which tasks, and what is said of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
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
        "--id",
        action="extend",
        nargs="+",
        metavar="ID",
        help="the Django tasks with these ids of their results; can be given several times",
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
    selection, ids = selected(queue, options, verb), checked_ids(queue, options["id"])
    using = checked_using(queue)
    found = queue.keys_of_ids(ids) if queue.keys_of_ids and ids else {}
    if ids:
        selection = replace(selection, keys=[*dict.fromkeys([*(selection.keys or []), *found.values()])])
    with Clocks().of(using):
        result = change(queue, selection, verb, options["dry_run"])
    result.missing_ids = [one for one in ids if one not in found]
    if options["json"]:
        document = as_dict(queue, verb, result, options["dry_run"]) | {"pks_by_id": found}
        command.stdout.write(json.dumps(document, default=str))
    else:
        names = {key: one for one, key in found.items()}
        tell(command, queue, verb, result, options["dry_run"], names)
    return 0 if result.is_complete else 1


def checked_ids(queue: Queue[Any], texts: list[Any] | None) -> list[str]:
    """Return the ids of results that are named.

    Raises:
        CommandError: the queue has none.
    """
    if texts and queue.keys_of_ids is None:
        raise CommandError(
            f"{queue.name} is no queue of Django tasks, so {texts[0]!r} can be the id of none. Give --pk.",
            returncode=WRONG_USAGE,
        )
    return list(dict.fromkeys(map(str, texts or [])))


def selected(queue: Queue[Any], options: dict[str, Any], verb: Verb) -> Selection:
    """Return which tasks the options mean; those that are named by their ids come to it later.

    Raises:
        CommandError: they mean nothing, or the whole queue without saying so.
    """
    try:
        keys = options["pk"] and [parse_key(queue.model, str(text)) for text in options["pk"]]
    except ValueError as error:
        raise CommandError(str(error), returncode=WRONG_USAGE) from error
    if options["id"] and keys is None:
        keys = []
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
            f"This would {verb.name} every task of {queue.name}. Say which: --pk, --id, --state, "
            "--older-than, --younger-than; or --all.",
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
        "missing_ids": result.missing_ids,
        "left": [{"pk": key, "state": state} for key, state in result.left.items()],
    }


def tell(
    command: BaseCommand,
    queue: Queue[Any],
    verb: Verb,
    result: Change,
    dry_run: bool,
    names: Mapping[Any, str],
) -> None:
    """Write what was done, and to the standard error what was not.

    Args:
        names: what is written for a primary key, if not the key.
    """

    def listed(keys: list[Any]) -> str:
        return _listed([names.get(key, key) for key in keys])

    if dry_run:
        command.stdout.write(f"{counted(result.matching, 'task')} of {queue.name} would be {verb.done}.")
    else:
        command.stdout.write(f"{counted(result.changed, 'task')} of {queue.name} made {verb.done}.")
    if missing := [*result.missing, *result.missing_ids]:
        command.stderr.write(f"{queue.name} has no task {listed(missing)}.")
    for state in sorted(set(result.left.values())):
        keys = [key for key, one in result.left.items() if one == state]
        what = "not in the queue" if state == "null" else state
        command.stderr.write(f"Left alone, as {what}: {listed(keys)}.")
    if result.locked:
        which = f": {listed(result.locked_keys)}" if result.locked_keys else ""
        command.stderr.write(
            f"Left alone, as somebody has locked them: {counted(result.locked, 'task')}{which}."
        )


def _listed(keys: list[Any]) -> str:
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(map(str, keys[:LISTED])) + more
