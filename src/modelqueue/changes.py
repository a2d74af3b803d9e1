"""What an action changed on its instance, found by comparing it with a copy from the claim.

Only that is written back. Everything else of the row belongs to whoever edited it meanwhile.
"""

from __future__ import annotations

import copy
import datetime as dt
import functools
from collections.abc import Collection
from decimal import Decimal
from typing import Any
from uuid import UUID

from django.db import models, router
from django.db.models.fields.files import FieldFile
from django.db.models.signals import post_save, pre_save
from django.dispatch import Signal

from modelqueue.fields import WATCHER, Saved, StatusField, is_assigned, is_saved, unsave
from modelqueue.source import Source
from modelqueue.status import Status

__all__ = ["Snapshot", "is_plainly_saved", "save_merged"]

Fields = list["models.Field[Any, Any]"]

_UNREAD = object()  # the value of a deferred field
_IMMUTABLE = {bool, bytes, dt.date, dt.datetime, dt.time, Decimal, float, int, Status, str, type(None), UUID}


class Snapshot:
    """The values of an instance when it was claimed, deep enough to see a change inside a JSON value.

    Watches the instance until `close`: what `refresh_from_db` (or the access to a deferred field)
    loads from then on is no change, and what the action saves itself is written already, unless the
    transaction in which it did so is rolled back.
    """

    def __init__(self, instance: models.Model, source: Source[Any], lease: Status) -> None:
        self._instance = instance
        self._using = source.using
        self._status = source.field
        self._lease = lease
        self._status_read: Status | None = lease
        # What the row holds as far as we know: what was read, and on top of it what was saved.
        self._layers: list[tuple[Saved | None, dict[str, Any]]] = [(None, _copy_of_all(instance))]
        self._related = dict(_related_of(instance))
        self._pk = instance.pk
        self._standing: Collection[Saved] = ()
        self._undone: dict[str, Any] | None = None
        instance.__dict__[WATCHER] = self

    def close(self) -> None:
        self._instance.__dict__.pop(WATCHER, None)

    def check(self, instance: models.Model) -> None:
        """Refuse to make another row of the task which nobody owns, and which begins its action once more.

        Raises:
            ValueError: the instance, or a copy of it under our lease, has another primary key.
        """
        has_lease = instance.__dict__.get(self._status.attname) == self._lease
        if instance.pk != self._pk and (instance is self._instance or has_lease):
            raise ValueError(self._text_of_changed_key(instance))

    def loaded(self, instance: models.Model, before: dict[str, Any]) -> None:
        if instance is self._instance:  # and no copy.copy() that the action made
            now = instance.__dict__
            fields = _loaded_fields(instance)
            read = [f for f in fields if before.get(f.attname, _UNREAD) is not now[f.attname]]
            values = self._copy_of(read)
            # What others wrote is not ours to replace.
            self._status_read = values.pop(self._status.attname, self._status_read)
            self._layers.append((None, values))

    def saved(self, instance: models.Model, update_fields: Collection[str] | None, saved: Saved) -> None:
        if instance is self._instance and instance._state.db == self._using:
            fields = _loaded_fields(instance)
            if update_fields is not None:
                fields = [f for f in fields if f.name in update_fields or f.attname in update_fields]
            values = self._copy_of(fields)
            if isinstance(self._status, StatusField) and not is_saved(instance, self._status):
                values.pop(self._status.attname, None)
            last = self._layers[-1][0]
            if saved.is_committed and last is not None and last.is_committed:
                self._layers[-1][1].update(values)  # an action may save its progress thousands of times
            else:
                self._layers.append((saved, values))

    def begin(self) -> None:
        """The action is about to begin: what was loaded until now is what an `undo` gives back."""
        if len(self._layers) > 1 and all(saved is None for saved, _ in self._layers):
            self._layers[:] = [(None, self._values())]

    def forget_saves(self) -> None:
        """Take back what `saved` said: it was all rolled back, behind Django's back."""
        first = self._layers[0][1]
        for saved, values in self._layers[1:]:
            if saved is None:  # what was read of deferred fields is known from then on
                first.update({name: value for name, value in values.items() if name not in first})
        del self._layers[1:]
        unsave(self._instance, self._status)

    def undo(self) -> None:
        """Give the instance its values from the claim back: what the action did was rolled back."""
        instance = self._instance
        self._undone = dict(instance.__dict__)
        instance._state = copy.copy(instance._state)
        instance._state.fields_cache = dict(self._related)
        claimed = dict(self._layers[0][1])
        self.forget_saves()
        for field in _loaded_fields(instance):
            before = claimed.get(field.attname, _UNREAD)
            if before is _UNREAD:  # deferred, then and now
                del instance.__dict__[field.attname]
            elif _differs(before, instance.__dict__[field.attname]):
                instance.__dict__[field.attname] = _copied(before)
        instance._state.adding = False
        instance._state.db = self._using

    def prepare_commit(self) -> None:
        """Remember which saves stand now, just before the commit."""
        self._standing = [saved for saved, _ in self._layers if saved is not None and saved.stands]

    def confirm_commit(self) -> None:
        """What stood at `prepare_commit` is committed, so take back an `undo` that was in vain.

        The hooks by which Django tells that are not called after one that fails, nor when the answer to
        the commit is lost.
        """
        for saved in self._standing:
            saved.is_committed = True
        if self._undone is not None:
            self._instance.__dict__.clear()
            self._instance.__dict__.update(self._undone)

    def _copy_of(self, fields: Fields) -> dict[str, Any]:
        return {field.attname: _copied(self._instance.__dict__[field.attname]) for field in fields}

    def _values(self) -> dict[str, Any]:
        if len(self._layers) == 1:
            return self._layers[0][1]
        merged: dict[str, Any] = {}
        for saved, values in self._layers:
            if saved is None or saved.stands:
                merged.update(values)
        return merged

    def known(self, field: models.Field[Any, Any]) -> Any:
        """What the row holds in a field as far as we know."""
        return self._values().get(field.attname, _UNREAD)

    @property
    def written(self) -> Status | None:
        """The status that this attempt wrote last: the lease, or what a save() of the action did."""
        written: Status | None = self._values().get(self._status.attname, self._lease)
        return written

    @property
    def assigned(self) -> Any:
        """The status that the action assigned, saved or not; else the one that this attempt wrote last."""
        value = self._instance.__dict__.get(self._status.attname, self._status_read)
        if isinstance(self._status, StatusField):
            return value if is_assigned(self._instance, self._status) else self.written
        return value if value != self._status_read else self.written  # a plain column notes no assignment

    @property
    def has_saved(self) -> bool:
        """Whether the action has saved or read anything of its task."""
        return len(self._layers) > 1

    @property
    def held(self) -> set[Status | None]:
        """What may stand in the row while the task is ours. Both, as a rollback can escape Django."""
        return {self._lease, self.written}

    def is_as_claimed(self, field: models.Field[Any, Any]) -> bool:
        """Say whether the instance still shows what it did after the claim."""
        now, claimed = self._instance.__dict__, self._layers[0][1]
        name = field.attname
        return name not in now or not _differs(claimed.get(name, _UNREAD), now[name])

    def changed(self) -> Fields:
        """Return the fields that the action changed, the status field left out.

        Raises:
            ValueError: the primary key was changed, so there is no row to write to.
        """
        instance = self._instance
        known, now = self._values(), instance.__dict__
        changed = _fetch_keys_of_related(instance)
        for name, field in _named_fields(type(instance)):
            value, before = now.get(name, _UNREAD), known.get(name, _UNREAD)
            if value is before and type(value) in _IMMUTABLE:  # as nearly all are, and this is quick
                continue
            if value is _UNREAD or field is self._status or not _differs(before, value):
                continue
            if field in getattr(instance._meta, "pk_fields", [instance._meta.pk]):  # several from Django 5.2
                raise ValueError(self._text_of_changed_key(instance))
            changed.append(field)
        return changed

    def _text_of_changed_key(self, instance: models.Model) -> str:
        return (
            f"The action changed the primary key of its task from {self._pk!r} to {instance.pk!r}. Create "
            f"another row instead, with a status of its own: {self._status.name}=Status.waiting()."
        )


