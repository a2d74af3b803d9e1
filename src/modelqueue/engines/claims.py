"""What an engine gets and gives: rows that could be claimed, claims, renewals, verdicts on expired rows."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from django.db import models

from modelqueue.status import Status, shifted

__all__ = ["Candidate", "Change", "Claim", "Note", "Overtaken", "Renewal", "Verdict", "lease_at"]

M = TypeVar("M", bound=models.Model)

_MILLISECOND = dt.timedelta(milliseconds=1)


class Candidate(NamedTuple):
    """A row that could be claimed or recovered, as it was read without a lock."""

    pk: Any
    #: Its primary key in the owner's table, see `Source.owner`.
    key: Any
    status: Status
    #: What stood in the fields that its claim has set, by their names; what could not be read is left out.
    before: dict[str, Any] | None = None

    def as_set(self, names: Iterable[str], values: Iterable[Any]) -> Candidate:
        """Return the row with what stood in the fields that its claim sets."""
        return self._replace(before=dict(zip(names, values, strict=True)))


@dataclass(slots=True)
class Claim(Generic[M]):
    """A task that is ours until its lease expires."""

    row: Candidate
    """The row as it was before the claim, waiting."""
    lease: Status
    task: M | None
    """The instance, or None where the row could not be turned into one."""
    error: Exception | None = None
    """Why it could not."""


class Overtaken(Exception):  # noqa: N818
    """What was picked has changed, or does not load, although it is locked."""


class Verdict(NamedTuple):
    """What becomes of an expired task."""

    status: Status
    #: The text for the error field.
    note: str


#: Told, before a lease is renewed: the primary key in the owner's table, what stands there, and what is to.
Note = Callable[[Any, Status, Status], None]


class Change(NamedTuple):
    """A status that is to be written without anything else."""

    #: Of the row in the owner's table, see `Source.owner`.
    key: Any
    #: One of these stands there as long as the task is ours.
    old: frozenset[Status]
    new: Status


class Renewal(NamedTuple):
    """What a renewal has found, each task by its primary key in the owner's table."""

    renewed: set[Any]
    #: Still ours, but somebody has locked their rows: to be tried again soon.
    locked: set[Any]
    #: Under another status by now, or deleted.
    lost: set[Any]


def lease_at(moment: dt.datetime, attempts: int = 0) -> Status:
    """Return the lease of a claim at a moment: stamped 1 ms later, so later than any time due by then."""
    return Status.working(shifted(moment, _MILLISECOND), attempts)
