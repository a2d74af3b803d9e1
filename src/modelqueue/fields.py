"""The model fields: `StatusField` makes a model a queue, `ErrorField` keeps its last failure.

Both are plain columns to the database and to migrations (a BigIntegerField, a TextField), so
adding or removing the library changes no table behind the user's back.

What a `StatusField` promises: **a status is written only where it was assigned.** A view that
loaded a task, and saves it after a worker has finished it, must not put it back to waiting. So
`save()` writes the status only if code assigned it since the instance was loaded, refreshed, or
last saved; otherwise the row keeps the one it has. (`QuerySet.update` and `bulk_update` name their
fields, which is an assignment, and write them as always.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from django.core import checks
from django.db import connections, models, transaction
from django.db.models.expressions import Combinable
from django.db.models.query_utils import DeferredAttribute

from modelqueue.lookups import StatusAttempts, StatusPriority, StatusState
from modelqueue.status import State, Status, priority_to_datetime

if TYPE_CHECKING:
    from django import forms
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models.sql.compiler import SQLCompiler

_ST = TypeVar("_ST", contravariant=True)  # noqa: PLC0105  (the names of django-stubs)
_GT = TypeVar("_GT", covariant=True)  # noqa: PLC0105

if TYPE_CHECKING:
    # As django-stubs declares its own fields, so that its plugin fills in the types, with None where
    # a field is nullable.
    class _BigIntegerField(models.BigIntegerField[_ST, _GT]):
        _pyi_private_set_type: int | Combinable
        _pyi_private_get_type: Status

    class _TextField(models.TextField[_ST, _GT]):
        pass
else:
    # Django's fields take type arguments from a type checker alone.
    _BigIntegerField = {(_ST, _GT): models.BigIntegerField}
    _TextField = {(_ST, _GT): models.TextField}

__all__ = ["ErrorField", "StatusField"]


class StatusField(_BigIntegerField[_ST, _GT]):
    """A BigIntegerField that holds a `Status` and makes its model a task queue.

    ``StatusField()`` is indexed and defaults to ``Status.waiting``: a new row is a task that is due
    at once. ``StatusField(null=True)`` defaults to None, which means "not in the queue". Any option
    of a BigIntegerField may be given and then stands as given.

    Reads as `Status`. Queries: ``filter(status__state="waiting")``, ``status__state__in=[...]``,
    ``values("status__state")``, ``status__priority``, ``status__attempts``.

    Migrations see ``django.db.models.BigIntegerField`` with the same options, so a model that
    declared ``modelqueue.StatusField(db_index=True, default=modelqueue.Status.waiting)`` for
    modelqueue 2 needs no new one.
    """

    db_index: bool
    # Plain values in place of the inherited ones, whose lazy translations make help(modelqueue) fail
    # where Django is not configured. (The inherited messages still apply: Django collects them.)
    description = "Status of a task"
    default_error_messages: ClassVar[dict[str, Any]] = {}

    def __init__(self, verbose_name: Any = None, name: str | None = None, **options: Any) -> None:
        options.setdefault("db_index", True)
        if not options.get("null") and "default" not in options and "db_default" not in options:
            options["default"] = Status.waiting
        super().__init__(verbose_name, name, **options)

    def deconstruct(self) -> tuple[str, str, Sequence[Any], dict[str, Any]]:
        name, _, args, options = super().deconstruct()
        for option in ("default", "db_default"):
            if isinstance(options.get(option), Status):
                options[option] = int(options[option])  # a migration would say Status(...) and not import it
        return name, "django.db.models.BigIntegerField", args, options

    def clone(self) -> StatusField[_ST, _GT]:
        # deconstruct() leaves out what is a BigIntegerField's default; what is not ours is given here.
        _, _, args, options = self.deconstruct()
        return type(self)(*args, **{"db_index": self.db_index, **options})

    def contribute_to_class(self, cls: type[models.Model], name: str, private_only: bool = False) -> None:
        super().contribute_to_class(cls, name, private_only)
        # Not descriptor_class: Django keeps an attribute that an abstract parent has defined.
        setattr(cls, self.attname, StatusAttribute(self))
        make_watchable(cls)

    # Values

    def from_db_value(self, value: int | None, *args: Any) -> Status | None:
        return None if value is None else Status(value)

    def get_prep_value(self, value: Any) -> Any:
        if type(value) is Status:  # first, as that is what each row that is written has
            return int(value)
        _refuse_state(self, value)
        try:
            return super().get_prep_value(value)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{error} Give for example Status.waiting(); to compare with a state use {self.name}__state."
            ) from error

    def to_python(self, value: Any) -> Any:
        if value is None or isinstance(value, Status):
            return value
        return Status(super().to_python(value))

    def value_from_object(self, obj: models.Model) -> Any:
        # Forms and serializers want the digits, str() of a Status is words.
        value = super().value_from_object(obj)
        return int(value) if isinstance(value, Status) else value

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:
        if add and _RECORD not in model_instance.__dict__:
            return super().pre_save(model_instance, add)
        if _is_to_be_written(model_instance, self.attname):
            _note(model_instance, self.attname, _SAVING)
        elif not add and not model_instance._state.adding:
            return _AsStored(self)
        return super().pre_save(model_instance, add)

    def save_form_data(self, instance: models.Model, data: Any) -> None:
        # A form in which nobody touched the status gives back the one that the instance has.
        if data is not getattr(instance, self.attname):
            super().save_form_data(instance, data)

    def formfield(self, **options: Any) -> forms.Field | None:
        from modelqueue.forms import StatusFormField

        return super().formfield(**{"form_class": StatusFormField, **options})

    # Checks

    def check(self, **kwargs: Any) -> list[checks.CheckMessage]:
        return [
            *super().check(**kwargs),
            *self._check_index(),
            *self._check_default(),
            *self._check_unique(),
        ]

    def _check_index(self) -> list[checks.CheckMessage]:
        if is_indexed(self):
            return []
        return [
            checks.Warning(
                f"{self} has no index, so every claim reads the whole table.",
                hint=f"Remove db_index=False, or add modelqueue.QueueIndex({self.name!r}, name=...), or an "
                f"index in which {self.name!r} follows what all queues on it are filtered by, to "
                "Meta.indexes.",
                obj=self,
                id="modelqueue.W001",
            )
        ]

    def _check_default(self) -> list[checks.CheckMessage]:
        default = self.default
        if self.has_default() and default is not None and not callable(default):
            is_number = isinstance(default, int) and not isinstance(default, (State, bool))
            if not is_number or Status(default).state not in Status.states:
                return [
                    checks.Warning(
                        f"{self} has the default {default!r}, which is no status, so no worker ever sees a "
                        "new row.",
                        hint="Give a function, default=modelqueue.Status.waiting, or a number that it "
                        "makes, such as Status.waiting(priority=0).",
                        obj=self,
                        id="modelqueue.W007",
                    )
                ]
        if not isinstance(default, Status) or priority_to_datetime(default.priority) is None:
            return []
        return [
            checks.Warning(
                f"{self} has the default {default!r}: one moment, computed when the model was "
                "imported, is the priority of every new row, so they do not run in their order.",
                hint=f"Give the function, not its result: default=modelqueue.Status.{default.state}",
                obj=self,
                id="modelqueue.W002",
            )
        ]

    def _check_unique(self) -> list[checks.CheckMessage]:
        if not self.unique:
            return []
        return [
            checks.Warning(
                f"{self} is unique, but two tasks that are claimed in one millisecond have the same status.",
                hint="Remove unique=True. Which task is which is said by the primary key.",
                obj=self,
                id="modelqueue.W003",
            )
        ]


StatusField.register_lookup(StatusState)
StatusField.register_lookup(StatusPriority)
StatusField.register_lookup(StatusAttempts)


def is_indexed(field: Any, with_condition: bool = True, after: Collection[str] | None = None) -> bool:
    """Say whether a field is in an index or a unique constraint, in the order of which tasks can be read.

    Args:
        with_condition: whether one that has only some of the rows counts. (A `QueueIndex` always does.)
        after: the fields that may come before it there, as their values are given; None: any.
    """
    meta = field.model._meta
    indexes = [*meta.unique_together]
    for one in [*meta.indexes, *meta.constraints]:
        is_unique = isinstance(one, models.UniqueConstraint)
        if (is_unique or isinstance(one, models.Index)) and (with_condition or one.condition is None):
            indexes.append(tuple(name.removeprefix("-") for name in one.fields))
    before = [names[: names.index(field.name)] for names in indexes if field.name in names]
    is_in_one = any(after is None or set(names) <= set(after) for names in before)
    return bool(field.db_index or field.unique or is_in_one)


def _refuse_state(field: models.Field[Any, Any], value: Any) -> None:
    # Both are ints, and as a status they would be foreign numbers, which no worker ever sees.
    if isinstance(value, (State, bool)):
        raise TypeError(
            f"{field} takes a Status, not {value!r}. Give for example Status.waiting(); "
            f"to compare with a state use {field.name}__state."
        )


# Which queues are declared on a field: where `run` looks

_QUEUES = "_modelqueue_queues"


def declared_on(field: models.Field[Any, Any]) -> list[Any]:
    """Return the declared queues of a status field; the list is that of the field, to be changed."""
    queues: list[Any] = vars(field).setdefault(_QUEUES, [])
    return queues


# "Written only where it was assigned": the bookkeeping
#
# An instance keeps a record of the status fields that were assigned since they were loaded. While
# it is new (`_state.adding`) everything is written anyhow; after an INSERT, by save() or bulk_create(),
# nothing is left to be written, as after a load.

_RECORD = "_modelqueue_assigned"
_LOADING = "_modelqueue_loading"
_WRITING = "_modelqueue_writing"

#: Key in an instance's __dict__ for a `Watcher`.
WATCHER = "_modelqueue_watcher"


class Watcher(Protocol):
    """Who wants to know what is loaded into an instance and saved from it while an action runs."""

    def check(self, instance: models.Model) -> None:
        """An instance, or a copy of it, is about to be saved; raises if it must not be."""

    def loaded(self, instance: models.Model, before: dict[str, Any]) -> None:
        """`refresh_from_db` has set values; `before` is the instance's __dict__ as it was."""

    def saved(self, instance: models.Model, update_fields: Collection[str] | None, saved: Saved) -> None:
        """`save` has written the named fields, or all."""


