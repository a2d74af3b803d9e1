"""Queues of which something can not be done: that is told once, and tried ever less often.

The database is away, or a queue alone is broken: its table is missing, perhaps.
"""

from __future__ import annotations

import logging
import random
from typing import Any

from django.db.utils import Error

from modelqueue.queues import Queue

__all__ = ["Troubles"]

logger = logging.getLogger("modelqueue")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


class Troubles:
    """Those with one thing.

    Args:
        what: what their tasks can not be: claimed, or recovered.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._pauses: dict[str, float] = {}

    def begun(self, queue: Queue[Any], error: BaseException) -> float:
        """Note an error; return for how many seconds to wait."""
        pause = self._pauses.get(queue.name)
        if pause is None:
            fault = None if isinstance(error, Error) else error
            logger.warning(
                "%s: its tasks can not be %s, trying again: %s", queue.name, self._what, error, exc_info=fault
            )
        pause = min(2 * pause, _LONGEST_PAUSE) if pause else _FIRST_PAUSE
        self._pauses[queue.name] = pause
        return random.uniform(pause / 2, pause)  # noqa: S311  (jitter)

    def ended(self, queue: Queue[Any]) -> None:
        """Note that there is none any more."""
        if self._pauses.pop(queue.name, None) is not None:
            logger.warning("%s: its tasks can be %s again.", queue.name, self._what)
