"""``manage.py modelqueue prune``: delete tasks that ended long ago."""

from __future__ import annotations

import argparse
import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db.models.deletion import ProtectedError, RestrictedError

from modelqueue import verbs
from modelqueue.management.choose import chosen_queues, duration, one_of_the_states
from modelqueue.management.progress import Progress
from modelqueue.queues import Queue
from modelqueue.status import State

HELP = "delete tasks that ended long ago"
DESCRIPTION = (
    "Delete the rows of tasks that ended long ago, the oldest first, in batches of a transaction each, and "
    "what refers to them by a foreign key as its on_delete says. A row that is still open in another "
    "declared queue is left alone, and so is one that somebody has locked."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.epilog = (
        "Exit codes: 0 done; 1 there is no such queue, or some tasks could not be deleted, as somebody has "
        "locked them or a foreign key protects them; 2 wrong usage."
    )
    add("queues", nargs="*", metavar="QUEUE", help="the names of queues; all that are declared by default")
    add(
        "--older-than",
        type=duration,
        required=True,
        metavar="AGE",
        help="how long ago they ended, at least: in seconds, or as 90s, 5m, 12h, 30d",
    )
    add(
        "--state",
        type=one_of_the_states(State.finished, State.canceled),
        default=State.finished,
        metavar="STATE",
        help="finished or canceled (default: finished)",
    )
    add("--dry-run", action="store_true", help="say how many would be deleted, and delete nothing")
    add("--json", action="store_true", help="print one JSON document")


def handle(command: BaseCommand, options: dict[str, Any]) -> int:
    results = []
    for queue in chosen_queues(options["queues"], [], None):
        result = prune(queue, options)
        results.append(result)
        if options["json"]:
            continue
        done = "would be" if options["dry_run"] else "are"
        count = result["matching"] if options["dry_run"] else result["deleted"]
        command.stdout.write(f"{count:,} {options['state']} tasks of {queue.name} {done} deleted.")
        if result["locked"]:
            command.stderr.write(f"Left alone, as somebody has locked them: {result['locked']:,} tasks.")
    if options["json"]:
        document = {
            "command": "prune",
            "older_than": options["older_than"].total_seconds(),
            "state": options["state"].name,
            "dry_run": options["dry_run"],
            "queues": results,
        }
        command.stdout.write(json.dumps(document))
    return 1 if any(result["locked"] for result in results) else 0


def prune(queue: Queue[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Delete the tasks of a queue, or count them; return what ``--json`` prints of it."""
    age, state = options["older_than"], options["state"]
    rows, name = queue.prunable(), queue.field.name
    old = verbs.ended_before(rows, name, age, state)
    matching, deleted, locked = old.count(), 0, 0
    if not options["dry_run"]:
        with Progress(f"{queue.name} deleted", matching) as progress:
            try:
                for count in verbs.prune(rows, name, age, state):
                    progress.add(count)
            except (ProtectedError, RestrictedError) as error:
                raise CommandError(
                    f"{progress.count:,} {state} tasks of {queue.name} are deleted, the next can not be: "
                    f"{error.args[0]}"
                ) from error
        deleted = progress.count
        locked = min(max(matching - deleted, 0), old.count())
    return {"queue": queue.name, "matching": matching, "deleted": deleted, "locked": locked}
