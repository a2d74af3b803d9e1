"""The parts of raw statements: which rows to pick, which columns to return, and instances made of them.

Django can not express ``UPDATE ... RETURNING``. What it can is left to it: the condition of the caller's
queryset, names, conversions.

A queryset is *plain* if a task is made of all columns of one table and of nothing else, as that of
``Task.objects.filter(...)`` is. Of such a one a single statement can return all there is of a task. Joins,
``select_related``, ``only``, annotations and inherited models are not plain: their tasks are loaded by a
query of their own.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import Any, Generic, NamedTuple, TypeVar

from django.core.exceptions import EmptyResultSet
from django.db import connections, models
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Q, Value
from django.db.models.query import ModelIterable

from modelqueue.engines.claims import Candidate, Claim
from modelqueue.fields import set_loaded
from modelqueue.source import Question, Source
from modelqueue.status import State, Status

__all__ = [
    "Columns",
    "Selection",
    "Unreadable",
    "columns_of",
    "first_status",
    "has_composite_key",
    "is_one_of",
    "is_plain",
    "is_same_each_time",
    "key_names",
    "made_once",
    "once",
    "params_of",
    "placeholders",
    "select_keys",
    "select_keys_at_any_time",
    "select_tasks",
    "update_of_row",
    "within",
]

M = TypeVar("M", bound=models.Model)
T = TypeVar("T")

#: Stand, among the parameters of what is compiled once, for the first and the last status that count now.
_FIRST: Any = object()
_LAST: Any = object()


def once(connection: BaseDatabaseWrapper, key: tuple[object, ...], make: Callable[[], T]) -> T:
    """Return what was made for this connection before: a claim takes Django longer to compile than to do.

    Kept with the connection, as compiled queries refer to it and belong to its thread.
    """
    made = vars(connection).setdefault("_modelqueue_made", {})
    if key not in made:
        made[key] = make()
    value: T = made[key]
    return value


def is_plain(source: Source[Any]) -> bool:
    """Say whether a task of this source is one row of one table, in full."""
    rows: Any = source.queryset
    query, concrete = rows.query, rows.model._meta.concrete_model
    return (
        source.owner is concrete
        and not concrete._meta.parents
        and rows._iterable_class is ModelIterable
        and not rows._prefetch_related_lookups
        and not rows._known_related_objects
        and getattr(rows, "_fetch_mode", None) is getattr(models, "FETCH_ONE", None)  # Django 6.1
        and not query.select_related
        and not query.annotations
        and not query.extra
        and not query.extra_tables
        and query.deferred_loading == (frozenset(), True)
        and query.count_active_tables() <= 1
    )


def has_composite_key(model: type[models.Model]) -> bool:
    return len(getattr(model._meta, "pk_fields", [model._meta.pk])) > 1  # from Django 5.2


def placeholders(values: Collection[Any]) -> str:
    return ", ".join(["%s"] * len(values))


def is_one_of(name: str, statuses: Collection[Status | None]) -> Q:
    """Return the condition that a field has one of these statuses."""
    condition = Q(**{f"{name}__in": [status for status in statuses if status is not None]})
    return condition | Q(**{f"{name}__isnull": True}) if None in statuses else condition


@dataclass(frozen=True)
class Selection:
    """A SELECT of the due tasks, those that run first first."""

    sql: str
    params: tuple[Any, ...]
    alias: str
    """What the table with the status column is called in it."""
    converted: Callable[[Iterable[Sequence[Any]]], Iterable[Sequence[Any]]]
    """Makes Python's values of those of the database, row by row."""


def select_keys(source: Source[Any], now: dt.datetime, limit: int) -> Selection:
    """Select the keys (see `key_names`), the statuses and what the claim sets of up to `limit` due tasks."""
    make = partial(select_keys_at_any_time, source, limit)
    return _for_the_moment(source, now, ("keys", limit, *source.names_set), make)


def select_keys_at_any_time(source: Source[Any], limit: int) -> Selection:
    """Do the same for a moment that `within` tells."""
    names = [*key_names(source), source.field.name, *source.names_set]
    return _selection(_due(source).values_list(*names)[:limit], source)


