"""Some tasks of a queue, chosen by key, state or age, and what an operator does with them.

What ``manage.py modelqueue retry``, ``cancel`` and ``enqueue`` do. Tasks that somebody has locked are left
alone, and the result says so.
"""

from __future__ import annotations

import datetime as dt
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import Q

from modelqueue import verbs
from modelqueue.clock import now
from modelqueue.queues import Queue
from modelqueue.status import FIRST_TIME, State, Status, datetime_to_int, shifted

__all__ = ["VERBS", "Change", "Selection", "Verb", "change", "parse_key"]


@dataclass(frozen=True)
class Verb:
    """What is done with tasks."""

    name: str
    done: str
    """What a task is then, as in "5 tasks are canceled"."""
    states: tuple[State, ...]
    """The states that it changes."""
    condition: Callable[[str], Q]
    """The condition that a task can be changed, by the name of the status field."""
    apply: Callable[[models.QuerySet[Any], str], int]
    """Does it with the tasks of a queryset; returns how many it has changed."""


VERBS = {
    verb.name: verb
    for verb in (
        Verb("retry", "waiting", (State.canceled,), verbs.retryable, verbs.retry),
        Verb(
            "cancel",
            "canceled",
            (State.created, State.waiting, State.working),
            verbs.cancelable,
            verbs.cancel,
        ),
        Verb(
            "enqueue",
            "waiting",
            (State.created, State.waiting, State.finished, State.canceled),
            lambda name: verbs.enqueueable(name, now()),
            verbs.enqueue_unlocked,
        ),
    )
}


@dataclass(frozen=True)
class Selection:
    """Which tasks of a queue. What is not said does not matter."""

    keys: list[Any] | None = None
    """Primary keys, as `parse_key` makes them."""
    states: list[State] | None = None
    older_than: dt.timedelta | None = None
    """The time in the status is at least so long ago."""
    younger_than: dt.timedelta | None = None
    """It is less than so long ago, or to come."""

    @property
    def is_everything(self) -> bool:
        return (self.keys, self.states, self.older_than, self.younger_than) == (None,) * 4

    def condition(self, name: str) -> Q:
        """Return the condition on tasks whose status field has this name."""
        condition = Q() if self.keys is None else Q(pk__in=self.keys)
        if (self.states, self.older_than, self.younger_than) != (None,) * 3:
            ranges = [self._range(name, state) for state in self.states or Status.states]
            condition &= functools.reduce(operator.or_, ranges)
        return condition

    def _range(self, name: str, state: State) -> Q:
        first, last = Status.minimum(state), Status.maximum(state)
        if self.older_than is not None:
            # A number that is no time has no age.
            first = Status.combine(state, FIRST_TIME, 0)
            last = Status.combine(state, shifted(now(), -self.older_than), Status.max_attempts)
        if self.younger_than is not None:
            after = max(datetime_to_int(shifted(now(), -self.younger_than)), FIRST_TIME)
            first = Status.combine(state, after, Status.max_attempts) + 1
        return Q(**{f"{name}__gte": int(first), f"{name}__lte": int(last)})


@dataclass
class Change:
    """What came of it."""

    matching: int
    """How many tasks were selected and in a state that the verb changes."""
    changed: int = 0
    locked: int = 0
    """How many of them somebody else has locked; they are as they were."""
    missing: list[Any] = field(default_factory=list)
    """The keys that no task of the queue has."""
    missing_ids: list[str] = field(default_factory=list)
    """The same of those that were named by the ids of their results."""
    left: dict[Any, str] = field(default_factory=dict)
    """The keys of tasks that the verb, or the selection, leaves alone; each with its state, or "null"."""
    locked_keys: list[Any] = field(default_factory=list)
    """Of the named tasks those that are locked."""

    @property
    def is_complete(self) -> bool:
        """Whether everything that was named is there and was changed, or could be."""
        return not (self.missing or self.missing_ids or self.left or self.locked)


def change(queue: Queue[Any], selection: Selection, verb: Verb, dry_run: bool = False) -> Change:
    """Do something with the selected tasks of a queue; in a dry run only find out with how many."""
    name = queue.field.name
    all_rows = queue.source().queryset
    rows = all_rows.filter(selection.condition(name))

    def able() -> models.QuerySet[Any]:
        return rows.filter(verb.condition(name))  # which depends on the time

    if selection.keys is None:
        result = Change(able().count())
        if not dry_run:
            result.changed = verb.apply(rows, name)
            # Tasks come and go meanwhile: those that can still be changed, and no more than were not.
            missed = max(result.matching - result.changed, 0)
            result.locked = min(missed, able().count()) if missed else 0
        return result

    there = dict(all_rows.filter(pk__in=selection.keys).values_list("pk", name))
    changeable = _keys(able())
    result = Change(len(changeable))
    result.missing = [key for key in selection.keys if key not in there]
    result.left = {key: _state(there[key]) for key in there if key not in changeable}
    if not dry_run:
        result.changed = verb.apply(rows, name)
        if result.changed < result.matching:
            result.locked_keys = [key for key in _keys(able()) if key in changeable]
            result.locked = len(result.locked_keys)
    return result


def parse_key(model: type[models.Model], text: str) -> Any:
    """Return the primary key that a text means.

    Raises:
        ValueError: it is none of this model.
    """
    pk: Any = model._meta.pk
    try:
        key = pk.to_python(text)
        if not isinstance(key, (list, tuple)):
            pk.run_validators(key)
        if isinstance(key, int) and not -(2**63) <= key < 2**63:  # for which a foreign key has no validator
            raise ValueError(key)
    except (ValidationError, ValueError, TypeError) as error:
        raise ValueError(
            f"{text!r} is no primary key of {model._meta.label}, which is a {type(pk).__name__}."
        ) from error
    return tuple(key) if isinstance(key, list) else key


def _keys(rows: models.QuerySet[Any]) -> set[Any]:
    return {key for (key,) in rows.values_list("pk")}


def _state(number: int | None) -> str:
    return "null" if number is None else Status(number).state.name