def save_merged(instance: models.Model, changed: Fields, status: models.Field[Any, Any], using: str) -> None:
    """Save an instance in full, with the row's newest values under the changed ones.

    Called within the transaction in which the row's status was written, so the row is locked and can
    not have been deleted. A full `save()`, so that overrides, signals and ``auto_now`` work.
    """
    keep = {field.attname for field in changed} | {status.attname}
    keys = getattr(instance._meta, "pk_fields", [instance._meta.pk])
    fresh = [
        field.attname for field in _loaded_fields(instance) if field.attname not in keep and field not in keys
    ]
    if fresh:
        instance.refresh_from_db(using=using, fields=fresh)
    if router.db_for_write(type(instance), instance=instance) == using:
        instance.save()  # a save() of the user's own may take no argument
    else:
        instance.save(using=using)
    computed = [field.attname for field in changed if _is_expression(instance.__dict__.get(field.attname))]
    if computed:
        # An F("count") + 1 that stays on the instance would be applied again by the next save().
        instance.refresh_from_db(using=using, fields=computed)


def is_plainly_saved(model: type[models.Model]) -> bool:
    """True if nobody can tell a statement of ours from a `save()` that writes the same.

    That is, the model has no `save` of its own, no field that computes a value whenever it is
    saved (``auto_now``), and nobody listens to `pre_save` or `post_save`.
    """
    is_heard = _has_listeners(pre_save, model) or _has_listeners(post_save, model)
    if is_heard or model.save is not models.Model.save:
        return False
    return not _has_field_that_computes_on_save(model)


