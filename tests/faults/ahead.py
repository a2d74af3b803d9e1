"""A worker that claims so many tasks more than it has threads for, however long they take, and keeps them."""

from __future__ import annotations

import os

_VARIABLE = "MODELQUEUE_TEST_AHEAD"


def claimed_ahead(count: int) -> dict[str, str]:
    """What the environment of such a worker says."""
    return {_VARIABLE: str(count)}


def install() -> None:
    """Let the processes of this worker do so, if its environment says so."""
    if count := int(os.environ.get(_VARIABLE, "0")):
        from modelqueue.worker import slots, threads

        slots.Lane.ahead = property(  # type: ignore[assignment, method-assign]
            lambda lane: count if lane._may_be_ahead else 0, lambda lane, value: None
        )
        threads._LONGEST_WAIT = 3600.0