def key_names(source: Source[Any]) -> list[str]:
    """Name the columns of a task's keys: its own, and that of the owner's table where it is another."""
    return ["pk"] if source.owner_key == "pk" else ["pk", source.owner_key]


def select_tasks(source: Source[Any], now: dt.datetime, limit: int) -> Selection:
    """Select all columns, those of `columns_of`, of up to `limit` due tasks of a plain source."""
    return _for_the_moment(
        source,
        now,
        ("tasks", limit),
        lambda: _selection(_due(source)[:limit], source),
    )


def _due(source: Source[M]) -> models.QuerySet[M]:
    return source.up_to(State.waiting, Value(_LAST), Value(_FIRST))


def _selection(rows: Any, source: Source[Any]) -> Selection:
    compiler = rows.query.get_compiler(source.using)
    sql, params = _with_literals(source, *compiler.as_sql())
    selected = [column for column, _, _ in compiler.select]
    converters = compiler.get_converters(selected)
    return Selection(
        sql,
        params,
        selected[-1].alias,
        lambda values: compiler.apply_converters(values, converters),
    )


def first_status(question: Question) -> tuple[str, tuple[Any, ...]]:
    """Return an expression that answers a question by a status or NULL, and its parameters."""
    source, name = question.source, question.source.field.name

    def make() -> tuple[str, tuple[Any, ...]]:
        # Not by the key as well, as a claim: many rows may have one status, which would all be read.
        rows: Any = source.up_to(question.state, Value(_LAST), Value(_FIRST)).order_by(name)
        try:
            sql, params = rows.values(name)[:1].query.get_compiler(source.using).as_sql()
        except EmptyResultSet:
            return "NULL", ()
        sql, params = _with_literals(source, sql, params)
        return f"({sql})", params

    sql, params = made_once(source, ("first status", question.state), make)
    return sql, within(params, question)


def _for_the_moment(
    source: Source[Any], now: dt.datetime, key: tuple[object, ...], make: Callable[[], Selection]
) -> Selection:
    made = made_once(source, key, make)
    return replace(made, params=within(made.params, source.any_due(now)))


