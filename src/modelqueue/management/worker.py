"""``manage.py modelqueue worker``: run the tasks of declared queues."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import connections, models

from modelqueue import __version__
from modelqueue.clock import now
from modelqueue.management import reload
from modelqueue.management.choose import WRONG_USAGE, add_database, add_queues, chosen_queues
from modelqueue.management.progress import Progress
from modelqueue.management.words import counted
from modelqueue.queues import Queue
from modelqueue.report import in_a_line
from modelqueue.status import State, Status
from modelqueue.worker.names import name_sessions
from modelqueue.worker.options import Options
from modelqueue.worker.supervisor import SOMETHING_IS_DUE, Supervisor
from modelqueue.worker.system import on_stop_signals
from modelqueue.worker.verbosity import show_log_lines

#: Due tasks that are counted before a drain; of more nobody knows when it will have ended.
_MOST_COUNTED = 1_000_000

#: How attempts end, in words for the line at the end of a drain.
_ENDED = {
    "finish": "finished",
    "assign": "assigned a status",
    "retry": "to be tried again",
    "abort": "aborted",
    "cancel": "canceled",
    "fail": "failed",
    "release": "given back",
    "lost": "not recorded",
}

HELP = "run tasks"
DESCRIPTION = (
    "Run the tasks of declared queues in processes and threads until it is stopped: SIGINT (Ctrl-C) or "
    "SIGTERM lets running actions end within the grace time, a second one ends them at once. No task is left "
    "working."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.epilog = (
        "Exit codes: 0 stopped; 1 it has failed, or a database can not be used when --drain begins; "
        "2 wrong usage, or there is no such queue; 3 --drain has left something due."
    )
    add_queues(parser)
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="QUEUE",
        help="a queue to leave out; can be given several times",
    )
    add_database(parser)
    add("--processes", type=_at_least(1), default=1, metavar="N", help="how many processes (default: 1)")
    add(
        "--threads",
        type=_at_least(1),
        default=4,
        metavar="N",
        help="how many synchronous actions a process runs at a time (default: 4)",
    )
    add(
        "--poll",
        type=_seconds,
        default=1.0,
        metavar="SECONDS",
        help="the longest time between two looks for work, when there was none for long (default: 1)",
    )
    add(
        "--grace",
        type=_seconds,
        default=25.0,
        metavar="SECONDS",
        help="how long running actions may take to end when the worker is stopped (default: 25)",
    )
    add(
        "--reload",
        action=argparse.BooleanOptionalAction,
        help="begin anew when code of the project changes (default: with DEBUG, but not with --drain)",
    )
    add("--drain", action="store_true", help="stop when nothing is due; the exit code is 0 only then, else 3")
    add("--max-tasks", type=_at_least(1), metavar="N", help="replace a process after so many tasks")
    add("--max-memory", type=_at_least(1), metavar="MIB", help="replace a process that uses more memory")
    add("--max-seconds", type=_some_seconds, metavar="SECONDS", help="replace a process after so long")
    add(
        "--health-file",
        metavar="PATH",
        help="write this file each second while the database and a process of the worker answer",
    )


def handle(command: BaseCommand, options: dict[str, Any]) -> int:
    if options["drain"] and options["reload"]:
        raise CommandError(
            "--drain stops when nothing is due, and --reload begins anew when code changes. Give either.",
            returncode=WRONG_USAGE,
        )
    queues = chosen_queues(options["queues"], options["exclude"], options["database"])
    worker = Options(
        names=tuple(queue.name for queue in queues),
        processes=options["processes"],
        threads=options["threads"],
        poll=options["poll"],
        grace=options["grace"],
        drain=options["drain"],
        max_tasks=options["max_tasks"],
        max_memory=options["max_memory"],
        max_seconds=options["max_seconds"],
        health_file=options["health_file"],
        verbosity=options["verbosity"],
        version=__version__,
    )

    show_log_lines(worker.verbosity)
    name_sessions(worker.version, queues)

    def write(text: str) -> None:
        if not worker.verbosity:
            return
        command.stdout.write(text)
        command.stdout.flush()  # or a file, or the log of a container, gets it at the end

    if options["drain"]:
        return drain(worker, queues, write)
    is_to_reload = _is_to_reload(options)
    if is_to_reload and not reload.is_child():
        return reload.run_children()
    supervisor = Supervisor(worker, queues, write)
    with nullcontext() if is_to_reload else _stopped_by_signals(supervisor):
        for line in introduction(worker, queues):
            write(line)
        return reload.serve_until_code_changes(supervisor) if is_to_reload else supervisor.run()


@contextmanager
def _stopped_by_signals(supervisor: Supervisor) -> Iterator[None]:
    """Have the signals stop it also before it serves.

    What comes before may take long, and the first process of a container never gets a signal for which it
    has no handler yet: it would serve until it is killed.
    """
    restore = on_stop_signals(supervisor.stop)
    try:
        yield
    finally:
        restore()


def _is_to_reload(options: dict[str, Any]) -> bool:
    asked: bool | None = options["reload"]
    return settings.DEBUG if asked is None else asked


def drain(options: Options, queues: list[Queue[Any]], write: Callable[[str], Any]) -> int:
    """Run what is due, show how far it is, and say at the end how the attempts have ended."""
    total: Counter[str] = Counter()

    def ended(counts: Counter[str]) -> None:
        total.update(counts)
        progress.add(sum(counts.values()))

    supervisor = Supervisor(options, queues, write, ended)
    with _stopped_by_signals(supervisor):
        for line in introduction(options, queues):
            write(line)
        due = _count(queues, lambda queue: queue.source().due(now()))
        with Progress("ended", due if due < _MOST_COUNTED else None) as progress:
            code = supervisor.run()
    if total:
        outcomes = ", ".join(f"{count:,} {_ENDED[how]}" for how, count in total.most_common())
        write(f"Attempts: {outcomes}; {progress.rate:,.0f} a second.")
    elif code == 0:
        write("Nothing was due.")
    if code == 0 and (later := _count(queues, _scheduled)):
        write(f"{counted(later, 'task')} waiting for a time that has not come.")
    if code == SOMETHING_IS_DUE:
        write("Something is due still.")
    return code


def _count(queues: list[Queue[Any]], which: Callable[[Queue[Any]], models.QuerySet[Any]]) -> int:
    """Count tasks of queues; of one whose queryset can not be had nobody knows any."""
    count = 0
    for queue in queues:
        try:
            rows = which(queue)
        except Exception:  # noqa: S112  (the worker tells of it)
            continue
        count += rows.order_by()[:_MOST_COUNTED].count()
    return count


def _scheduled(queue: Queue[Any]) -> models.QuerySet[Any]:
    """Return the tasks whose time has not come."""
    last_due, last = Status.waiting(now(), Status.max_attempts), Status.maximum(State.waiting)
    name = queue.field.name
    return queue.rows().filter(**{f"{name}__gt": last_due, f"{name}__lte": last})


def introduction(options: Options, queues: list[Queue[Any]]) -> list[str]:
    """Say what is served and where."""
    size = f"{counted(options.processes, 'process')} of {counted(options.threads, 'thread')}"
    lines = [f"Serving {counted(len(queues), 'queue')} with {size}:"]
    lines += [
        f"  {queue.name}  {queue.model._meta.label}.{queue.field.name} {_place(queue)}" for queue in queues
    ]
    lines.append("Stop it with Ctrl-C." if not options.drain else "It stops when nothing is due.")
    return lines


def _place(queue: Queue[Any]) -> str:
    try:
        using = queue.using
    except Exception as error:  # of the callable that makes its queryset
        return f"can not be looked for: {in_a_line(error)}"
    settings = connections[using].settings_dict
    where = settings["NAME"] if not settings["HOST"] else f"{settings['NAME']} on {settings['HOST']}"
    return f"in {using} ({where})"


def _at_least(least: int) -> Callable[[str], int]:
    """Return how to read a whole number from the command line."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"give a whole number, {least} or more, not {text!r}")
        return value

    return number


def _seconds(text: str) -> float:
    """Read seconds from the command line."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"give seconds, 0 or more, such as 0.5, not {text!r}")
    return value


def _some_seconds(text: str) -> float:
    """Read seconds that are not zero: a process that is replaced at once would run nothing."""
    value = _seconds(text)
    if not value:
        raise argparse.ArgumentTypeError(f"give seconds, more than 0, not {text!r}")
    return value
