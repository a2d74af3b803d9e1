"""What an action raises to steer its task.

None of these is an error of the library::

    Exception
    +-- Retry          try again later, the attempt is not charged
    +-- Abort          try again later, the attempt is charged; canceled when out of attempts
    +-- Cancel         give the task up
    +-- WorkerDied     only named in an ErrorField, as the reason why a task was taken back
    +-- LeaseExpired   only named in an ErrorField, as the reason of a recovery
    BaseException
    +-- Interrupted    raised in an action that a worker which stops can not wait for
    +-- TimedOut       raised in an action that takes longer than the timeout of its queue

Wrong arguments raise `TypeError` or `ValueError`, as everywhere in Python.
"""

from __future__ import annotations

from modelqueue.backoff import Delay

__all__ = ["Abort", "Cancel", "Interrupted", "LeaseExpired", "Retry", "TimedOut", "WorkerDied"]


class Retry(Exception):  # noqa: N818  (a verb of the public API, not an error)
    """Raised by an action: make the task waiting again and do not count this attempt.

    Args:
        delay: how long to wait before the next attempt: a `datetime.timedelta` or a callable as in
            `modelqueue.backoff`; None takes the ``delay`` that was given to `modelqueue.run`.
    """

    def __init__(self, delay: Delay | None = None) -> None:
        super().__init__(*() if delay is None else (delay,))
        self.delay = delay


class Abort(Exception):  # noqa: N818
    """Raised by an action: end this attempt as failed, without an error for the caller of `run`.

    The attempt counts; out of attempts, the task is canceled.

    Args:
        delay: as for `Retry`.
    """

    def __init__(self, delay: Delay | None = None) -> None:
        super().__init__(*() if delay is None else (delay,))
        self.delay = delay


class Cancel(Exception):  # noqa: N818
    """Raised by an action: give the task up. The attempt counts, the state becomes canceled.

    What it is raised with, as in ``raise Cancel("no such customer")``, goes into the `ErrorField`.
    """


class Interrupted(BaseException):
    """Raised in the thread of an action by a worker that has to stop: the task is given back uncharged.

    No `Exception`, so that an ``except Exception`` of the action lets it pass.
    """


class TimedOut(BaseException):
    """Raised in the thread of an action that takes longer than its timeout: the attempt has failed.

    No `Exception`, so that an ``except Exception`` of the action lets it pass. An ``async def`` action gets
    `asyncio.CancelledError`, and this is what is recorded.
    """


class WorkerDied(Exception):  # noqa: N818
    """Why a task was taken back: its process died in its action. Named in an `ErrorField`, not raised."""


class LeaseExpired(Exception):  # noqa: N818
    """Why a task was recovered: its worker did not report in time. Named in an `ErrorField`, not raised."""
