"""``manage.py modelqueue prune``: delete tasks that ended long ago."""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

from django.core.management.base import BaseCommand

from modelqueue import verbs
from modelqueue.management.choose import add_queues, chosen_queues, duration, one_of_the_states
from modelqueue.management.clocks import Clocks
from modelqueue.management.progress import Progress
from modelqueue.management.words import counted, hint
from modelqueue.queues import Queue
from modelqueue.report import in_a_line
from modelqueue.status import State

HELP = "delete tasks that ended long ago"
DESCRIPTION = (
    "Delete the rows of tasks that ended long ago, the oldest first, in batches of a transaction each, and "
    "what refers to them by a foreign key as its on_delete says. A row that is still open in another "
    "declared queue is left alone, and so is one that somebody has locked or that a foreign key protects."
)


STOPPED = "Stopped by Ctrl-C."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.epilog = (
        "Exit codes: 0 done; 1 some tasks could not be deleted, as somebody has locked them or a foreign key "
        "protects them, or a queue can not be pruned; 2 wrong usage, or there is no such queue."
    )
    add_queues(parser)
    add(
        "--older-than",
        type=partial(duration, needs_unit=True),  # 30 seconds in place of days would delete too much
        required=True,
        metavar="AGE",
        help="how long ago they ended, at least, with its unit: 90s, 5m, 12h, 30d",
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
    results, clocks = [], Clocks()
    for queue in chosen_queues(options["queues"]):
        result: dict[str, Any] = {
            "queue": queue.name, "matching": 0, "deleted": 0, "locked": 0, "protected": 0, "protected_by": []
        }  # fmt: skip
        results.append(result)
        try:
            with clocks.of(queue.using):
                prune(queue, options, result)
        except Exception as error:  # a missing table hides no other queue
            result["error"] = f"{type(error).__name__}: {in_a_line(error)}"
            command.stderr.write(f"error: {queue.name} can not be pruned: {result['error']}\n{hint(error)}")
        except KeyboardInterrupt:
            result["error"] = STOPPED
            command.stderr.write(STOPPED)
        if not options["json"]:
            tell(command, result, options)
        if result.get("error") == STOPPED:
            break
    if options["json"]:
        document = {
            "command": "prune",
            "older_than": options["older_than"].total_seconds(),
            "state": options["state"].name,
            "dry_run": options["dry_run"],
            "queues": results,
        }
        command.stdout.write(json.dumps(document))
    is_complete = not any(
        result.get("error") or result["locked"] or result["protected"] for result in results
    )
    return 0 if is_complete else 1


def prune(queue: Queue[Any], options: dict[str, Any], result: dict[str, Any]) -> None:
    """Delete the tasks of a queue, or count them; note meanwhile what ``--json`` prints of it."""
    age, state = options["older_than"], options["state"]
    rows, name = queue.prunable(), queue.field.name
    old = verbs.ended_before(rows, name, age, state)
    result["matching"] = matching = old.count()
    if options["dry_run"]:
        return
    pruned = verbs.Pruned()
    with Progress(f"{queue.name} deleted", matching) as progress:
        for batch in verbs.prune(rows, name, age, state):
            progress.add(batch.deleted)
            pruned += batch
            result.update(
                deleted=pruned.deleted,
                protected=pruned.protected,
                protected_by=sorted(pruned.protectors),
            )
    left = matching - pruned.deleted - pruned.protected
    result["locked"] = max(min(left, old.count() - pruned.protected), 0)


def tell(command: BaseCommand, result: dict[str, Any], options: dict[str, Any]) -> None:
    """Write what was done, and to the standard error what was not."""
    count = result["matching"] if options["dry_run"] else result["deleted"]
    what = f"{options['state']} task"
    done = "would be" if options["dry_run"] else "is" if count == 1 else "are"
    command.stdout.write(f"{counted(count, what)} of {result['queue']} {done} deleted.")
    if result["locked"]:
        command.stderr.write(f"Left alone, as somebody has locked them: {counted(result['locked'], 'task')}.")
    if result["protected"]:
        command.stderr.write(
            f"Left alone, as {verbs.Pruned(protectors=frozenset(result['protected_by'])).why}: "
            f"{counted(result['protected'], 'task')}."
        )
