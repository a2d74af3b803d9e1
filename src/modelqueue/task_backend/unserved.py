"""Tasks that nobody runs, as the setting TASKS has their backend or their queue no more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.db import connections

from modelqueue.report import CAP, Count
from modelqueue.status import END_OF_LIVE, FIRST_LIVE
from modelqueue.task_backend.models import QueuedTask

__all__ = ["Place", "Unserved", "unserved"]

#: A backend and one of its queues; None: all that it may have.
Place = tuple[str, "str | None"]


@dataclass(frozen=True)
class Unserved:
    """Tasks that wait, or whose worker is dead, in a queue that no worker serves."""

    backend: str
    queue: str
    number: Count

    def __str__(self) -> str:
        count = f"{self.number} task{'' if self.number.number == 1 else 's'}"
        return f"{count} of TASKS[{self.backend!r}] in the queue {self.queue!r}"

    @property
    def rows(self) -> str:
        """The expression of its rows, finished ones included."""
        return f"QueuedTask.objects.filter(backend_name={self.backend!r}, queue_name={self.queue!r})"


def unserved(using: str, served: set[Place]) -> Iterator[Unserved]:
    """Yield the queues with tasks to run that are none of those served.

    Reads a row of each queue and those that it counts, however large the table is.
    """
    # MySQL and MariaDB do not tell a from A: a queue of either name serves the rows of both.
    is_blind = connections[using].vendor == "mysql"
    known = {tuple(_folded(name, is_blind) for name in place) for place in served}
    for backend, queue in _places(using):
        ours = _folded(backend, is_blind)
        if (ours, None) not in known and (ours, _folded(queue, is_blind)) not in known:
            number = _number(using, backend, queue)
            if number.number:
                yield Unserved(backend, queue, number)


def _folded(name: str | None, is_blind: bool) -> str | None:
    return name.casefold() if is_blind and name is not None else name


def _places(using: str) -> Iterator[tuple[str, str]]:
    """Yield each backend and queue that has rows, from one to the next in the index."""
    rows: Any = QueuedTask.objects.using(using).order_by("backend_name", "queue_name")
    names = rows.values_list("backend_name", "queue_name")
    place = names.first()
    while place is not None:
        yield place
        backend, queue = place
        # Two steps, as a condition with OR would be a scan.
        place = names.filter(backend_name=backend, queue_name__gt=queue).first()
        place = place or names.filter(backend_name__gt=backend).first()


def _number(using: str, backend: str, queue: str) -> Count:
    rows = QueuedTask.objects.using(using).filter(
        backend_name=backend, queue_name=queue, status__gte=FIRST_LIVE, status__lt=END_OF_LIVE
    )
    return Count.of(rows.order_by("status").values("status")[: CAP + 1].count(), CAP)
