"""How long to wait before the next attempt: pure functions, attempts in, wait out.

Each function here returns a callable for the ``delay`` of `modelqueue.run`. It gets the number of
attempts after the one that failed (1 after the first failure) and returns a `datetime.timedelta`.
"""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable

__all__ = ["Backoff", "Delay", "exponential", "fixed", "linear"]

Backoff = Callable[[int], dt.timedelta]
Delay = dt.timedelta | Backoff

_ZERO = dt.timedelta(0)


def fixed(wait: dt.timedelta) -> Backoff:
    """Wait the same time before every attempt.

    >>> fixed(dt.timedelta(seconds=5))(3)
    datetime.timedelta(seconds=5)
    """
    _check("fixed", wait=wait)
    return lambda attempts: wait


def linear(step: dt.timedelta, cap: dt.timedelta | None = None) -> Backoff:
    """Wait one step longer after each failure: step, 2 * step, 3 * step ... up to ``cap``.

    >>> linear(dt.timedelta(seconds=5))(3)
    datetime.timedelta(seconds=15)
    """
    _check("linear", step=step, cap=cap)
    return lambda attempts: _product(step, max(attempts, 1), cap)


def exponential(base: dt.timedelta, cap: dt.timedelta | None = None, jitter: float = 0.1) -> Backoff:
    """Wait twice as long after each failure: base, 2 * base, 4 * base ... up to ``cap``.

    Args:
        base: the wait after the first failure.
        cap: the longest wait; None for no limit.
        jitter: 0 to 1, the part of each wait that is random, so that tasks that failed together
            do not come back together: 0.1 makes a wait of 60 s one of 54 to 60 s.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.

    >>> exponential(dt.timedelta(seconds=1), cap=dt.timedelta(seconds=30), jitter=0)(4)
    datetime.timedelta(seconds=8)
    """
    _check("exponential", base=base, cap=cap)
    if isinstance(jitter, bool) or not isinstance(jitter, (int, float)):
        raise TypeError(f"exponential(): jitter is a number from 0 to 1, not {jitter!r}.")
    if not 0 <= jitter <= 1:
        raise ValueError(f"exponential(): jitter is a number from 0 to 1, not {jitter!r}.")

    def wait(attempts: int) -> dt.timedelta:
        full = _product(base, 2 ** (max(attempts, 1) - 1), cap)
        return full * (1 - jitter * random.random())  # noqa: S311  (no secret)

    return wait


def _product(wait: dt.timedelta, factor: int, cap: dt.timedelta | None) -> dt.timedelta:
    longest = dt.timedelta.max if cap is None else cap
    try:
        return min(wait * factor, longest)
    except OverflowError:
        return longest


def _check(function: str, **durations: dt.timedelta | None) -> None:
    for name, value in durations.items():
        if value is None and name == "cap":
            continue
        if not isinstance(value, dt.timedelta):
            raise TypeError(f"{function}(): {name} is a datetime.timedelta, not {value!r}.")
        if value < _ZERO:
            raise ValueError(
                f"{function}(): {name}={value} is negative, but nothing can wait less than zero."
            )
