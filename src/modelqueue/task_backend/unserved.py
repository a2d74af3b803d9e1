"""Tasks that nobody runs, as no queue of the setting TASKS has them any more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

from django.db.models import Q

from modelqueue.report import CAP, Count
from modelqueue.status import END_OF_LIVE, FIRST_LIVE
from modelqueue.task_backend.models import QueuedTask

__all__ = ["OutOfTime", "Place", "Unserved", "unserved"]

#: A backend and one of its queues; None: all that it may have.
Place = tuple[str, "str | None"]


class OutOfTime(Exception):  # noqa: N818
    """There were more queues than could be looked at."""


@dataclass(frozen=True)
class Unserved:
    """Tasks to run, waiting or working, that are in no queue which is served."""

    using: str
    backend: str
    queue: str
    number: Count

    @property
    def rows(self) -> str:
        """The expression of them."""
        return (
            f"QueuedTask.objects.using({self.using!r}).filter(backend_name={self.backend!r}, "
            f"queue_name={self.queue!r}, status__state__in=['waiting', 'working'])"
        )

    def __str__(self) -> str:
        is_one = str(self.number) == "1"
        return (
            f"{self.number} task{' is' if is_one else 's are'} in no queue that the setting TASKS has in the "
            f"database {self.using!r}: of the backend {self.backend!r}, in its queue {self.queue!r}"
        )


def unserved(using: str, served: set[Place], seconds: float) -> Iterator[Unserved]:
    """Yield the queues with tasks to run that are none of those served, by name.

    Reads one row of each queue, and those that it counts, however large the table is. Where there is a queue
    for each user, say, that takes its time all the same.

    Raises:
        OutOfTime: it would take more seconds.
    """
    rows, deadline = QueuedTask.objects.using(using), time.monotonic() + seconds
    place = _place_after(rows, None)
    while place is not None:
        backend, queue, pk = place
        if (backend, None) in served:
            place = _place_after(rows, backend)
            continue
        if time.monotonic() > deadline:
            raise OutOfTime(f"{seconds:g} s were over before the queue {queue!r} of TASKS[{backend!r}]")
        # The database says which names are one: MySQL and MariaDB do not tell a from A, nor from á.
        is_served = (backend, queue) in served or rows.filter(_of(served), pk=pk).exists()
        if not is_served and (number := _number(rows, backend, queue)).number:
            yield Unserved(using, backend, queue, number)
        place = _place_after(rows, backend, queue)


def _place_after(rows: Any, backend: str | None, queue: str | None = None) -> tuple[str, str, int] | None:
    """Return the next backend and queue that has rows, and the key of one: a step in the index."""
    names = rows.order_by("backend_name", "queue_name").values_list("backend_name", "queue_name", "pk")
    found: tuple[str, str, int] | None = None
    if queue is not None:
        found = names.filter(backend_name=backend, queue_name__gt=queue).first()
    if found is None:  # a step of its own, as a condition with OR would be a scan
        found = (names if backend is None else names.filter(backend_name__gt=backend)).first()
    return found


def _of(served: set[Place]) -> Q:
    conditions = [
        Q(backend_name=backend) if queue is None else Q(backend_name=backend, queue_name=queue)
        for backend, queue in served
    ]
    return reduce(or_, conditions, Q(pk__in=[]))


def _number(rows: Any, backend: str, queue: str) -> Count:
    live = rows.filter(backend_name=backend, queue_name=queue, status__gte=FIRST_LIVE, status__lt=END_OF_LIVE)
    return Count.of(live.order_by("status").values("status")[: CAP + 1].count(), CAP)
