"""What can be done with the rows of a queue, without running anything: claim, renew, recover, enqueue.

(`modelqueue.Status.tally` counts them.)
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from typing import Any, TypeVar

from django.db import models, router
from django.db.models import Q

from modelqueue import outcomes, signals
from modelqueue.clock import now
from modelqueue.engines import Claim, Renewal, Verdict, engine_for
from modelqueue.fields import set_loaded
from modelqueue.outcomes import Policy
from modelqueue.source import Source, on_write_database, owner_rows, status_field
from modelqueue.status import State, Status

__all__ = ["claim", "enqueue", "recover", "renew"]

M = TypeVar("M", bound=models.Model)

logger = logging.getLogger("modelqueue")


def claim(source: Source[M], limit: int = 1) -> list[Claim[M]]:
    """Take up to `limit` due tasks for this worker, see `Engine.claim`."""
    return engine_for(source.using).claim(source, now, limit)


def renew(source: Source[Any], leases: dict[Any, set[Status]]) -> Renewal:
    """Tell the database that these tasks are still being worked on, see `Engine.renew`."""
    return engine_for(source.using).renew(source, leases, now)


def recover(source: Source[Any], policy: Policy, seconds: float = 1.0) -> int:
    """Take back the tasks whose workers did not report within the timeout.

    Args:
        policy: its timeout says how long a lease holds; retry and delay what happens then.
        seconds: after how long to stop, as a caller who wants to run a task waits meanwhile. What
            is left then is recovered by the next call.

    Returns:
        How many tasks were recovered.
    """
    moment = now()
    cutoff = policy.cutoff(moment)
    if cutoff is None:
        return 0

    def judge(lease: Status) -> Verdict:
        status, note, wrong_delay = outcomes.recovered(lease, policy, moment)
        if wrong_delay is not None:
            logger.error(
                "The delay of a recovered task can not be computed, it is zero.", exc_info=wrong_delay
            )
        return Verdict(status, note)

    count = 0
    deadline = time.monotonic() + seconds
    for page in engine_for(source.using).recover(source, cutoff, judge):
        count += len(page)
        for row, status in page:
            signals.send(
                signals.task_recovered,
                source.model,
                field=source.field.name,
                using=source.using,
                pk=row.pk,
                lease=row.status,
                status=status,
            )
        if time.monotonic() > deadline:
            break
    return count


def enqueue(
    queryset_or_instance: models.QuerySet[Any] | models.Manager[Any] | models.Model,
    field: str,
    at: dt.datetime | None = None,
    priority: int | None = None,
) -> int:
    """Make tasks waiting, with no attempts made yet.

    A created, finished or canceled task, and one that was not in the queue (NULL), becomes waiting.
    A working one is left alone: its worker decides. One that is waiting already is moved to the new
    time or priority; without either it is left alone if it is due, so that enqueueing a task twice
    does not send it to the end of the queue. One UPDATE, in your transaction if there is one; nothing
    else of the row is touched.

    Args:
        queryset_or_instance: the tasks, or one saved instance, whose status is then set, too.
        field: the name of the status field.
        at: not before this time; naive times are UTC.
        priority: instead of `at`, an int from 0 to 10**17 - 1; lower runs first. Below 10**16 or so
            it is due at once and ahead of all times.

    Returns:
        How many tasks this made waiting or moved.

    Raises:
        TypeError, ValueError: both `at` and `priority`, one of a wrong kind, an unsaved instance, or
            no status field of that name.
    """
    if at is not None and priority is not None:
        raise ValueError(
            f"enqueue() takes at={at!r} or priority={priority!r}, not both. A time is a priority."
        )
    if at is not None and not isinstance(at, dt.datetime):
        raise TypeError(f"enqueue(): at is a datetime.datetime, not {at!r}. For a number use priority.")
    if isinstance(priority, dt.datetime):
        raise TypeError(f"enqueue(): priority is an int, not {priority!r}. For a time use at.")
    moment = now()
    status = Status.waiting(at if at is not None else priority if priority is not None else moment)
    rows = _rows_to_enqueue(queryset_or_instance)
    column = status_field(rows.model, field)

    movable = Q(**{f"{column.name}__isnull": True})
    for state in (State.created, State.finished, State.canceled):
        movable |= Q(**Status.filter(column.name, state))
    if at is None and priority is None:
        movable |= Q(
            **{
                f"{column.name}__gt": Status.waiting(moment, Status.max_attempts),
                f"{column.name}__lte": Status.maximum(State.waiting),
            }
        )
    else:
        movable |= Q(**Status.filter(column.name, State.waiting))

    engine = engine_for(rows.db)

    def move() -> int:
        with engine.transaction():
            engine.take_write_lock(column)
            # The condition is asked by the UPDATE itself: a task that is claimed meanwhile is left alone.
            parts = owner_rows(rows, column)
            return sum(part.filter(movable).update(**{column.name: status}) for part in parts)

    count = engine.patiently(move)
    if count and isinstance(queryset_or_instance, models.Model):
        set_loaded(queryset_or_instance, column, status)
    return count


def _rows_to_enqueue(
    given: models.QuerySet[Any] | models.Manager[Any] | models.Model,
) -> models.QuerySet[Any]:
    if isinstance(given, models.Model):
        if given._state.adding or given.pk is None:
            raise ValueError(
                f"enqueue(): {given!r} is not saved, so there is no row to enqueue. Save it first."
            )
        using = router.db_for_write(type(given), instance=given)
        rows: models.QuerySet[Any] = models.QuerySet(type(given), using=using)
        rows = rows.filter(pk=given.pk)
        return rows
    if not isinstance(given, (models.QuerySet, models.Manager)):
        raise TypeError(f"enqueue() takes a QuerySet, a Manager or an instance, not {given!r}.")
    return on_write_database(given)
