"""System checks of the settings, the queues and the databases, run where ``modelqueue`` is in INSTALLED_APPS.

Those of the databases are warnings: with any of them the queue is correct, and slower or less patient than
it could be.
(The checks of a model's own fields, W001 to W003, are in `modelqueue.fields` and need no app.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage, Tags, register
from django.db import connections, router
from django.db.models.expressions import Col
from django.db.models.lookups import Exact
from django.db.models.sql.where import AND

from modelqueue import conf
from modelqueue.fields import StatusField, is_indexed
from modelqueue.indexes import QueueIndex
from modelqueue.queues import Queue, declared_queues
from modelqueue.source import Source
from modelqueue.status import ZERO_SECS

__all__ = ["TAG", "check_databases", "check_queues", "check_settings"]

#: ``manage.py check --tag modelqueue``; every ``manage.py modelqueue`` runs these, too.
TAG = "modelqueue"
_TASK_BACKEND = "modelqueue.task_backend"


@register(TAG)
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Check the project's setting MODELQUEUE."""
    return [
        *(checks.Error(problem, hint=cure, id="modelqueue.E001") for problem, cure in conf.problems()),
        *_check_tasks(),
    ]


def _check_tasks() -> Iterator[CheckMessage]:
    """Yield what Django asks the backends for only once somebody has imported its task API."""
    setting = getattr(settings, "TASKS", {})
    for alias, one in setting.items() if isinstance(setting, Mapping) else ():
        path = one.get("BACKEND") if isinstance(one, Mapping) else None
        is_ours = str(path).startswith(f"{_TASK_BACKEND}.")
        if is_ours and not apps.is_installed(_TASK_BACKEND):
            yield checks.Error(
                f"TASKS[{alias!r}] uses ModelQueueBackend, but {_TASK_BACKEND!r} is not in INSTALLED_APPS.",
                hint="Put it there, and run migrate.",
                id="modelqueue.E002",
            )


@register(TAG)
def check_queues(**kwargs: Any) -> list[CheckMessage]:
    """Check the declared queues, for what can be seen only when all of them are known, and all apps ready."""
    messages: list[CheckMessage] = []
    everything: dict[tuple[Any, ...], Queue[Any]] = {}
    fields = dict[Any, Queue[Any]]()
    for queue in declared_queues():
        messages += _check_pause(queue)
        try:
            source = queue.source()
        except Exception as error:
            messages.append(_broken_source(queue, error))
            continue
        messages += _check_index(queue, source)
        if fields.setdefault(source.field, queue) is queue:
            messages += _check_two_indexes(source)
        if not source.queryset.query.where:
            key = source.field, source.model._meta.concrete_model, source.using
            other = everything.setdefault(key, queue)
            if other is not queue:
                messages.append(_same_tasks(queue, other))
    return messages


def _check_pause(queue: Queue[Any]) -> list[CheckMessage]:
    if queue.policy.retry is not None or queue.policy.delay != ZERO_SECS:
        return []
    return [
        checks.Warning(
            f"The queue {queue.name!r} ({queue.where}) has retry=None and no delay, so a task that always "
            "fails is run without end and without a pause.",
            hint="Give it a delay, for example modelqueue.backoff.exponential(timedelta(seconds=10)).",
            id="modelqueue.W008",
        )
    ]


def _broken_source(queue: Queue[Any], error: Exception) -> CheckMessage:
    # A warning: of an error every command would refuse to start, the worker of all other queues too, and
    # `migrate`, which may be the cure.
    return checks.Warning(
        f"The queue {queue.name!r} ({queue.where}) has no tasks to look for: {error}",
        hint="What it is declared over has to give a queryset of its model each time.",
        id="modelqueue.W010",
    )


def _check_index(queue: Queue[Any], source: Source[Any]) -> list[CheckMessage]:
    field, where = source.field, source.queryset.query.where
    if is_indexed(field, with_condition=bool(where), after=set(_given(where))) or not is_indexed(field):
        return []  # or of which W001 warns
    return [
        checks.Warning(
            f"{field} is only in indexes with a condition, or behind other fields, that the queryset of the "
            f"queue {queue.name!r} ({queue.where}) does not have, so every claim may read the whole table.",
            hint="Remove db_index=False from the field, or add "
            f"modelqueue.QueueIndex({field.name!r}, name=...) to Meta.indexes.",
            id="modelqueue.W011",
        )
    ]


