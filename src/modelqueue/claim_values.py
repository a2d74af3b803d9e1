"""What a claim sets besides the status: columns of the same table, in the same statement.

A queue declares them (`modelqueue.queue`). Here they are checked, so that what is wrong raises before
anything is written. The engines set them; who gives a task back uncharged puts back what stood there before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from django.core.exceptions import FieldDoesNotExist, ValidationError
from django.db import models

from modelqueue.fields import StatusField

__all__ = ["ClaimValues", "Given", "Values", "show"]

#: As a queue declares them: by the names of fields, or a callable that returns such a thing.
Given = Mapping[str, object] | Callable[[], Mapping[str, object]]
#: As a claim sets them.
Values = dict["models.Field[Any, Any]", Any]

_EXAMPLE = "Give for example {'started': now, 'worker': 'alpha'}, or a callable that returns such a dict."


class ClaimValues:
    """The columns that the claims of one queue set, see `modelqueue.queue`.

    Raises:
        TypeError, ValueError: what can not be set by a claim, and what to do about it.
    """

    def __init__(self, given: Given, model: type[models.Model], status: models.Field[Any, Any]) -> None:
        self._model = model
        self._status = status
        self._ask: Callable[[], Mapping[str, object]] | None = None
        self._fixed: Values = {}
        if callable(given):
            self._ask = given
        else:
            self._fixed = self._checked(given)

    def ask(self) -> Values:
        """Return the values of one claim, each as its field would load it.

        Raises:
            TypeError, ValueError: the callable returned what a claim can not set.
            Exception: what the callable raised.
        """
        return self._fixed if self._ask is None else self._checked(self._ask())

    def _checked(self, given: object) -> Values:
        if not isinstance(given, Mapping):
            origin = "" if self._ask is None else f" (returned by {self._ask!r})"
            raise TypeError(
                f"claim_values are a dict of values by field name, not {given!r}{origin}. {_EXAMPLE}"
            )
        values: Values = {}
        for name, value in given.items():
            field = self._field(name)
            if field in values:
                raise ValueError(f"claim_values names {field} twice, once as {name!r}. Name it once.")
            values[field] = _checked_value(field, value)
        # In one order, whatever that of the dict, as the text of a statement is kept.
        return dict(sorted(values.items(), key=lambda item: str(item[0].column)))

    def _field(self, name: object) -> models.Field[Any, Any]:
        if not isinstance(name, str):
            raise TypeError(f"claim_values: a field is given by its name, a str, not by {name!r}.")
        model = self._model
        try:
            field: Any = model._meta.get_field(name)
        except FieldDoesNotExist:
            known = sorted(one.name for one in model._meta.concrete_fields if self._why_not(one) is None)
            raise ValueError(
                f"{model.__name__} has no field {name!r}, which claim_values names. "
                f"A claim can set: {', '.join(known) or 'none of its fields'}."
            ) from None
        if (why_not := self._why_not(field)) is not None:
            raise ValueError(f"claim_values can not set {model.__name__}.{name}, {why_not}.")
        made: models.Field[Any, Any] = field
        return made

    def _why_not(self, field: Any) -> str | None:
        """Say why a claim can not set a field; None: it can."""
        if not field.concrete:
            return "which has no column"
        if field.model._meta.concrete_model is not self._status.model._meta.concrete_model:
            return f"which is in another table than {self._status}: a claim is an UPDATE of that one"
        if field.primary_key or field in getattr(field.model._meta, "pk_fields", ()):  # from Django 5.2
            return "which is the primary key, or a part of it"
        if field is self._status or isinstance(field, StatusField):
            return "which holds the status of a task"
        if getattr(field, "generated", False):
            return "which the database computes"
        return None


def _checked_value(field: models.Field[Any, Any], value: Any) -> Any:
    """Return a value as a field would load it, so that a task shows what its row holds."""
    if hasattr(value, "resolve_expression"):
        raise TypeError(
            f"claim_values sets {field} to {value!r}, an expression, which the task could not show. "
            "Give a value of Python."
        )
    if value is None and not field.null:
        raise ValueError(f"claim_values sets {field} to None, which may not be NULL. Give a value.")
    try:
        made = field.to_python(value)
        field.run_validators(made)
    except ValidationError as error:
        raise ValueError(
            f"claim_values sets {field} to {value!r}, which is none of its values: {' '.join(error.messages)}"
        ) from error
    return made


def show(task: models.Model, values: Values) -> None:
    """Let an instance show values that its row holds, each a copy of its own where it can be copied."""
    for field, value in values.items():
        shown = value
        with suppress(Exception):
            shown = copy.deepcopy(value)
        setattr(task, field.attname, shown)