class Saved:
    """A save() that was done, and that stands unless the transaction around it is rolled back."""

    def __init__(self, using: str) -> None:
        self._using = using
        self.is_committed = not connections[using].in_atomic_block
        if not self.is_committed:
            transaction.on_commit(self._commit, using=using)

    def _commit(self) -> None:
        self.is_committed = True

    @property
    def stands(self) -> bool:
        # Django forgets what it was to do on commit when it rolls back, also to a savepoint.
        return self.is_committed or any(
            hook[1] == self._commit for hook in connections[self._using].run_on_commit
        )

    def __getstate__(self) -> dict[str, Any]:
        # What is pickled or copied leaves the transaction; it can not be told of a rollback any more.
        return {"_using": self._using, "is_committed": True}


_ASSIGNED = "assigned"
_SAVING = "saving"


def _record(instance: models.Model) -> dict[str, str | Saved]:
    """Return the record of an instance, by attname.

    "assigned": to be written; "saving": handed to a save() that is under way; a `Saved`: written by
    this instance, and not loaded or assigned since. What was loaded has no entry.
    """
    record: dict[str, str | Saved] = instance.__dict__.get(_RECORD, {})
    return record


def _note(instance: models.Model, attname: str, entry: str | Saved | None) -> None:
    """Set (or, with None, remove) an entry; on a copy, as copy.copy(instance) shares the dict."""
    known = _record(instance)
    if entry is None and attname not in known:
        return
    record = {name: value for name, value in known.items() if name != attname}
    if entry is not None:
        record[attname] = entry
    instance.__dict__[_RECORD] = record


