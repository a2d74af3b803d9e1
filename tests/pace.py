"""How long something may take. What is promised is asserted as it is where a test runs alone."""

from __future__ import annotations

import os

#: Eight processes of pytest on two processors each get a quarter of one, and what they start gets less.
_OTHERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1
_LONGER = 4


def within(seconds: float) -> float:
    """So many seconds, or four times as many beside other tests: these take their time from this one.

    To see the promise itself held: ``--numprocesses=0``.
    """
    return seconds * _LONGER if _OTHERS else seconds
