"""What becomes of a task: pure decisions, from how its attempt ended to the status to record.

No database and no clock of its own; what is decided here is written by `modelqueue.attempts` (an
attempt) and `modelqueue.verbs` (a recovery). The table of all outcomes stands in the documentation,
"The outcomes of an attempt".
"""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from modelqueue import backoff
from modelqueue.backoff import Delay
from modelqueue.exceptions import Abort, Cancel, Interrupted, LeaseExpired, Retry, TimedOut
from modelqueue.status import ONE_HOUR, ZERO_SECS, State, Status, datetime_to_int, shifted

__all__ = [
    "GIVEN_BACK",
    "Ending",
    "NextPriority",
    "Outcome",
    "Policy",
    "Successes",
    "assigned",
    "decide",
    "error_text",
    "failed",
    "recovered",
]

Ending = Literal["finish", "assign", "retry", "abort", "cancel", "fail", "release"]
"""How an attempt ended: the action returned (``finish``), or assigned the status itself (``assign``);
it raised `Retry`, `Abort`, `Cancel`, or anything else (``fail``); or it was canceled from outside and
the task is given back uncharged (``release``)."""

#: What is no failure of an action but comes from outside, so that it is not charged.
GIVEN_BACK = (asyncio.CancelledError, Interrupted)

#: The priority of a task's next attempt, chosen by its queue; gets the task and the time of that attempt.
NextPriority = Callable[[Any, dt.datetime], "int | dt.datetime"]

_FACTORIES = (backoff.exponential, backoff.fixed, backoff.linear)
ERROR_LIMIT = 10_000
MOST_RETRIES = Status.max_attempts - 1


@dataclass(frozen=True)
class Policy:
    """How attempts of one queue are counted and timed. Made by `Policy.of`, which checks it."""

    retry: int | None = 3
    timeout: dt.timedelta = ONE_HOUR
    delay: Delay = ZERO_SECS
    lease: dt.timedelta | None = None
    """How long a claim holds without being renewed; None: for the timeout, as nobody renews it."""
    cancel_on: tuple[type[BaseException], ...] = ()
    """Exceptions of the action after which there is no further attempt."""
    next_priority: NextPriority | None = None
    """What chooses the priority of the next attempt; None: it is the time of that."""

    @classmethod
    def of(cls, retry: int | None, timeout: dt.timedelta, delay: Delay) -> Policy:
        """Check the options of `modelqueue.run`.

        Raises:
            TypeError, ValueError: an option of the wrong kind or out of range.
        """
        if retry is not None:
            if isinstance(retry, bool) or not isinstance(retry, int):
                raise TypeError(
                    f"retry is an int from 0 to {MOST_RETRIES}, or None for no limit, not {retry!r}."
                )
            if not 0 <= retry <= MOST_RETRIES:
                raise ValueError(
                    f"retry={retry} is out of range, as attempts are stored in one digit. "
                    f"Use 0 to {MOST_RETRIES}, or None for no limit."
                )
        _check_duration("timeout", timeout)
        if inspect.iscoroutinefunction(delay):
            raise TypeError(f"delay={delay!r} is an async function, which nobody awaits. Use def.")
        if delay in _FACTORIES:
            raise TypeError(
                f"delay={delay!r} makes a delay and is none. Call it, as in "
                f"backoff.{getattr(delay, '__name__', '')}(datetime.timedelta(seconds=30))."
            )
        if not callable(delay):
            _check_duration("delay", delay)
        return cls(retry, timeout, delay)

    def cutoff(self, now: dt.datetime) -> dt.datetime | None:
        """Return the time at or before which a claim has expired; None: no claim can have."""
        try:
            return now - self.holds
        except OverflowError:
            return None

    @property
    def holds(self) -> dt.timedelta:
        """How long after its claim, or its last renewal, a task still belongs to its worker."""
        return self.timeout if self.lease is None else self.lease

    def is_last(self, attempts: int) -> bool:
        """True if a task that was tried so often is out of attempts."""
        return self.retry is not None and attempts > self.retry

    def wait(self, attempts: int, delay: Delay | None = None) -> dt.timedelta:
        """Return how long to wait before the next attempt.

        Args:
            attempts: how many there were, the one that just ended included if it is charged.
            delay: what `Retry` or `Abort` asks for; None takes the delay of the policy.

        Raises:
            TypeError, ValueError: the delay is, or its callable returned, no wait. Anything that
            the callable raises.
        """
        chosen = self.delay if delay is None else delay
        if not callable(chosen):
            where = "" if delay is None else "Retry and Abort take a delay, no reason: "
            _check_duration("delay", chosen, where)
            return chosen
        number = min(attempts, Status.max_attempts)
        wait = chosen(number)
        _check_duration("the wait", wait, f"delay={chosen!r} returned {wait!r} after attempt {number}: ")
        return wait


