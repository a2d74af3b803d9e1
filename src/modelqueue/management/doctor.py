"""``manage.py modelqueue doctor``: what is wrong with queues and their databases, and what to do about it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from django.core.management.base import BaseCommand
from django.db import connections

from modelqueue import findings
from modelqueue.clock import now
from modelqueue.engines import engine_for
from modelqueue.engines.examinations import examination_for
from modelqueue.fields import declared_on
from modelqueue.findings import LARGE, Finding, Severity
from modelqueue.management.choose import add_database, add_queues, chosen_queues
from modelqueue.management.clocks import Clocks
from modelqueue.management.words import DATABASE_HINT, counted, hint
from modelqueue.queues import Queue
from modelqueue.report import in_a_line

#: For what queues of one kind examine by themselves.
EXAMINE_SECONDS = 10.0
#: By the name of a check, each with what asks and judges.
Questions = dict[str, Callable[[], Iterator[Finding]]]

HELP = "say what is wrong, and what to do about it"
DESCRIPTION = (
    "Look for what makes queues slow or unsafe: in the tables of their tasks, and in the options and the "
    "sessions of their databases. Each finding says what is wrong, what it costs, and what to do. Nothing is "
    "changed and nothing is locked, and a look costs the same however large a table is."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.epilog = (
        "Exit codes: 0 nothing is wrong, or worth an info at most; 1 there is a warning or an error; 2 wrong "
        "usage, or there is no such queue."
    )
    add_queues(parser)
    add_database(parser)
    add("--json", action="store_true", help="print one JSON document, a list of findings")


def handle(command: BaseCommand, options: dict[str, Any]) -> int:
    found = examined(chosen_queues(options["queues"], using=options["database"]))
    found.sort(key=lambda one: -one.severity)
    if options["json"]:
        command.stdout.write(json.dumps([one.as_dict() for one in found]))
    else:
        command.stdout.write("\n".join([*map(told, found), summary(found)]))
    return 1 if any(one.severity >= Severity.warning for one in found) else 0


def told(one: Finding) -> str:
    """Return a finding as a paragraph."""
    where = f"{one.queue} in {one.database or 'no database'}" if one.queue else f"database {one.database}"
    return (
        f"{one.severity.name} ({one.check}): {where}\n"
        f"  {one.finding}\n  Cost: {one.cost}\n  Cure: {one.cure}\n"
    )


def summary(found: list[Finding]) -> str:
    if not found:
        return "Nothing is wrong."
    counts = {severity: sum(one.severity == severity for one in found) for severity in reversed(Severity)}
    return ", ".join(counted(count, severity.name) for severity, count in counts.items() if count) + "."


def examined(queues: Iterable[Queue[Any]]) -> list[Finding]:
    """Return what is wrong with queues, and with the databases of their tasks."""
    found, by_database = list[Finding](), dict[str, list[Queue[Any]]]()
    for queue in queues:
        try:
            by_database.setdefault(queue.using, []).append(queue)
        except Exception as error:  # of the callable that makes its queryset
            found.append(unreadable(queue, error))
    clocks = Clocks()
    for using, some in by_database.items():
        try:
            connections[using].ensure_connection()
        except Exception as error:  # told once, and not tried again for each queue: it may take minutes
            found.append(away(using, some, error))
            continue
        with clocks.of(using):
            found += of_one_database(using, some)
    return found


def of_one_database(using: str, queues: list[Queue[Any]]) -> list[Finding]:
    """Return what is wrong with a database that can be connected to, and with the queues in it."""
    found = list(of_database(using))
    seen = set[Any]()
    for queue in queues:
        try:
            found += [replace(one, queue=queue.name) for one in of_queue(queue, seen)]
        except Exception as error:  # its table is missing, or locked
            found.append(unreadable(queue, error))
    return [replace(one, database=using) for one in found]


def of_database(using: str) -> Iterator[Finding]:
    """Yield what is wrong with a database; a line for each question."""
    ask = examination_for(using)
    questions: Questions = {
        "isolation": lambda: findings.isolation(ask.isolation()),
        "journal-mode": lambda: findings.one_writer(ask.one_writer()),
        "versions": lambda: findings.versions(ask.versions()),
        "clock": lambda: findings.clock(engine_for(using).clock_offset()),
        "silence": lambda: findings.silence(ask.silence()),
        "pooler": lambda: findings.pooler(ask.pooler()),
        "pinned": lambda: findings.pins(ask.pins()),
    }
    return answers(questions)


def of_queue(queue: Queue[Any], seen: set[Any]) -> Iterator[Finding]:
    """Yield what is wrong with a queue, and with its field and its table if these were not seen before."""
    source = queue.source()
    field, table, ask = source.field, source.owner, examination_for(source.using)
    with ask.impatiently():
        access = ask.access(source, now(), LARGE)
    yield from findings.index(str(field), access)
    questions: Questions = {}
    if field not in seen:
        for group in dict.fromkeys(one.group for one in declared_on(field)):
            of_queues = {one.name: one.lease for one in declared_on(field) if one.group == group}
            yield from findings.leases(str(field), of_queues)
        if access.is_quick:
            questions["newest-lease"] = lambda: findings.newest_lease(ask.newest_lease(source), now())
    if table not in seen:
        questions["read-only"] = lambda: findings.read_only(ask.refusal(source))
        questions["autovacuum"] = lambda: findings.vacuum(ask.vacuum(source))
        questions["listen"] = lambda: findings.listen(table._meta.db_table, ask.hears(source))
    if queue.examine is not None and queue.examine not in seen:
        questions["unserved"] = partial(queue.examine, source.using, EXAMINE_SECONDS)
    yield from answers(questions, ask.impatiently)
    seen |= {field, table, queue.examine}


def answers(
    questions: Questions, manner: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[Finding]:
    """Yield what comes of questions; one that can not be answered is a finding, and hides no other."""
    for check, question in questions.items():
        try:
            with manner():
                found = list(question())
        except Exception as error:
            yield findings.unanswered(check, in_words(error))
        else:
            yield from found


def away(using: str, queues: list[Queue[Any]], error: Exception) -> Finding:
    names = ", ".join(queue.name for queue in queues)
    one = findings.unreadable(
        f"The database {using}", in_words(error), f"the tasks of {names}", DATABASE_HINT
    )
    return replace(one, database=using)


def unreadable(queue: Queue[Any], error: Exception) -> Finding:
    one = findings.unreadable(f"The queue {queue.name}", in_words(error), "its tasks", hint(error))
    return replace(one, queue=queue.name)


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {in_a_line(error)}"