def _has_listeners(signal: Signal, model: type[models.Model]) -> bool:
    return bool(signal.receivers) and signal.has_listeners(model)


@functools.lru_cache(maxsize=1000)
def _has_field_that_computes_on_save(model: type[models.Model]) -> bool:
    return any(_computes_on_save(field) for field in model._meta.concrete_fields)


def _computes_on_save(field: models.Field[Any, Any]) -> bool:
    if isinstance(field, (models.DateField, models.TimeField)):
        return bool(field.auto_now)
    if isinstance(field, (StatusField, models.FileField)):
        return False
    return type(field).pre_save is not models.Field.pre_save


def _loaded_fields(instance: models.Model) -> Fields:
    values = instance.__dict__
    return [field for field in _stored_fields(type(instance)) if field.attname in values]


@functools.lru_cache(maxsize=1000)
def _stored_fields(model: type[models.Model]) -> Fields:
    return [field for field in model._meta.concrete_fields if not getattr(field, "generated", False)]


def _fetch_keys_of_related(instance: models.Model) -> Fields:
    """Take over the key of a related object that was saved after it had been assigned, as save() does.

    Returns:
        The fields whose object is not saved even now: no key has changed, but save() has to say so.
    """
    unsaved: Fields = []
    if not _related_of(instance):
        return unsaved
    for field in instance._meta.concrete_fields:
        if isinstance(field, models.ForeignKey) and field.is_cached(instance):
            related = field.get_cached_value(instance)
            if related is not None and instance.__dict__.get(field.attname) is None:
                setattr(instance, field.name, related)
                if related.pk is None:
                    unsaved.append(field)
    return unsaved


def _copy_of_all(instance: models.Model) -> dict[str, Any]:
    values = instance.__dict__
    return {
        name: value if type(value := values[name]) in _IMMUTABLE else _copied(value)
        for name, _ in _named_fields(type(instance))
        if name in values
    }


@functools.lru_cache(maxsize=1000)
def _named_fields(model: type[models.Model]) -> list[tuple[str, models.Field[Any, Any]]]:
    return [(field.attname, field) for field in _stored_fields(model)]


def _related_of(instance: models.Model) -> dict[str, Any]:
    """Return the related objects that it has loaded; Django makes a dict for them when it is asked."""
    related: dict[str, Any] = instance._state.__dict__.get("fields_cache", {})
    return related


def _copied(value: Any) -> Any:
    if type(value) in _IMMUTABLE:  # deepcopy() takes long to find that out
        return value
    if isinstance(value, FieldFile):
        return value.name  # its deep copy would copy the whole instance
    if _is_expression(value):
        return value
    try:
        return _copied_json(value)
    except (TypeError, RecursionError):  # something else, or it has itself in it
        pass
    try:
        return copy.deepcopy(value)
    except Exception:  # what can not be copied (an open file, a lock) is compared by identity
        return value


def _copied_json(value: Any) -> Any:
    """Copy what JSON has: deepcopy() takes ten times as long.

    Raises:
        TypeError: it is something else.
    """
    kind = type(value)
    if kind in _IMMUTABLE:
        return value
    if kind is dict:
        return {key: _copied_json(one) for key, one in value.items()}
    if kind is list:
        return [_copied_json(one) for one in value]
    raise TypeError


def _differs(before: Any, after: Any) -> bool:
    # The two kinds that JSON has come first, without a generator: most of what is compared is of these.
    if type(before) is dict and type(after) is dict:
        if before.keys() != after.keys():
            return True
        for key, value in after.items():
            if not (value is before[key] and type(value) in _IMMUTABLE) and _differs(before[key], value):
                return True
        return False
    if isinstance(after, FieldFile):
        return before != after.name or not after._committed  # type: ignore[attr-defined]
    if type(before) is not type(after) or _is_expression(after):
        return before is not after
    # Item by item, as to Python {"done": 0} and {"done": False} are equal, but not to JSON.
    if isinstance(after, dict):
        return before.keys() != after.keys() or any(_differs(before[key], after[key]) for key in after)
    if isinstance(after, (list, tuple)):
        return len(before) != len(after) or any(map(_differs, before, after))
    try:
        return before is not after and bool(before != after)  # the first for NaN, which equals nothing
    except Exception:  # arrays, for example, do not compare to one bool; writing too much is safe
        return True


def _is_expression(value: Any) -> bool:
    return hasattr(value, "resolve_expression")