def _with_literals(source: Source[Any], sql: str, params: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
    """Put the values of a queryset that is the same each time into the statement, where this can be prepared.

    Of a parameter that it is prepared with, PostgreSQL decides the type by what stands around it. That may be
    another one than that of the value, which would then be rounded, for example.
    """
    # Which only PostgreSQL has.
    compose: Callable[[str, list[Any]], str] | None
    compose = getattr(connections[source.using].ops, "compose_sql", None)
    if compose is None or source.fixed is None or not is_same_each_time(source):
        return sql, (*params,)
    ours = [value is _FIRST or value is _LAST for value in params]
    texts = [
        "%s" if is_ours else compose("%s", [value]).replace("%", "%%")
        for value, is_ours in zip(params, ours, strict=True)
    ]
    return sql.replace("%%", "%%%%") % (*texts,), (*compress(params, ours),)


def is_same_each_time(source: Source[Any]) -> bool:
    """Say whether the statements of a source have the same text each time, and no values of the caller's."""
    if source.at_least is not None:  # a head: each time another
        return False
    # Where there are conditions, they may be others now.
    return source.fixed is not None or (not source.queryset.query.where and is_plain(source))


def made_once(source: Source[Any], key: tuple[object, ...], make: Callable[[], T]) -> T:
    """Return what was made of the rows of a source before, where these are known to be the same."""
    return made_before(connections[source.using], source, key, make) if is_same_each_time(source) else make()


def made_before(
    connection: BaseDatabaseWrapper, source: Source[Any], key: tuple[object, ...], make: Callable[[], T]
) -> T:
    """Return what was made for this connection of the rows of a source that are the same each time."""
    rows: object = source.model if source.fixed is None else source.fixed
    # The number of the field, as Django makes a hash of more, which takes longer than all else here.
    return once(connection, (*key, rows, id(source.field), source.below), make)


def within(params: tuple[Any, ...], question: Question) -> tuple[Any, ...]:
    """Return the parameters of what was compiled once for a question that is asked now."""
    meant = {id(_FIRST): question.first, id(_LAST): question.last}
    return tuple([meant.get(id(value), value) for value in params])


class Unreadable(NamedTuple):
    """What stands for a value that the driver can not make one of Python's of."""

    error: Exception


class Columns(Generic[M]):
    """All columns of a model's table, as SQL, and how an instance is made of their values."""

    def __init__(self, model: type[M], using: str) -> None:
        rows: models.QuerySet[M] = models.QuerySet(model, using=using)
        self._model = model
        self._using = using
        self._compiler: Any = rows.query.get_compiler(using)
        self._compiler.as_sql()  # which finds out what to select
        selected = [column for column, _, _ in self._compiler.select]
        self._converters: dict[int, Any] = self._compiler.get_converters(selected)
        self._key = self._converters.get([column.target for column in selected].index(model._meta.pk))
        self.names = [column.target.attname for column in selected]
        self.sql = ", ".join(sql for _, (sql, _), _ in self._compiler.select)

    def claim(self, source: Source[M], row: Candidate, lease: Status, values: Sequence[Any]) -> Claim[M]:
        """Return the claim of a row that has these values, whether an instance can be made of them or not."""
        try:
            for value in values:
                if isinstance(value, Unreadable):
                    raise value.error
            task = self.instance(values)
        except Exception as error:
            return Claim(row, lease, None, error)
        set_loaded(task, source.field, lease)
        return Claim(row, lease, task)

    def before(self, names: Sequence[str], values: Sequence[Any]) -> dict[str, Any] | None:
        """Make Python's values of the first of these, those in the columns that a claim sets.

        What can not be read is left out, as the row is claimed already.
        """
        known = {}
        for name, value in zip(names, values, strict=False):
            if isinstance(value, Unreadable):
                continue
            with suppress(Exception):  # of the field
                known[name] = self._converted(value, self._converters.get(self.names.index(name)))
        return known or None

    def key(self, value: Any) -> Any:
        """Make Python's value of a primary key of that of the database; the same if that can not be done."""
        try:
            return self._converted(value, self._key)
        except Exception:  # the row is claimed already
            return value

    def _converted(self, value: Any, converters: Any) -> Any:
        if converters is None:
            return value
        ((made,),) = self._compiler.apply_converters([(value,)], {0: converters})
        return made

    def instance(self, values: Sequence[Any]) -> M:
        """Make an instance as a queryset would; raises what the model or one of its fields raises."""
        if self._converters:
            (values,) = self._compiler.apply_converters([values], self._converters)
        return self._model.from_db(self._using, self.names, values)


def columns_of(source: Source[M]) -> Columns[M]:
    """Return the columns of the table of a plain source."""
    key = ("columns", source.model)
    return once(connections[source.using], key, lambda: Columns(source.model, source.using))


def update_of_row(
    source: Source[Any],
    row: Candidate,
    old: Collection[Status | None],
    values: dict[models.Field[Any, Any], Any],
) -> tuple[str, list[Any]]:
    """Return the UPDATE that sets values of one row in the owner's table if its status is one of `old`."""
    connection, meta = connections[source.using], source.owner._meta
    keys = getattr(meta, "pk_fields", [meta.pk])  # several from Django 5.2
    held = [status for status in old if status is not None]
    may_be_null = len(held) < len(old)

    def make() -> str:
        quote = connection.ops.quote_name
        status = quote(str(source.field.column))
        sets = ", ".join([f"{quote(str(field.column))} = %s" for field in values])
        is_row = " AND ".join([f"{quote(str(field.column))} = %s" for field in keys])
        is_old = " OR ".join([f"{status} = %s"] * len(held) + [f"{status} IS NULL"] * may_be_null)
        return f"UPDATE {quote(meta.db_table)} SET {sets} WHERE {is_row} AND ({is_old})"  # noqa: S608

    sql = once(connection, ("update", source.field, *values, len(held), may_be_null), make)
    params = [*values.items(), *zip(keys, row.key if len(keys) > 1 else [row.key], strict=True)]
    params += [(source.field, status) for status in held]
    return sql, params_of(params, connection)


def params_of(
    values: Iterable[tuple[models.Field[Any, Any], Any]], connection: BaseDatabaseWrapper
) -> list[Any]:
    """Return what is sent to the database for values of fields."""
    return [field.get_db_prep_save(value, connection) for field, value in values]
