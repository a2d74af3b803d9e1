"""A source of tasks: a queryset and its status field, checked once and resolved to tables.

Everything that a claim must know is found out here, before anything is written: which model's table
holds the status column (a parent's, where the field is inherited), which database, and whether the
queryset is of a kind from which rows can be claimed.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar, Union, cast

from django.core.exceptions import FieldDoesNotExist
from django.db import connections, models, router
from django.db.models import F, Q
from django.db.models.lookups import GreaterThanOrEqual, LessThan
from django.db.models.query import ModelIterable

from modelqueue.claim_values import ClaimValues, Values
from modelqueue.fields import ErrorField, StatusField, make_watchable
from modelqueue.lookups import IsLive, StatusAttempts
from modelqueue.status import State, Status

__all__ = ["Question", "Source", "Tasks"]

M = TypeVar("M", bound=models.Model)
Tasks = Union["models.QuerySet[M]", "models.Manager[M]"]

_CHUNK = 500
#: How many tasks are the head of a queue.
_HEAD = 1000


@dataclass(frozen=True)
class Source(Generic[M]):
    """Where tasks come from and where their outcomes go. Made by `Source.of`, which checks its arguments."""

    queryset: models.QuerySet[M]
    """The caller's rows on the database `using`, unordered, unlocked."""
    field: models.Field[Any, Any]
    using: str
    error_field: models.Field[Any, Any] | None = None
    claim_values: ClaimValues | None = None
    """What a claim sets besides the status, if anything."""
    queue_name: str | None = None
    """The declared queue whose tasks they are; None: `modelqueue.run` and the like serve any queryset."""
    fixed: models.QuerySet[M] | None = None
    """The queryset of its queue, if that is the same each time."""
    below: int | str | None = None
    """Take only tasks that have had fewer attempts than that, or than this field of theirs says."""
    at_least: int | str | None = None
    """Take only tasks that have had so many attempts or more, or as many as this field of theirs says."""
    since: int | None = None
    """Take no task with a smaller status, of those in the state that is looked for."""
    until: int | None = None
    """Take no task with a greater status."""
    sets: Values = dataclass_field(default_factory=dict)
    """The values of the claim that is under way, see `for_a_claim`."""

    @classmethod
    def of(
        cls,
        queryset: Tasks[M],
        field: str,
        error_field: str | None = None,
        claim_values: ClaimValues | None = None,
        queue_name: str | None = None,
    ) -> Source[M]:
        """Check a queryset (or manager) and the names of its status field and error field.

        Raises:
            TypeError, ValueError: what can not be a source of tasks, and what to do about it.
        """
        if not isinstance(queryset, (models.QuerySet, models.Manager)):
            raise TypeError(
                f"Tasks come from a QuerySet or a Manager, not from {queryset!r}. "
                f"Give for example {getattr(queryset, '__name__', 'Task')}.objects.all()."
            )
        rows = on_write_database(queryset)
        _check_claimable(rows)
        # What follows changes a clone of the caller's. order_by() and the like would make more of them.
        rows.query.clear_ordering(force=True)
        rows.query.select_for_update = False
        if not rows.query.standard_ordering:
            rows = rows.reverse()  # undoes the caller's reverse(), which outlives order_by()
        error = None if error_field is None else _error_field(rows.model, error_field)
        status = status_field(rows.model, field)
        make_watchable(rows.model)
        return cls(rows, status, rows.db, error, claim_values, queue_name)

    def for_a_claim(self) -> Source[M]:
        """Return the source with the values that one claim sets, the same for all of its tasks."""
        return self if self.claim_values is None else replace(self, sets=self.claim_values.ask())

    @property
    def names_set(self) -> list[str]:
        """Names of the fields that the claim under way sets, all of them in the owner's table."""
        return [field.attname for field in self.sets]

    def by_field(self, values: Mapping[str, Any] | None) -> Values:
        """Return values by the fields of the owner that have these names."""
        if not values:
            return {}
        fields = {field.attname: field for field in self.owner._meta.concrete_fields}
        return {fields[name]: value for name, value in values.items()}

    @property
    def model(self) -> type[M]:
        return self.queryset.model

    @property
    def owner(self) -> type[models.Model]:
        """The model whose own table has the status column; a parent where the field is inherited."""
        return owner_of(self.field)

    @property
    def owner_key(self) -> str:
        """The query name of the owner's primary key, seen from `model`."""
        return owner_key(self.model, self.field)

    def owner_rows(self) -> models.QuerySet[Any]:
        """All rows of the owner's table, whatever its managers filter."""
        rows: models.QuerySet[Any] = models.QuerySet(self.owner, using=self.using)
        rows = rows.order_by()
        return rows

    @property
    def has_error_field_elsewhere(self) -> bool:
        """True if the error field is in the table of a child, or of another parent, than the status."""
        return self.error_field is not None and owner_of(self.error_field) is not self.owner

    def error_rows(self) -> models.QuerySet[Any]:
        """All rows of the table that has the error field."""
        field = self.field if self.error_field is None else self.error_field
        rows: models.QuerySet[Any] = models.QuerySet(owner_of(field), using=self.using)
        return rows.order_by()

    def keys_of_errors(self, pks: list[Any]) -> dict[Any, Any]:
        """Return, for rows by their primary key, the primary key in the table of the error field."""
        field = self.field if self.error_field is None else self.error_field
        key = owner_key(self.model, field)
        return dict(self.rows().filter(pk__in=pks).values_list("pk", F(key)))

    def rows(self) -> models.QuerySet[M]:
        """All rows of the model, whatever its managers filter."""
        rows: models.QuerySet[M] = models.QuerySet(self.model, using=self.using)
        return rows

    def due(self, now: dt.datetime, first: int | None = None) -> models.QuerySet[M]:
        """The waiting rows whose priority has come, the first to run first; from the status `first` on."""
        return self.up_to(State.waiting, self._last_due(now), first)

    def expired(self, cutoff: dt.datetime, first: int | None = None) -> models.QuerySet[M]:
        """The working rows whose last claim or renewal was at `cutoff` or before; from `first` on."""
        return self.up_to(State.working, self._last_expired(cutoff), first)

    def any_due(self, now: dt.datetime) -> Question:
        return Question(self, State.waiting, self._first(State.waiting), self._last_due(now))

    def any_expired(self, cutoff: dt.datetime) -> Question:
        return Question(self, State.working, self._first(State.working), self._last_expired(cutoff))

    def between(self, first: int, last: int) -> Source[M]:
        """Return those of its tasks whose statuses are in a range."""
        return replace(self, since=first, until=last if self.until is None else min(last, self.until))

    def up_to(self, state: State, last: Any, first: Any = None) -> models.QuerySet[M]:
        """The waiting or working rows up to a status, from `first` on; both may be expressions."""
        name = self.field.name
        bounds = {
            f"{name}__gte": self._first(state) if first is None else first,
            f"{name}__lte": last,
        }
        rows: models.QuerySet[M] = self.queryset.filter(Q(**bounds), *self.live_condition())
        if state == State.waiting:
            rows = rows.filter(*self._attempts_wanted())
        rows = rows.order_by(name, "pk")
        return rows

    def _attempts_wanted(self) -> Iterator[Any]:
        """Yield the conditions by which a task has had as many attempts as are wanted.

        By a field of its own one that is never retried counts as below, as does one without limit. So does
        one whose number is negative: its attempt fails, and says why.
        """
        attempts = StatusAttempts(F(self.field.name))
        if isinstance(self.below, str):
            few = Q(LessThan(attempts, F(self.below)))
            yield few | Q(**{f"{self.below}__lte": 0}) | Q(**{f"{self.below}__isnull": True})
        elif self.below is not None:
            yield LessThan(attempts, self.below)
        if isinstance(self.at_least, str):
            yield GreaterThanOrEqual(attempts, F(self.at_least))
            yield Q(**{f"{self.at_least}__gt": 0})
        elif self.at_least is not None:
            yield GreaterThanOrEqual(attempts, self.at_least)

    def live_condition(self) -> list[IsLive]:
        """Return the condition by which the database sees that all wanted rows are in a `QueueIndex`.

        It comes after the other bounds: SQLite seeks to the first of several lower ones, and reads to the
        first of several upper ones. Nothing where a database has no such index.
        """
        can = connections[self.using].features.supports_partial_indexes
        return [IsLive(F(self.field.name))] if can else []

    def _first(self, state: State) -> int:
        return Status.minimum(state) if self.since is None else int(self.since)

    def _last_due(self, now: dt.datetime) -> int:
        last = int(Status.waiting(now, Status.max_attempts))
        return last if self.until is None else int(min(last, self.until))

    def _last_expired(self, cutoff: dt.datetime) -> int:
        return int(Status.working(cutoff, Status.max_attempts))

    def head(self, now: dt.datetime) -> models.QuerySet[Any]:
        """Return the query of where the head of the queue ends: a status; none if it is all of the queue."""
        name = self.field.name
        rows: models.QuerySet[Any] = self.due(now).order_by(name).values(name)
        return rows[_HEAD : _HEAD + 1]

    def had(self, attempts: int | str, head: int | None) -> Source[M]:
        """Return those tasks in the head of the queue that have had so many attempts or more.

        Not all of them: each look would read a backlog of a million to its end, and behind so many it is not
        their turn yet.

        Args:
            attempts: or the name of the field of theirs that says how many.
            head: what `head` has found.
        """
        # The last number up to there of a task with so many attempts. Very many tasks may have one number.
        least = 1 if isinstance(attempts, str) else attempts
        until = head if head is None or head % 10 >= least else head - head % 10 - 1
        return replace(self, at_least=attempts, until=until)


