"""Running declared queues in the thread and the connection of a test.

The attempts are those of production, step by step. What they do not get from the database, as nothing is
committed, is in `modelqueue.testing.hooks`.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from asgiref.sync import async_to_sync
from django.db import models
from django.dispatch import Signal

from modelqueue import signals
from modelqueue.attempts import AsyncAttempt, AtomicAttempt, Attempt
from modelqueue.clock import now
from modelqueue.execution import next_claim
from modelqueue.outcomes import Ending, Outcome
from modelqueue.queues import Queue, declared_queues
from modelqueue.status import Status, priority_to_datetime, shifted
from modelqueue.testing.hooks import as_in_autocommit, pretence_of
from modelqueue.testing.travel import MovableClock, moment_of, moving_clock

__all__ = ["Ran", "drain", "run_one", "run_to_end", "run_until"]

M = TypeVar("M", bound=models.Model)

DEFAULT_LIMIT = 1000
#: A task that waits until the end of the calendar waits for ever.
_NEVER = dt.datetime(9999, 12, 31, tzinfo=dt.timezone.utc)


@dataclass(frozen=True)
class Ran(Generic[M]):
    """What came of one attempt."""

    queue: Queue[M]
    """The queue that the task was claimed from."""
    task: M | None
    """The instance that the action got; None if its row could not be loaded."""
    outcome: Ending
    """How the attempt ended, by the words of the signals (finish, retry, fail, ...)."""
    error: BaseException | None
    """What ended it, also where that is a `Retry`, `Abort` or `Cancel`."""
    status: Status | None
    """What stands in the row now, None if it is in no queue any more. If the action has deleted the row,
    what was to be recorded."""
    at: dt.datetime
    """When it began, by the clock of the library."""
    is_lost: bool
    """Whether the outcome was dropped, as somebody had changed the status meanwhile."""


def run_one(queue: Queue[M], *, raises: bool = True) -> Ran[M] | None:
    """Run the next due task of a queue; return what came of it, or None if nothing is due.

    Args:
        queue: a declared one, its action ``def`` or ``async def``.
        raises: whether to raise what the action raised, once that is recorded, as `Queue.run` does. False
            returns it as `Ran.error`.

    Raises:
        TypeError: `queue` is no `Queue`.
        BaseException: what the action raised; Ctrl-C and a cancellation in any case.
    """
    _check_queue(queue)
    with as_in_autocommit():
        return _run_next(queue, raises)


def drain(*queues: Queue[Any], raises: bool = True, limit: int = DEFAULT_LIMIT) -> list[Ran[Any]]:
    """Run tasks until none is due now; return the attempts in their order.

    Retries without a delay are due at once, those with one are not: see `run_until` and `run_to_end`.

    Args:
        queues: which, in turns; all declared ones if none is given.
        raises: as for `run_one`. What is left then has not been run.
        limit: how many attempts there may be, so that an action which asks for ever more ends the test.

    Raises:
        AssertionError: after `limit` attempts there are still tasks due.
        TypeError, ValueError: an argument is of the wrong kind.
        BaseException: as `run_one`.
    """
    run = _Run("drain", queues, raises, limit)
    with as_in_autocommit():
        run.run_due()
    return run.attempts


def run_until(
    when: dt.datetime | dt.timedelta,
    *queues: Queue[Any],
    raises: bool = True,
    limit: int = DEFAULT_LIMIT,
) -> list[Ran[Any]]:
    """Run all tasks that become due up to a time, each at its time; return the attempts in their order.

    The clock is moved to each next task that is scheduled, that waits for another attempt, or whose worker
    has died, and at last to `when`. Inside `travel` it stays there; else it goes back to the present.
    Before that the `upkeep` of each queue is called, once, and not for each second of that time.

    Args:
        when: a time (a naive one is UTC), or how long from now.
        queues, raises, limit: as for `drain`.

    Raises:
        ValueError: `when` is over.
        AssertionError, TypeError, BaseException: as `drain`.
    """
    run = _Run("run_until", queues, raises, limit)
    with moving_clock() as clock, as_in_autocommit():
        until = moment_of(when)
        if until < now():
            raise ValueError(
                f"run_until({when!r}): that time is over, it is {now()}. Begin earlier with travel()."
            )
        run.keep_up()
        run.run_up_to(until, clock)
        if now() < until:
            clock.move(until)
    return run.attempts


def run_to_end(*queues: Queue[Any], raises: bool = True, limit: int = DEFAULT_LIMIT) -> list[Ran[Any]]:
    """Run tasks until none waits any more, each at its time; return the attempts in their order.

    As `run_until` a time that is far enough; inside `travel` the clock stays at the last task. A task whose
    time is the end of the calendar, as after a delay of `datetime.timedelta.max`, is left alone.

    Args:
        queues, raises, limit: as for `drain`. A task that enqueues itself again has no end.

    Raises:
        AssertionError, TypeError, ValueError, BaseException: as `drain`.
    """
    run = _Run("run_to_end", queues, raises, limit)
    with moving_clock() as clock, as_in_autocommit():
        run.keep_up()
        run.run_up_to(_NEVER, clock)
    return run.attempts


class _Run:
    """One call of a function above: the queues in turns, the attempts made, and how many there may be."""

    def __init__(self, name: str, queues: tuple[Queue[Any], ...], raises: bool, limit: int) -> None:
        for queue in queues:
            _check_queue(queue)
        if isinstance(limit, bool) or not isinstance(limit, int):
            raise TypeError(f"limit is an int, 1 or more, not {limit!r}.")
        if limit < 1:
            raise ValueError(f"limit={limit} would run nothing. Give 1 or more.")
        self.name = name
        self.queues = queues or tuple(declared_queues())
        self.raises = raises
        self.limit = limit
        self.attempts: list[Ran[Any]] = []

    def keep_up(self) -> None:
        for queue in self.queues:
            queue.keep_up()

    def run_up_to(self, until: dt.datetime, clock: MovableClock) -> None:
        self.run_due(until)
        while (moment := self.next_moment()) is not None and moment <= until:
            clock.move(max(moment, now()))
            self.run_due(until)

    def run_due(self, until: dt.datetime = _NEVER) -> None:
        while sum(self.run_next(queue, until) for queue in self.queues):
            pass

    def run_next(self, queue: Queue[Any], until: dt.datetime) -> bool:
        """Run one task of a queue; return whether there was one."""
        is_at_limit = len(self.attempts) >= self.limit
        # The clock goes on while actions run, maybe beyond the time.
        if is_at_limit or now() > until:
            if not queue.source().due(min(until, now())).exists():
                return False
            if is_at_limit:
                raise AssertionError(self.too_many())
        ran = _run_next(queue, self.raises)
        if ran is not None:
            self.attempts.append(ran)
        return ran is not None

    def next_moment(self) -> dt.datetime | None:
        """Return the first time from now on at which a task becomes due, or its lease runs out."""
        found = [moment for queue in self.queues for moment in _next_moments(queue, now())]
        return min(found, default=None)

    def too_many(self) -> str:
        tasks = Counter(
            f"{ran.queue.model._meta.label} {None if ran.task is None else ran.task.pk} of {ran.queue.name}"
            for ran in self.attempts
        )
        ((task, count),) = tasks.most_common(1)
        return (
            f"{self.name}() has made {len(self.attempts)} attempts, and there are still tasks due. "
            f"{count} of them were on {task}; the last outcome was {self.attempts[-1].outcome!r}. An action "
            "that raises Retry for ever, or enqueues its own task again, has no end. If so many attempts are "
            f"meant, raise limit={self.limit}."
        )


def _next_moments(queue: Queue[Any], moment: dt.datetime) -> list[dt.datetime]:
    policy = queue.recovery()
    cutoff = policy.cutoff(moment)
    due = _first_after(queue, Status.waiting(moment, Status.max_attempts))
    claimed = None if cutoff is None else _first_after(queue, Status.working(cutoff, Status.max_attempts))
    found = [due, None if claimed is None else shifted(claimed, policy.holds)]
    return [one for one in found if one is not None]


def _first_after(queue: Queue[Any], status: Status) -> dt.datetime | None:
    """Return the lowest time in a state above a status. Numbers that spell no time come up unasked."""
    source, name = queue.source(), queue.field.name
    limits = {f"{name}__gt": int(status), f"{name}__lte": Status.maximum(status.state)}
    statuses = source.queryset.filter(**limits).order_by(name).values_list(name, flat=True)
    moments = (priority_to_datetime(Status(one).priority) for one in statuses)
    return next((one for one in moments if one is not None), None)


def _run_next(queue: Queue[M], raises: bool) -> Ran[M] | None:
    work = queue.work()
    claim = next_claim(work)
    if claim is None:
        return None
    policy, is_atomic = work.terms(claim)
    kind = _AsyncAttempt if queue.is_async else _AtomicAttempt if is_atomic else _PlainAttempt
    attempt: _WatchedAttempt[M] = kind(work.source, policy, claim)
    work.keep(attempt)
    attempt.began = now()  # where its row can not be loaded no action begins
    outcome = attempt.make(queue)
    if outcome.raised is not None:
        # Ctrl-C is meant for the test; and a task that is given back would be the next one again.
        ends_the_test = not isinstance(outcome.raised, Exception) or outcome.ending == "release"
        if raises or ends_the_test:
            if hasattr(outcome.raised, "add_note") and not ends_the_test:  # Python 3.11
                outcome.raised.add_note(
                    "The action raised this, and it is recorded as a failed attempt, as in production. With "
                    "raises=False it is returned with the attempt, and the next one is made."
                )
            raise outcome.raised
    return Ran(
        queue, attempt.task, outcome.ending, outcome.error, attempt.stored, attempt.began, attempt.is_lost
    )


class _WatchedAttempt(Attempt[M]):
    """An attempt of production that remembers what it tells."""

    #: The last outcome; until there is one, nothing.
    ended = Outcome("release", None)
    stored: Status | None = None
    is_lost = False

    def make(self, queue: Queue[M]) -> Outcome:
        """Take all steps; return the outcome, whatever it is."""
        outcome = self.process(queue.action)
        self.let_its_time_come(outcome)
        return outcome

    def conclude(self, outcome: Outcome, is_written: bool) -> None:
        self.ended = outcome
        super().conclude(outcome, is_written)

    def tell(self, signal: Signal, **arguments: Any) -> None:
        self.stored, self.is_lost = arguments["status"], signal is signals.lease_lost
        super().tell(signal, **arguments)


class _PlainAttempt(_WatchedAttempt[M]):
    def call_it(self, action: Any, task: M) -> BaseException | None:
        # In production there is no savepoint around the action.
        pretence = pretence_of(self.source.using)
        with nullcontext() if pretence is None else pretence.outside_here():
            return super().call_it(action, task)


class _AtomicAttempt(_WatchedAttempt[M], AtomicAttempt[M]):
    pass


class _AsyncAttempt(_WatchedAttempt[M], AsyncAttempt[M]):
    def make(self, queue: Queue[M]) -> Outcome:
        self.start()
        try:
            async_to_sync(self.arun)(queue.action, True, None)
        except BaseException as error:
            if error is not self.ended.raised:
                raise
        return self.ended


def _check_queue(queue: object) -> None:
    if not isinstance(queue, Queue):
        raise TypeError(
            f"A queue is what the decorator modelqueue.queue has made of an action, not {queue!r}. "
            "Tasks without a declared queue are run by modelqueue.run()."
        )
