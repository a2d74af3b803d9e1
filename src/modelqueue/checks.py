"""System checks of the settings and the databases, run where ``modelqueue`` is in INSTALLED_APPS.

Those of the databases are warnings: with any of them the queue is correct, and slower or less patient than
it could be.
(The checks of a model's own fields, W001 to W003, are in `modelqueue.fields` and need no app.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.apps import apps
from django.core import checks
from django.core.checks import CheckMessage, Tags, register
from django.db import connections, router

from modelqueue import conf
from modelqueue.fields import StatusField

__all__ = ["check_databases", "check_settings"]


@register()
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Check the project's setting MODELQUEUE."""
    return [checks.Error(problem, hint=cure, id="modelqueue.E001") for problem, cure in conf.problems()]


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