def _check_duration(name: str, value: object, where: str = "") -> None:
    if not isinstance(value, dt.timedelta):
        raise TypeError(
            f"{where}{name} is a datetime.timedelta"
            + (" or a callable (attempts) -> timedelta" if name == "delay" else "")
            + f", not {value!r}. Give for example datetime.timedelta(seconds=30)."
        )
    if value < ZERO_SECS:
        raise ValueError(f"{where}{name}={value} is negative. Give a timedelta of zero or more.")


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended and what is to be recorded."""

    ending: Ending
    status: Status | None
    """The status to record; None takes the row out of the queue."""
    error: BaseException | None = None
    is_placed: bool = False
    """Has the queue chosen the priority, see `Policy.next_priority`? It may be below that of the lease."""

    @property
    def next_attempt(self) -> Status | None:
        """The waiting status, if the task waits again because of how the attempt ended."""
        is_waiting = self.status is not None and self.status.state == State.waiting
        return self.status if is_waiting and self.ending in ("retry", "abort", "fail") else None

    @property
    def raised(self) -> BaseException | None:
        """What goes on to the caller of `run` once the outcome is recorded."""
        return self.error if self.ending in ("fail", "release") else None

    def not_before(self, lease: Status) -> Outcome:
        """Return the same for a lease that was renewed since this was decided: stamped no earlier."""
        status = self.status
        is_chosen = self.is_placed or self.ending in ("assign", "release")
        if is_chosen or status is None or status.priority >= lease.priority:
            return self
        return replace(self, status=Status.combine(status.state, lease.priority, status.attempts))

    @functools.cached_property
    def note(self) -> str | None:
        """The text for the `ErrorField`, costly to make: empty after a success, None to leave it as it is."""
        if self.error is None:
            return ""
        return error_text(self.error) if self.ending in ("fail", "abort", "cancel") else None


class Successes:
    """The outcomes of actions that have returned, all at one moment: those that are alike are one object."""

    def __init__(self, moment: dt.datetime) -> None:
        self._moment = moment
        self._priority = datetime_to_int(moment)
        self._by_attempts: dict[int, Outcome] = {}

    def of(self, lease: Status) -> Outcome:
        if lease.priority > self._priority:
            return Outcome("finish", _ended(State.finished, lease, self._moment))
        attempts = lease.attempts
        if attempts not in self._by_attempts:
            self._by_attempts[attempts] = Outcome("finish", _ended(State.finished, lease, self._moment))
        return self._by_attempts[attempts]


def decide(
    lease: Status, before: Status, error: BaseException | None, policy: Policy, now: dt.datetime
) -> Outcome:
    """Decide on an attempt.

    Args:
        lease: the working status of the claim.
        before: the waiting status that the claim replaced.
        error: what the action raised, or None.
    """
    if error is None:
        return Outcome("finish", _ended(State.finished, lease, now))
    if isinstance(error, GIVEN_BACK):
        return Outcome("release", before, error)
    if isinstance(error, Cancel):
        return Outcome("cancel", _ended(State.canceled, lease, now), error)
    try:
        if isinstance(error, Retry):
            wait = policy.wait(lease.attempts, error.delay)
            return Outcome("retry", _waiting(lease, lease.attempts, wait, now), error)
        if isinstance(error, Abort):
            return Outcome("abort", _charged(lease, policy, now, error.delay), error)
    except BaseException as wrong_delay:  # SystemExit too: the row must not stay working
        wrong_delay.__cause__ = error
        error = wrong_delay
    return failed(lease, error, policy, now)


def failed(lease: Status, error: BaseException, policy: Policy, now: dt.datetime) -> Outcome:
    """Return the outcome of an attempt that ended with an error, whatever its class."""
    if isinstance(error, policy.cancel_on):
        return Outcome("fail", _ended(State.canceled, lease, now), error)
    try:
        return Outcome("fail", _charged(lease, policy, now), error)
    except BaseException as wrong_delay:
        wrong_delay.__cause__ = error
        return Outcome("fail", _waiting(lease, lease.attempts + 1, ZERO_SECS, now), wrong_delay)


def assigned(value: object, nullable: bool) -> Outcome:
    """Return the outcome of an action that assigned the status of its own task.

    Raises:
        TypeError, ValueError: `value` is nothing that an action may leave its task with.
    """
    allowed = "Assign a status that is created, waiting, finished or canceled, such as Status.waiting()."
    if value is None and nullable:
        return Outcome("assign", None)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"The action assigned {value!r} as the status of its task. {allowed}")
    status = Status(value)
    if status.state not in (State.created, State.waiting, State.finished, State.canceled):
        raise ValueError(
            f"The action assigned {status!r} ({status.state}) as the status of its task. {allowed}"
        )
    return Outcome("assign", status)


def recovered(
    lease: Status, policy: Policy, now: dt.datetime, why: BaseException | None = None
) -> tuple[Status, str, Exception | None]:
    """Decide on a task that its worker has left: the status, the text for its `ErrorField`, what went wrong.

    Args:
        why: what has become of the worker; None: nobody knows, the lease has run out.

    A delay that can not be computed must not keep the task from its next attempt: it counts as
    zero, and the error is returned to be logged.
    """
    attempts = lease.attempts + 1
    reason = error_text(why or _lease_expired(attempts, policy))
    if isinstance(why, TimedOut) and isinstance(why, policy.cancel_on):  # as if it had ended by that
        return _ended(State.canceled, lease, now), reason, None
    try:
        return _charged(lease, policy, now), reason, None
    except Exception as wrong_delay:
        return _waiting(lease, attempts, ZERO_SECS, now), reason, wrong_delay


def _lease_expired(attempts: int, policy: Policy) -> LeaseExpired:
    return LeaseExpired(
        f"attempt {attempts} was not reported within {policy.timeout} of its claim; its worker was "
        "killed or cut off, or the action takes longer than the timeout"
        if policy.lease is None
        else f"attempt {attempts} was neither reported nor its lease renewed within {policy.lease}; its "
        "worker was killed or cut off"
    )


def error_text(error: BaseException) -> str:
    """Describe an exception for an `ErrorField`: ``module.Class: message``, then the traceback.

    At most 10,000 characters, the middle left out, and nothing in it that a database refuses.
    """
    kind = type(error)
    try:
        message = str(error)
    except Exception as unprintable:
        message = f"<its message can not be shown: {type(unprintable).__name__}>"
    text = f"{kind.__module__}.{kind.__qualname__}" + (f": {message}" if message else "")
    if error.__traceback__ is not None:
        text += "\n" + "".join(traceback.format_exception(kind, error, error.__traceback__)).rstrip()
    # PostgreSQL has no NUL in text, and no database has halves of a surrogate pair.
    text = text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()
    if len(text) > ERROR_LIMIT:
        left_out = "\n[...]\n"
        head = ERROR_LIMIT // 4
        text = text[:head] + left_out + text[-(ERROR_LIMIT - head - len(left_out)) :]
    return text


def _charged(lease: Status, policy: Policy, now: dt.datetime, delay: Delay | None = None) -> Status:
    attempts = lease.attempts + 1
    if policy.is_last(attempts):
        return _ended(State.canceled, lease, now)
    return _waiting(lease, attempts, policy.wait(attempts, delay), now)


def _ended(state: State, lease: Status, now: dt.datetime) -> Status:
    return _stamped(state, lease, lease.attempts + 1, now)


def _waiting(lease: Status, attempts: int, wait: dt.timedelta, now: dt.datetime) -> Status:
    return _stamped(State.waiting, lease, attempts, shifted(now, wait))


def _stamped(state: State, lease: Status, attempts: int, moment: dt.datetime) -> Status:
    # Never below the time it replaces: a later claim then stamps a later one, so that no lease is
    # ever the same number as an earlier one of the same row.
    priority = max(datetime_to_int(moment), lease.priority)
    return Status.combine(state, priority, min(attempts, Status.max_attempts))