def _given(where: Any) -> Iterator[str]:
    """Yield the names of the fields whose value a queryset gives."""
    if getattr(where, "negated", False) or getattr(where, "connector", AND) != AND:
        return
    for one in getattr(where, "children", [where]):
        if hasattr(one, "children"):
            yield from _given(one)
        elif isinstance(one, Exact) and isinstance(one.lhs, Col):
            yield one.lhs.target.name


def _check_two_indexes(source: Source[Any]) -> list[CheckMessage]:
    field: Any = source.field
    of_live = [one for one in source.owner._meta.indexes if isinstance(one, QueueIndex)]
    if not field.db_index or [field.name] not in [index.fields for index in of_live]:
        return []
    return [
        checks.Warning(
            f"{field} has an index of its own and a QueueIndex, and each change of a state writes to both.",
            hint="Give the field db_index=False, or remove the QueueIndex from Meta.indexes.",
            id="modelqueue.W012",
        )
    ]


def _same_tasks(queue: Queue[Any], other: Queue[Any]) -> CheckMessage:
    return checks.Warning(
        f"The queues {other.name!r} ({other.where}) and {queue.name!r} ({queue.where}) both have all "
        f"tasks of {queue.field}. Each task is run once, by the one that happens to claim it.",
        hint="Declare them over querysets that share no task, or give one of them a status field of its own.",
        id="modelqueue.W009",
    )


@register(Tags.database)
def check_databases(databases: Sequence[str] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """Check the databases that hold a `StatusField` (``manage.py check --database default``)."""
    return [
        message
        for using in databases or ()
        if _has_queue(using)
        for message in (*_check_sqlite(using), *_check_skip_locked(using))
    ]


def _has_queue(using: str) -> bool:
    return any(
        isinstance(field, StatusField) and router.allow_migrate_model(using, model)
        for model in apps.get_models()
        for field in model._meta.local_concrete_fields
    )


def _check_sqlite(using: str) -> list[CheckMessage]:
    connection: Any = connections[using]
    if connection.vendor != "sqlite" or connection.is_in_memory_db():
        return []
    messages: list[CheckMessage] = []
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA journal_mode")
        journal_mode = cursor.fetchone()[0]
    if journal_mode != "wal":
        messages.append(
            checks.Warning(
                f"The SQLite database {using!r} has journal_mode={journal_mode}, in which readers and "
                "workers hold each other up.",
                hint='Run "PRAGMA journal_mode=WAL" on it once; the file keeps it. '
                'From Django 5.1: OPTIONS = {"init_command": "PRAGMA journal_mode=WAL"}.',
                id="modelqueue.W004",
            )
        )
    mode = getattr(connection, "transaction_mode", "IMMEDIATE") or "DEFERRED"  # an option of Django 5.1
    if mode != "IMMEDIATE":
        messages.append(
            checks.Warning(
                f"The SQLite database {using!r} has transaction_mode={mode}, so a "
                "transaction of yours that reads before it writes fails when a worker wrote meanwhile "
                '("database is locked").',
                hint='OPTIONS = {"transaction_mode": "IMMEDIATE"}. (The transactions of modelqueue itself '
                "are safe either way.)",
                id="modelqueue.W005",
            )
        )
    return messages


def _check_skip_locked(using: str) -> list[CheckMessage]:
    features = connections[using].features
    if connections[using].vendor == "sqlite" or features.has_select_for_update_skip_locked:
        return []
    return [
        checks.Warning(
            f"The database {using!r} has no SKIP LOCKED, so a claim waits for rows that another "
            "transaction has locked.",
            hint="PostgreSQL, MySQL 8.0.1 and MariaDB 10.6 have it.",
            id="modelqueue.W006",
        )
    ]
