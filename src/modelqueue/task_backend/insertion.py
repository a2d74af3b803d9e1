"""The INSERT of one task, which Django compiles once.

By `save()` it is compiled anew for each: of 390 us for one on PostgreSQL without fsync 95 were that, and what
Django does around it (two cores, Python 3.11, Django 5.2, November 2026).
"""

from __future__ import annotations

import functools
from typing import Any

from django.db import connections, models
from django.db.models.sql import InsertQuery
from django.db.transaction import mark_for_rollback_on_error

from modelqueue.changes import is_plainly_saved

__all__ = ["insert"]


def insert(row: models.Model, using: str) -> None:
    """Add a row, whose key the database makes, as `save()` does; the instance is not told of its key."""
    connection = connections[using]
    model = type(row)
    statement = _statement(model, connection.vendor, using) if is_plainly_saved(model) else None
    if statement is None:
        row.save(force_insert=True, using=using)
        return
    text, fields = statement
    values = [field.get_db_prep_save(getattr(row, field.attname), connection) for field in fields]
    with mark_for_rollback_on_error(using), connection.cursor() as cursor:
        cursor.execute(text, values)


@functools.cache
def _statement(
    model: type[models.Model], vendor: str, using: str
) -> tuple[str, list[models.Field[Any, Any]]] | None:
    """Return the statement and the fields whose values it takes; None: it takes others, too.

    Args:
        vendor: of the database, by which it is kept: in tests one alias may have several.
    """
    fields: list[models.Field[Any, Any]] = [
        field for field in model._meta.concrete_fields if not field.primary_key
    ]
    query = InsertQuery(model)
    query.insert_values(fields, [model()], raw=True)
    ((text, values),) = query.get_compiler(using).as_sql()
    is_a_value_each = len(values) == len(fields) == text.count("%s")
    return (text, fields) if is_a_value_each else None
