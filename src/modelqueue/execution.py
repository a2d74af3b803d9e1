"""Running the next task of a queue: `run`, and `arun` from asynchronous code.

It recovers what dead workers have left, claims a task, and gives it to an attempt
(`modelqueue.attempts`).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Generic, TypeVar

from django.db import models
from django.utils.asyncio import async_unsafe

from modelqueue import verbs
from modelqueue.attempts import AsyncAttempt, AtomicAttempt, Attempt, running
from modelqueue.backoff import Delay
from modelqueue.engines import Candidate, Claim
from modelqueue.fields import declared_on
from modelqueue.leases import keeper_for
from modelqueue.outcomes import Policy
from modelqueue.per_task import Terms
from modelqueue.source import Source
from modelqueue.status import ONE_HOUR, ZERO_SECS
from modelqueue.threads import NotCalled, in_thread

__all__ = [
    "Current",
    "Work",
    "arun",
    "arun_next",
    "current",
    "is_async",
    "next_claim",
    "refuse_atomic_async",
    "run",
    "run_next",
]

M = TypeVar("M", bound=models.Model)

#: What can not be called like a plain function.
_SPECIAL = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
#: Seconds after which `run` recovers again although there are tasks to run.
_RECOVERY_INTERVAL = 1.0
_last_recovery: dict[tuple[Any, ...], float] = {}


def run(
    queryset: models.QuerySet[M] | models.Manager[M],
    field: str,
    action: Callable[[M], object],
    retry: int | None = 3,
    timeout: dt.timedelta = ONE_HOUR,
    delay: Delay = ZERO_SECS,
    *,
    error_field: str | None = None,
    atomic: bool = False,
) -> M | None:
    """Run `action` on the next due task of a queue, and record what came of it.

    The next due task is the waiting row of `queryset` with the lowest priority whose time has come.
    It is claimed (working) and committed before the action starts, so it is safe to run this in any
    number of processes and threads.

    Args:
        queryset: the tasks: any queryset of rows, with filters, joins, ``select_related`` and
            ``only``, or a manager. Its ordering is replaced by that of the queue. Without ``using()``
            the database is the one that the router names for writing.
        field: the name of the `StatusField` (or other BigIntegerField).
        action: gets the task. When it returns, the task is finished; what it changed on the task
            is saved. It may raise `Retry`, `Abort` or `Cancel`, or assign a `Status` to ``field``.
        retry: how many attempts are allowed after the first that failed, 0 to 8; None for no limit.
        timeout: how long an attempt may take. After that its worker counts as dead, and any call
            of `run` whose queryset has the row takes the task back, as a failed attempt, by its own
            timeout.
        delay: how long a task waits after a failed attempt: a timedelta, or a callable
            (attempts) -> timedelta, see `modelqueue.backoff`.
        error_field: the name of an `ErrorField` that takes the text of a failure.
        atomic: whether the action and its outcome are one transaction on the database of the task.
            Then what the action does there is done exactly once: it is committed with the outcome when
            the action returns, and rolled back, the changes of the task too, when it raises. For short
            actions, as an open transaction holds up others.

    Returns:
        The task, with the status that its row holds now (that of the claim if the row is gone), or None
        when nothing is due.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind; nothing was claimed.
        BaseException: what the action raised, `Retry`, `Abort` and `Cancel` excepted, or why its
            changes could not be saved, after the failed attempt was recorded.
        django.db.Error: the database did not answer, or said "try again" for 30 s. If that happens
            after the claim, the task is recovered when its timeout is over.
    """
    source = Source.of(queryset, field, error_field)
    refuse_declared(source.field, "run")
    policy = Policy.of(retry, timeout, delay)
    if is_async(action):
        raise TypeError(
            f"run() can not await the action {action!r}, which is an async function. "
            "Use arun(), or wrap it: asgiref.sync.async_to_sync(action)."
        )
    _check_atomic(atomic)
    return run_next(Work(source, policy, action, atomic))


@dataclass(frozen=True)
class Work(Generic[M]):
    """What is to be done with the tasks of a source."""

    source: Source[M]
    policy: Policy
    action: Callable[[M], object]
    atomic: bool = False
    queue: Any = None
    """The declared queue, if it is one: its leases are renewed."""
    recovery: Policy | None = None
    """By which tasks of dead workers are taken back, if not by `policy`."""
    policy_of: Callable[[Candidate], Policy] | None = None
    """Asked for retry and delay of each of those; None: all are alike."""

    def terms(self, claim: Claim[M]) -> Terms:
        """Return on which terms the attempt on a claimed task is made."""
        return Terms(self.policy, self.atomic) if self.queue is None else self.queue.terms(claim)

    def keep(self, attempt: Attempt[M]) -> None:
        """Have the lease of an attempt renewed where that is needed, and possible."""
        attempt.queue = self.queue
        if self.policy.lease is not None and not attempt.is_outer:  # in a transaction nobody else can see it
            attempt.renewal = keeper_for(self.source.using).hold(attempt, self.policy.lease.total_seconds())


def run_next(work: Work[M]) -> M | None:
    """Run the next due task, see `run`."""
    attempt = begin_next(work)
    return None if attempt is None else attempt.run(work.action)


def begin_next(work: Work[M]) -> Attempt[M] | None:
    """Claim the next due task; return the attempt that is to be made, or None."""
    claim = next_claim(work)
    if claim is None:
        return None
    policy, is_atomic = work.terms(claim)
    kind = AtomicAttempt if is_atomic else Attempt
    attempt = kind(work.source, policy, claim)
    work.keep(attempt)
    return attempt


async def arun(
    queryset: models.QuerySet[M] | models.Manager[M],
    field: str,
    action: Callable[[M], object],
    retry: int | None = 3,
    timeout: dt.timedelta = ONE_HOUR,
    delay: Delay = ZERO_SECS,
    *,
    error_field: str | None = None,
    atomic: bool = False,
) -> M | None:
    """Run the next due task as `run` does, from asynchronous code.

    The event loop goes on while the database works. Each action has a thread and a connection of its own for
    its synchronous parts, its queries for example, as soon as it needs them; so any number of these
    coroutines run side by side. Inside a transaction of the caller the action stays in the caller's thread;
    there is no savepoint around an ``async def`` action there.

    Canceling the coroutine cancels an ``async def`` action, and the task is given back uncharged: it waits
    as it did before the claim. A synchronous action can not be canceled; it is waited for, its outcome is
    recorded, and then `asyncio.CancelledError` is raised.

    Args:
        queryset, field, retry, timeout, delay, error_field: as for `run`.
        action: an ``async def`` function, which is awaited, or a synchronous one, which is called in a
            thread.
        atomic: as for `run`, and for synchronous actions alone: a transaction belongs to a thread.

    Returns:
        The task or None, as `run` does.

    Raises:
        asyncio.CancelledError: this, or the action, was canceled.
        RuntimeError: the system gave no thread for the action; it was not called, and the task was given
            back uncharged.
        TypeError, ValueError, BaseException, django.db.Error: as for `run`.
    """
    source = Source.of(queryset, field, error_field)
    refuse_declared(source.field, "arun")
    policy = Policy.of(retry, timeout, delay)
    _check_atomic(atomic)
    refuse_atomic_async(action, atomic)
    return await arun_next(Work(source, policy, action, atomic))


async def arun_next(work: Work[M]) -> M | None:
    """Run the next due task, see `arun`."""
    found, canceled = await in_thread(_next_attempt, work)
    if found is None:
        if canceled is not None:
            raise canceled
        return None
    attempt, is_atomic = found
    if not is_atomic or canceled is not None:
        return await attempt.arun(work.action, is_async(work.action), canceled)
    run_it = functools.partial(_run_atomic, work, attempt)
    try:
        task, canceled = await attempt.in_thread_of_action(run_it)
    except NotCalled as error:
        return await attempt.give_back(error)
    if canceled is not None:
        raise canceled
    return task


def _next_attempt(work: Work[M]) -> tuple[AsyncAttempt[M], bool] | None:
    """Claim the next task; return the attempt, and whether `_run_atomic` is to make another one of it."""
    claim = next_claim(work)
    if claim is None:
        return None
    policy, is_atomic = work.terms(claim)
    attempt = AsyncAttempt(work.source, policy, claim)
    if not is_atomic:
        work.keep(attempt)
        attempt.start()
    return attempt, is_atomic


def _run_atomic(work: Work[M], begun: AsyncAttempt[M]) -> M | None:
    attempt = AtomicAttempt(work.source, begun.policy, begun.claim)
    work.keep(attempt)
    return attempt.run(work.action)


def current() -> Current:
    """Return what is known of the attempt whose action this is called from.

    Raises:
        LookupError: no action is being run here.
    """
    attempt = running.get(None)
    if attempt is None:
        raise LookupError(
            "current() is for the code of an action while it is run. In a thread that the action started "
            "itself, use contextvars.copy_context().run(...)."
        )
    return Current(attempt)


class Current:
    """The attempt that is under way: its task, its queue, and how long it may take."""

    def __init__(self, attempt: Attempt[Any]) -> None:
        self._attempt = attempt

    @property
    def task(self) -> Any:
        """The task, the same instance that the action gets."""
        return self._attempt.task

    @property
    def queue(self) -> Any:
        """The declared `modelqueue.Queue`; None in `modelqueue.run`."""
        return self._attempt.queue

    @property
    def attempt(self) -> int:
        """The number of this attempt, 1 for the first; 10 is the last that is told from others."""
        return self._attempt.claim.row.status.attempts + 1

    @property
    def deadline(self) -> dt.datetime | None:
        """When the ``timeout`` of this attempt is over; None: never."""
        try:
            return self._attempt.began + self._attempt.policy.timeout
        except OverflowError:
            return None

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody has canceled the task or taken it, so that its outcome would be dropped."""
        return not self._attempt.is_held

    @async_unsafe("current().renew() waits for the database. Await current().arenew().")
    def renew(self) -> bool:
        """Renew the lease now; return whether the task is still ours. A declared queue does so by itself.

        Raises:
            django.core.exceptions.SynchronousOnlyOperation: this is an async action, see `arenew`.
        """
        renewal = self._attempt.renewal
        return self._attempt.is_held if renewal is None else renewal.renew()

    async def arenew(self) -> bool:
        """Do what `renew` does, in an async action: other coroutines go on meanwhile."""
        return await asyncio.to_thread(self.renew)