class Question(NamedTuple):
    """Which is the first task of a source in this state, waiting or working, from a status to a status?"""

    source: Source[Any]
    state: State
    first: int
    last: int

    def between(self, first: int, last: int) -> Question:
        """Ask the same of a range of statuses."""
        # The driver of MySQL would send the text of a Status.
        return self._replace(first=int(max(first, self.first)), last=int(min(last, self.last)))


def on_write_database(rows: Tasks[M]) -> models.QuerySet[M]:
    """Return a clone with the alias that it names with ``using()``, else the one to write its rows to."""
    clone: Any = rows.all()
    clone._db = write_alias(clone)  # using() would make one more clone
    made: models.QuerySet[M] = clone
    return made


def write_alias(rows: Any) -> str:
    """Return the database that a queryset or manager names by ``using()``, else the one to write rows to."""
    # What QuerySet.update() asks the router, see QuerySet.db; there is no public way to ask it ahead.
    alias: str = rows._db or router.db_for_write(rows.model, **rows._hints)
    return alias


def owner_rows(rows: models.QuerySet[Any], field: models.Field[Any, Any]) -> Iterator[models.QuerySet[Any]]:
    """Yield the rows of any queryset as querysets of the one table that has the status column.

    A condition on that column, filtered on top of one, is then asked by the UPDATE itself. Of a
    queryset with joins Django would ask it in a subquery, whose answer may be old by the time the
    UPDATE has waited for a row.
    """
    owner, query = owner_of(field), rows.query
    plain = not (query.is_sliced or query.combinator or query.distinct or query.group_by)
    if plain and owner is rows.model._meta.concrete_model and query.count_active_tables() <= 1:
        yield rows.order_by()
        return
    # All keys first: rows that the caller changes must not come up again further down in an open cursor.
    # Each once: a join may have multiplied them. Not flat=True, which takes a composite key apart.
    keys = iter(dict.fromkeys(key for (key,) in rows.values_list(owner_key(rows.model, field))))
    while chunk := list(islice(keys, _CHUNK)):
        yield models.QuerySet(owner, using=rows.db).filter(pk__in=chunk).order_by()


