"""Assertions on the states of tasks, with messages that say what stands there instead."""

from __future__ import annotations

from typing import Any

from django.db import models

from modelqueue.fields import ErrorField, StatusField
from modelqueue.queues import Queue
from modelqueue.source import Tasks, status_field
from modelqueue.status import State, StateLike, Status

__all__ = ["assert_state", "assert_tally"]


def assert_state(
    task: models.Model, state: StateLike | None, *, attempts: int | None = None, field: str | None = None
) -> None:
    """Assert in which state the row of a task is. The instance is left as it is.

    Args:
        task: any instance of the row, however old.
        state: a `State`, its name or its number; None if the row is to be in no queue (NULL).
        attempts: how often it is to have been tried; None: any number.
        field: the name of the `StatusField`; needed only if the model has several.

    Raises:
        AssertionError: it is in another, was tried another number of times, or has no row any more. The
            message ends with the failure that its `ErrorField` tells of.
        TypeError, ValueError: no such state or field.
    """
    __tracebackhide__ = True
    name = _field_name(type(task), field)
    wanted = None if state is None else State.of(state)
    row = type(task)._base_manager.using(task._state.db).filter(pk=task.pk).first()
    label = f"{task._meta.label} {task.pk}"
    if row is None:
        raise AssertionError(f"{label} has no row, so its {name} is not {_words(wanted, attempts)}.")
    value = getattr(row, name)
    status = None if value is None else Status(value)
    found = None if status is None else status.state
    is_as_wanted = found == wanted and (
        attempts is None or (status is not None and status.attempts == attempts)
    )
    if not is_as_wanted:
        raise AssertionError(
            f"The {name} of {label} is {_found(status)}, not {_words(wanted, attempts)}.{_failures(row)}"
        )


def assert_tally(
    tasks: Queue[Any] | Tasks[Any],
    field: str | None = None,
    *,
    created: int = 0,
    waiting: int = 0,
    working: int = 0,
    finished: int = 0,
    canceled: int = 0,
) -> None:
    """Assert how many tasks there are in each state; in a state that is not named there are to be none.

    Args:
        tasks: a declared queue, or any queryset or manager.
        field: of a queryset or manager, the name of the `StatusField`; needed only if there are several.

    Raises:
        AssertionError: the numbers are others. The message has both.
        TypeError, ValueError: no such tasks or field.
    """
    __tracebackhide__ = True
    if isinstance(tasks, Queue):
        counts, where = tasks.tally(), tasks.name
    else:
        if not isinstance(tasks, (models.QuerySet, models.Manager)):
            raise TypeError(f"assert_tally() counts a Queue, a QuerySet or a Manager, not {tasks!r}.")
        counts = Status.tally(tasks, _field_name(tasks.model, field))
        where = tasks.model._meta.label
    wanted = {
        "created": created,
        "waiting": waiting,
        "working": working,
        "finished": finished,
        "canceled": canceled,
    }
    if counts != wanted:
        raise AssertionError(f"The tasks of {where} are {_counted(counts)}, not {_counted(wanted)}.")


def _field_name(model: type[models.Model], given: str | None) -> str:
    if given is not None:
        return status_field(model, given).name
    names = [one.name for one in model._meta.concrete_fields if isinstance(one, StatusField)]
    if len(names) != 1:
        has = f"the fields {', '.join(names)}" if names else "none"
        raise ValueError(
            f"Which StatusField of {model.__name__} is meant? It has {has}. Give field=... with its name."
        )
    return names[0]


def _words(state: State | None, attempts: int | None) -> str:
    words = "NULL" if state is None else state.name
    return words if attempts is None else f"{words} with attempts={attempts}"


def _found(status: Status | None) -> str:
    if status is None:
        return "NULL"
    _, when, attempts = status.parse()
    return f"{status.state} with attempts={attempts} ({when})"


def _failures(row: models.Model) -> str:
    texts = [row.__dict__[one.attname] for one in row._meta.concrete_fields if isinstance(one, ErrorField)]
    return "".join(f" It failed with: {text.splitlines()[0]}" for text in texts if text)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in counts.items() if number) or "none"