def is_async(action: object) -> bool:
    """Say whether an action is to be awaited; raise if it can not be an action at all."""
    if not callable(action):
        raise TypeError(f"The action is a callable that gets the task, not {action!r}.")
    if _is_plain_function(action):
        return False
    function = action.func if isinstance(action, functools.partial) else action
    called = (function, type(function).__call__)
    if any(inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one) for one in called):
        raise TypeError(
            f"The action {action!r} is a generator function: calling it runs nothing of it. "
            "Give a function without yield."
        )
    return any(inspect.iscoroutinefunction(one) for one in called)


def _is_plain_function(action: object) -> bool:
    """Say so at once of the most usual action, as to ask `inspect` takes long."""
    return isinstance(action, FunctionType) and not (action.__code__.co_flags & _SPECIAL or action.__dict__)


def _check_atomic(atomic: object) -> None:
    if not isinstance(atomic, bool):
        raise TypeError(f"atomic is True or False, not {atomic!r}.")


def refuse_atomic_async(action: object, atomic: bool) -> None:
    if is_async(action) and atomic:
        raise TypeError(
            f"atomic=True is not for the action {action!r}, which is an async function: "
            "a transaction belongs to one thread. Give a synchronous function."
        )


def refuse_declared(field: models.Field[Any, Any], function: str) -> None:
    """Raise if a field has a declared queue, which renews its leases, as `run` does not."""
    queues = declared_on(field)
    if queues:
        raise ValueError(
            f"{field} belongs to the declared queue {queues[0].name!r} ({queues[0].where}). Its tasks count "
            f"as abandoned after {queues[0].lease} without a renewal, and {function}() renews nothing. Call "
            f"{queues[0].action.__qualname__}.{function}(), the method of the queue."
        )


def next_claim(work: Work[M]) -> Claim[M] | None:
    """Claim the next task; recover those of dead workers when there is nothing else to do, or each second."""
    source = work.source
    key = _recovery_key(source)
    is_due = time.monotonic() - _last_recovery.get(key, -_RECOVERY_INTERVAL) >= _RECOVERY_INTERVAL
    if is_due:
        _recover(work, key)
    claims = verbs.claim(source)
    if not claims and not is_due and _recover(work, key):
        claims = verbs.claim(source)
    return claims[0] if claims else None


def _recover(work: Work[Any], key: tuple[Any, ...]) -> int:
    count = verbs.recover(work.source, work.recovery or work.policy, policy_of=work.policy_of)
    if len(_last_recovery) > 1000:  # querysets whose filters change with every call
        _last_recovery.clear()
    _last_recovery[key] = time.monotonic()
    return count


def _recovery_key(source: Source[Any]) -> tuple[Any, ...]:
    # With the filter: of two queues on one field, a busy one must not use up the turns of the other.
    where = source.queryset.query.where
    try:
        rows = hash(where)
    except TypeError:  # a value in the filter is unhashable
        rows = hash(str(where))
    return source.using, source.owner, source.field.attname, rows