def _is_to_be_written(instance: models.Model, attname: str) -> bool:
    entry = _record(instance).get(attname)
    return entry == _ASSIGNED or (isinstance(entry, Saved) and not entry.stands)


class StatusAttribute(DeferredAttribute):
    """The attribute of a `StatusField`: turns an int into `Status` and notes what was assigned."""

    def __set__(self, instance: models.Model, value: Any) -> None:
        data = instance.__dict__
        name = self.field.attname
        was_loaded = data.get(_LOADING, False)
        if not was_loaded and value is not None and value is data.get(name):
            # full_clean() assigns what it has just read; that is nobody's decision.
            return
        if type(value) is not Status:
            _refuse_state(self.field, value)
        if isinstance(value, int):
            # Always an object of our own, lest a constant that is assigned twice looks unchanged.
            value = Status(value)
        data[name] = value
        if was_loaded:
            _note(instance, name, None)
        elif not instance._state.adding and _WRITING not in data:
            _note(instance, name, _ASSIGNED)

    def __delete__(self, instance: models.Model) -> None:
        # Django's way to have a field loaded again when it is read next.
        name = self.field.attname
        if name not in instance.__dict__:
            raise AttributeError(f"{type(instance).__name__}.{name} is deferred already.")
        del instance.__dict__[name]
        _note(instance, name, None)

    def fetch_many(self, instances: Iterable[models.Model]) -> None:
        """Load a deferred status for several instances (Django 6.1: ``FETCH_PEERS``)."""
        instances = list(instances)
        missing = [instance for instance in instances if self.field.attname not in instance.__dict__]
        super().fetch_many(instances)
        for instance in missing:
            _note(instance, self.field.attname, None)


class _AsStored:
    """SQL for "what the row holds", for a status that save() must leave alone.

    F() says the same, but Django 6 reads an F() back after save(), or defers the field.
    """

    def __init__(self, field: models.Field[Any, Any]) -> None:
        self.field = field

    def as_sql(self, compiler: SQLCompiler, connection: BaseDatabaseWrapper) -> tuple[str, list[Any]]:
        return connection.ops.quote_name(str(self.field.column)), []