def owner_of(field: models.Field[Any, Any]) -> type[models.Model]:
    owner: type[models.Model] = field.model
    return owner._meta.concrete_model or owner


def owner_key(model: type[models.Model], field: models.Field[Any, Any]) -> str:
    owner = owner_of(field)
    return "pk" if owner is model._meta.concrete_model else owner._meta.pk.name


def status_field(model: type[models.Model], name: str) -> models.Field[Any, Any]:
    """Return the field of a model that holds statuses.

    Raises:
        ValueError: the model has no such field.
        TypeError: `name` is no str, or the field is no `StatusField` or other BigIntegerField.
    """
    return _field_of_type(model, name, models.BigIntegerField, "a modelqueue.StatusField")


def _error_field(model: type[models.Model], name: str) -> models.Field[Any, Any]:
    """Return the field of a model that takes the text of a failure; raises as `status_field`."""
    return _field_of_type(model, name, ErrorField, "a modelqueue.ErrorField")


def _field_of_type(
    model: type[models.Model], name: str, kind: type[models.Field[Any, Any]], wanted: str
) -> models.Field[Any, Any]:
    if not isinstance(name, str):
        raise TypeError(f"A field is given by its name, a str, not by {name!r}.")
    try:
        field = model._meta.get_field(name)
    except FieldDoesNotExist:
        raise ValueError(
            f"{model.__name__} has no field {name!r}, which should be {wanted}. "
            f"Of that kind {_fields_of_type(model, kind)}"
        ) from None
    if not _is_of_type(field, kind):
        raise TypeError(
            f"{model.__name__}.{name} is a {type(field).__name__}, not {wanted}. "
            f"Of that kind {_fields_of_type(model, kind)}"
        )
    return cast("models.Field[Any, Any]", field)


def _fields_of_type(model: type[models.Model], kind: type[models.Field[Any, Any]]) -> str:
    found = sorted(
        field.name + ("" if isinstance(field, (StatusField, ErrorField)) else f" (a {type(field).__name__})")
        for field in model._meta.concrete_fields
        if _is_of_type(field, kind)
    )
    return f"{model.__name__} has " + (f"the fields {', '.join(found)}." if found else "none: add one.")


def _is_of_type(field: Any, kind: type[models.Field[Any, Any]]) -> bool:
    return isinstance(field, kind) and not isinstance(field, models.AutoField)  # as BigAutoField is


def _check_claimable(rows: models.QuerySet[Any]) -> None:
    query = rows.query
    if query.combinator:
        what, why = f"{query.combinator}()", "its rows can not be locked"
    elif query.is_sliced:
        what, why = "a slice", "a claim takes the first rows itself"
    elif query.distinct:
        what, why = "distinct()", "its rows can not be locked, and no task is claimed twice anyhow"
    elif not issubclass(rows._iterable_class, ModelIterable):
        what, why = "values() or values_list()", "an action gets instances"
    elif query.group_by is not None:
        what, why = "an aggregate", "its rows can not be locked"
    else:
        return
    raise ValueError(
        f"Tasks of {rows.model.__name__} can not be claimed from a queryset with {what}: {why}. "
        "Select the rows with filter(), for example filter(pk__in=...)."
    )
