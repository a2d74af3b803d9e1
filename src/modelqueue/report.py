"""How queues are doing: the figures that ``manage.py modelqueue status`` shows.

Each figure is a range of the index of the status that is read up to a cap, so that a look costs the same
however many tasks have been finished. NULL and foreign numbers are in none of them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from django.db import models
from django.db.models import Count as CountOf
from django.db.models import Min, Q

from modelqueue.clock import now
from modelqueue.queues import Queue
from modelqueue.status import END_OF_LIVE, FIRST_LIVE, FIRST_TIME, State, Status, priority_to_datetime

__all__ = ["CAP", "Count", "Failure", "Figures", "Running", "figures_of", "in_a_line", "report"]

#: How many tasks are counted; where there are more, a figure says so.
CAP = 10_000
#: What "lately" means.
LATELY = dt.timedelta(minutes=5)
#: How many of the running tasks are listed, those longest without a sign of life first.
LISTED = 5


@dataclass(frozen=True)
class Count:
    """How many tasks there are, or that there are more than `number`."""

    number: int
    is_capped: bool = False

    @classmethod
    def of(cls, number: int, cap: int) -> Count:
        return cls(min(number, cap), number > cap)

    def __str__(self) -> str:
        return f"{self.number:,}{'+' if self.is_capped else ''}"


@dataclass(frozen=True)
class Running:
    """A task that is working."""

    pk: Any
    renewed_ago: float | None
    """Seconds since its lease was renewed last, or began with the claim; None where the row does not say.

    For how long it has been running no row says: a renewal takes the place of the claim.
    """
    attempts: int
    """How many attempts had been made before this one."""
    is_abandoned: bool
    """Whether its lease has run out, so that it will be taken back."""


@dataclass(frozen=True)
class Figures:
    """How one queue is doing."""

    queue: Queue[Any]
    counts: dict[State, Count]
    due: Count
    scheduled: Count
    """Waiting tasks whose time has not come."""
    longest_wait: float | None
    """Seconds for which the oldest due task has been due; None where none has been due since a time."""
    next_due: float | None
    """Seconds until the next scheduled task is due."""
    running: list[Running]
    finished_lately: Count
    canceled_lately: Count
    rate: float
    """Tasks that were finished or canceled, a second."""

    @property
    def eta(self) -> float | None:
        """Seconds until what is due now has ended, at the rate of late; None where nothing has ended."""
        if not self.due.number:
            return 0.0
        return self.due.number / self.rate if self.rate else None

    def as_dict(self) -> dict[str, Any]:
        """Return what `status --json` prints of a queue, see the page of commands in the reference."""
        figures = {
            **{state.name: count for state, count in self.counts.items()},
            "due": self.due,
            "scheduled": self.scheduled,
            "finished_lately": self.finished_lately,
            "canceled_lately": self.canceled_lately,
        }
        return {
            "queue": self.queue.name,
            "model": self.queue.model._meta.label,
            "field": self.queue.field.name,
            "database": self.queue.using,
            "counts": {state.name: count.number for state, count in self.counts.items()},
            "due": self.due.number,
            "scheduled": self.scheduled.number,
            "longest_wait": self.longest_wait,
            "next_due": self.next_due,
            "running": [
                {
                    "pk": one.pk,
                    "renewed_ago": one.renewed_ago,
                    "attempts": one.attempts,
                    "abandoned": one.is_abandoned,
                }
                for one in self.running
            ],
            "lately": {
                "seconds": LATELY.total_seconds(),
                "finished": self.finished_lately.number,
                "canceled": self.canceled_lately.number,
                "per_second": self.rate,
            },
            "eta": self.eta,
            "capped": [name for name, count in figures.items() if count.is_capped],
        }


@dataclass(frozen=True)
class Failure:
    """A queue that can not be looked at: its table is missing perhaps, or its database is away."""

    queue: Queue[Any]
    error: Exception

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {in_a_line(self.error)}"

    def as_dict(self) -> dict[str, Any]:
        """Return what `status --json` prints of it."""
        return {
            "queue": self.queue.name,
            "model": self.queue.model._meta.label,
            "field": self.queue.field.name,
            "error": str(self),
        }


def report(
    queues: Iterable[Queue[Any]],
    cap: int = CAP,
    clock_of: Callable[[str], AbstractContextManager[None]] = lambda using: nullcontext(),
) -> list[Figures | Failure]:
    """Return the figures of queues, first those whose oldest due task has been waiting longest.

    Those that can not be looked at come last: they hide nothing of the others.

    Args:
        cap: how many tasks are counted.
        clock_of: returns a block in which the clock of a database counts, by its alias.
    """
    found, failed = list[Figures](), list[Failure]()
    for queue in queues:
        try:
            with clock_of(queue.using):
                found.append(figures_of(queue, cap))
        except Exception as error:  # also of the callable that makes its queryset
            failed.append(Failure(queue, error))
    found.sort(key=lambda one: (-(one.longest_wait or 0.0), -one.due.number, one.queue.name))
    return [*found, *failed]


def in_a_line(error: Exception) -> str:
    """Return the text of an error; drivers give theirs line breaks."""
    return " ".join(str(error).split())


def figures_of(queue: Queue[Any], cap: int = CAP) -> Figures:
    """Return the figures of one queue; nothing is counted beyond `cap`."""
    rows = _Rows(queue, now(), cap)
    due, scheduled = rows.due(), rows.scheduled()
    counts = {state: rows.count(rows.of(state)) for state in Status.states if state != State.waiting}
    waiting = due.number + scheduled.number
    is_capped = due.is_capped or scheduled.is_capped or waiting > cap
    counts[State.waiting] = Count(min(waiting, cap), is_capped)
    finished, finished_rate = rows.lately(State.finished)
    canceled, canceled_rate = rows.lately(State.canceled)
    return Figures(
        queue=queue,
        counts={state: counts[state] for state in Status.states},
        due=due,
        scheduled=scheduled,
        longest_wait=rows.longest_wait() if due.number else None,
        next_due=rows.next_due() if scheduled.number else None,
        running=rows.running() if counts[State.working].number else [],
        finished_lately=finished,
        canceled_lately=canceled,
        rate=finished_rate + canceled_rate,
    )


class _Rows:
    """The tasks of a queue at a moment, by ranges of their status."""

    def __init__(self, queue: Queue[Any], moment: dt.datetime, cap: int) -> None:
        self._queue = queue
        self._moment = moment
        self._cap = cap
        self._field = queue.field.name
        self._source = queue.source()
        self._last_due = Status.waiting(moment, Status.max_attempts)

    def of(self, state: State) -> models.QuerySet[Any]:
        return self._between(Status.minimum(state), Status.maximum(state))

    def due(self) -> Count:
        return self.count(self._between(Status.minimum(State.waiting), self._last_due))

    def scheduled(self) -> Count:
        return self.count(self._scheduled())

    def longest_wait(self) -> float | None:
        """How long the oldest task has been due; of those with a number for a priority no row says it."""
        return self._age(self._first(self._between(Status.waiting(FIRST_TIME), self._last_due)))

    def next_due(self) -> float | None:
        age = self._age(self._first(self._scheduled()))
        return None if age is None else -age

    def running(self) -> list[Running]:
        cutoff = self._queue.recovery().cutoff(self._moment)
        last_expired = 0 if cutoff is None else Status.working(cutoff, Status.max_attempts)
        return [
            Running(pk, self._age(number), Status(number).attempts, number <= last_expired)
            for pk, number in self._sorted(self.of(State.working)).values_list("pk", self._field)[:LISTED]
        ]

    def lately(self, state: State) -> tuple[Count, float]:
        """Return how many tasks came to a state lately, and how many a second.

        Where they are more than the cap, the rate is that of the newest.
        """
        first = Status.combine(state, self._moment - LATELY, 0)
        last = Status.combine(state, self._moment, Status.max_attempts)
        newest = self._between(first, last).order_by(f"-{self._field}").values(self._field)[: self._cap + 1]
        found = newest.aggregate(number=CountOf(self._field), oldest=Min(self._field))
        count = Count.of(found["number"], self._cap)
        seconds = LATELY.total_seconds()
        if count.is_capped:
            # A millisecond: the finest that a status holds.
            seconds = max(self._age(found["oldest"]) or 0.0, 0.001)
        return count, found["number"] / seconds

    def count(self, rows: models.QuerySet[Any]) -> Count:
        # Sorted, so that the planner does not read the table in the hope of meeting the state soon.
        number = self._sorted(rows).values(self._field)[: self._cap + 1].count()
        return Count.of(number, self._cap)

    def _scheduled(self) -> models.QuerySet[Any]:
        return self._between(self._last_due + 1, Status.maximum(State.waiting))

    def _between(self, first: int, last: int) -> models.QuerySet[Any]:
        name = self._field
        bounds = Q(**{f"{name}__gte": int(first), f"{name}__lte": int(last)})
        of_live = self._source.live_condition() if first >= FIRST_LIVE and last < END_OF_LIVE else []
        rows: models.QuerySet[Any] = self._source.queryset.filter(bounds, *of_live)
        return rows

    def _sorted(self, rows: models.QuerySet[Any]) -> models.QuerySet[Any]:
        return rows.order_by(self._field)

    def _first(self, rows: models.QuerySet[Any]) -> int | None:
        first: int | None = self._sorted(rows).values_list(self._field, flat=True).first()
        return first

    def _age(self, number: int | None) -> float | None:
        moment = None if number is None else priority_to_datetime(Status(number).priority)
        return None if moment is None else (self._moment - moment).total_seconds()