def set_loaded(instance: models.Model, field: models.Field[Any, Any], status: Status | None) -> None:
    """Set a status, on any integer field, as if the instance had been loaded with it just now."""
    instance.__dict__[field.attname] = status
    _note(instance, field.attname, None)


def is_assigned(instance: models.Model, field: models.Field[Any, Any]) -> bool:
    """Say whether code assigned the status since it was loaded or set by `set_loaded`, saved or not."""
    return field.attname in _record(instance)


def is_saved(instance: models.Model, field: models.Field[Any, Any]) -> bool:
    """Say whether the status was assigned and then written by the instance's own `save`."""
    entry = _record(instance).get(field.attname)
    return isinstance(entry, Saved) and entry.stands


def unsave(instance: models.Model, field: models.Field[Any, Any]) -> None:
    """Note that what the instance saved was rolled back, where Django could not see it."""
    if is_assigned(instance, field):
        _note(instance, field.attname, _ASSIGNED)


# Django has no signal for a refresh, post_save does not tell a save() that failed from one that was
# never tried, and nothing tells what a save() sets from what its receivers do, so three methods of the
# model are wrapped.


def make_watchable(model: type[models.Model]) -> None:
    """Wrap the methods of a model, once; also of one whose status is in a plain BigIntegerField."""
    if not hasattr(model.save_base, "_modelqueue"):
        model.refresh_from_db = _loads(model.refresh_from_db)  # type: ignore[method-assign]
        model.save_base = _saves(model.save_base)  # type: ignore[method-assign]
        model._save_table = _writes(model._save_table)  # type: ignore[attr-defined]


def _loads(method: Callable[..., None]) -> Callable[..., None]:
    """Wrap `refresh_from_db`: what it sets was loaded, not assigned."""

    @functools.wraps(method)
    def refresh_from_db(self: models.Model, *args: Any, **kwargs: Any) -> None:
        watcher: Watcher | None = self.__dict__.get(WATCHER)
        before = dict(self.__dict__) if watcher else {}
        self.__dict__[_LOADING] = True
        try:
            method(self, *args, **kwargs)
        finally:
            self.__dict__.pop(_LOADING, None)
        if watcher:
            watcher.loaded(self, before)

    return refresh_from_db


def _saves(method: Callable[..., None]) -> Callable[..., None]:
    """Wrap `save_base`: what it wrote was saved; after a failure it is assigned still."""

    @functools.wraps(method)
    def save_base(self: models.Model, *args: Any, **kwargs: Any) -> None:
        watcher: Watcher | None = self.__dict__.get(WATCHER)
        if watcher:
            watcher.check(self)
        pending = [name for name in _record(self) if _is_to_be_written(self, name)]
        try:
            method(self, *args, **kwargs)
        except BaseException:
            for name in pending:
                if name in _record(self):  # and not loaded again by a receiver before it raised
                    _note(self, name, _ASSIGNED)
            raise
        written = [name for name, entry in _record(self).items() if entry == _SAVING]
        if written or watcher:
            saved = Saved(str(self._state.db))
            for name in written:
                _note(self, name, saved)
            if watcher:
                watcher.saved(self, kwargs.get("update_fields"), saved)

    save_base._modelqueue = True  # type: ignore[attr-defined]
    return save_base


def _writes(method: Callable[..., bool]) -> Callable[..., bool]:
    """Wrap `_save_table`: what it sets is what the database answered (Django 6: for an expression)."""

    @functools.wraps(method)
    def _save_table(self: models.Model, *args: Any, **kwargs: Any) -> bool:
        self.__dict__[_WRITING] = True
        try:
            return method(self, *args, **kwargs)
        finally:
            self.__dict__.pop(_WRITING, None)

    return _save_table


class ErrorField(_TextField[_ST, _GT]):
    """A TextField for the last failure of a task; empty after a success.

    Name it as ``error_field`` of `modelqueue.run`. Its first line is ``module.Class: message``, then
    comes the traceback, shortened to 10,000 characters. A recovery writes its reason. Not editable
    in forms; show it in the admin through ``readonly_fields``. To migrations it is a TextField.
    """

    description = "Last failure of a task"  # plain, as in StatusField
    default_error_messages: ClassVar[dict[str, Any]] = {}

    def __init__(self, verbose_name: Any = None, name: str | None = None, **options: Any) -> None:
        super().__init__(verbose_name, name, **{"blank": True, "default": "", "editable": False, **options})

    def deconstruct(self) -> tuple[str, str, Sequence[Any], dict[str, Any]]:
        name, _, args, options = super().deconstruct()
        return name, "django.db.models.TextField", args, options

    def clone(self) -> ErrorField[_ST, _GT]:
        _, _, args, options = self.deconstruct()
        stated = {"blank": self.blank, "editable": self.editable}
        return type(self)(*args, **{**stated, **options})
