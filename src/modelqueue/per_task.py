"""What may differ from one task of a queue to the next: its policy, and whether it is one transaction.

How often a task is retried stands in a column of its row, as the database is asked which tasks are on their
last attempt, and run alone. All else is asked of a hook of the queue when the task is claimed or recovered.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from django.core.exceptions import FieldDoesNotExist
from django.db import models

from modelqueue.fields import StatusField
from modelqueue.outcomes import MOST_RETRIES, Policy

__all__ = ["PerTask", "TaskOptions", "Terms", "checked_classes", "retry_field"]

#: What a queue's hook returns for one task: the options that differ, by their names.
TaskOptions = Mapping[str, object]

_NAMES = ("timeout", "delay", "atomic", "cancel_on")
#: Sets of options of which the terms are kept.
_MOST_KEPT = 1000


class Terms(NamedTuple):
    """On which an attempt is made."""

    policy: Policy
    atomic: bool


class PerTask:
    """The terms of the tasks of one queue.

    Args:
        terms: those of a task of which nothing else is said.
        retry: the field that holds how often a task is retried, NULL: without limit; None: all the same.
        options: the hook that is asked of a task; None: nothing else differs.
    """

    def __init__(
        self,
        terms: Terms,
        retry: models.Field[Any, Any] | None,
        options: Callable[[Any], TaskOptions] | None,
        is_async: bool,
    ) -> None:
        self._terms = terms
        self._retry = retry
        self._options = options
        self._is_async = is_async
        #: By what differs: to check it takes longer than all else of a short task.
        self._kept: dict[Hashable, Terms] = {}

    @property
    def differs(self) -> bool:
        """Whether tasks have to be asked."""
        return self._retry is not None or self._options is not None

    def of(self, task: models.Model) -> Terms:
        """Return the terms of a task.

        Raises:
            TypeError, ValueError: its row, or the hook, says what can not be.
            Exception: what the hook raised.
        """
        retry = self._terms.policy.retry if self._retry is None else getattr(task, self._retry.attname)
        options = {} if self._options is None else self._asked(self._options, task)
        if not isinstance(options, Mapping):
            raise TypeError(
                f"task_options={self._options!r} returned {options!r}. It returns a dict of what differs for "
                f"a task, of {', '.join(_NAMES)}; for example {{}}."
            )
        try:
            return self._remembered(retry, options)
        except TypeError:  # a value without a hash, or a wrong one, which tells of itself
            return self._made(retry, options)

    def _asked(self, hook: Callable[[Any], TaskOptions], task: models.Model) -> TaskOptions:
        try:
            return hook(task)
        except SystemExit as error:  # of a module that it imports: it is to end neither claims nor recovery
            raise RuntimeError(f"task_options={hook!r} ended with SystemExit({error.code!r}).") from error

    def without_options(self, task: models.Model) -> Terms:
        """Return the terms of a task whose options can not be told: its own retry, where that is right."""
        if self._retry is None:
            return self._terms
        try:
            return self._remembered(getattr(task, self._retry.attname), {})
        except (TypeError, ValueError):
            return self._terms

    def _remembered(self, retry: int | None, options: TaskOptions) -> Terms:
        key = (retry, *sorted(options.items()))
        if (known := self._kept.get(key)) is None:
            if len(self._kept) > _MOST_KEPT:
                self._kept.clear()
            known = self._kept[key] = self._made(retry, options)
        return known

    def _made(self, retry: int | None, options: TaskOptions) -> Terms:
        if unknown := [name for name in options if name not in _NAMES]:
            raise ValueError(
                f"task_options={self._options!r} returned {unknown[0]!r}, which is no option of a task. "
                f"It can return {', '.join(_NAMES)}."
            )
        known: dict[str, Any] = dict(options)
        before = self._terms.policy
        checked = Policy.of(retry, known.get("timeout", before.timeout), known.get("delay", before.delay))
        classes = checked_classes(known["cancel_on"]) if "cancel_on" in known else before.cancel_on
        atomic = checked_bool("atomic", known.get("atomic", self._terms.atomic))
        if atomic and self._is_async:
            raise TypeError("atomic=True: a transaction belongs to a thread, and this action is async.")
        policy = replace(before, retry=retry, timeout=checked.timeout, delay=checked.delay, cancel_on=classes)
        return Terms(policy, atomic)


def retry_field(
    model: type[models.Model], name: str, status: models.Field[Any, Any]
) -> models.Field[Any, Any]:
    """Return the field of a model that holds how often a task is retried.

    Raises:
        ValueError: the model has no such field, or not in the table of the status.
        TypeError: it is no field of small numbers.
    """
    try:
        field: Any = model._meta.get_field(name)
    except FieldDoesNotExist:
        raise ValueError(
            f"{model.__name__} has no field {name!r}, which retry names. Give a number, or the name of an "
            "IntegerField that holds each task's own."
        ) from None
    if not isinstance(field, models.IntegerField) or isinstance(field, (StatusField, models.AutoField)):
        raise TypeError(
            f"retry={name!r} names {field}, a {type(field).__name__}. It is an IntegerField that holds how "
            f"often each task is retried, 0 to {MOST_RETRIES} (NULL: without limit)."
        )
    if field.model._meta.concrete_model is not status.model._meta.concrete_model:
        raise ValueError(f"retry={name!r} names {field}, which is in another table than {status}.")
    return field


def checked_classes(given: object) -> tuple[type[BaseException], ...]:
    """Return exception classes, of which one may be given alone.

    Raises:
        TypeError: it is something else.
    """
    classes = given if isinstance(given, tuple) else (given,)
    for one in classes:
        if not (isinstance(one, type) and issubclass(one, BaseException)):
            raise TypeError(
                f"cancel_on is an exception class or a tuple of them, such as (ValueError,); {one!r} is none."
            )
    return classes


def checked_bool(name: str, value: object) -> bool:
    """Return a truth value.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {value!r}.")
    return value
