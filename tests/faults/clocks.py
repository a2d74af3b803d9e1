"""A worker whose machine has a wrong clock: all that the library reads of it is off by so many seconds."""

from __future__ import annotations

import datetime as dt
import os
import time
import types

from modelqueue import clock
from modelqueue.engines import sessions

_VARIABLE = "MODELQUEUE_TEST_CLOCK"


def off_by(seconds: float) -> dict[str, str]:
    """What the environment of such a worker says."""
    return {_VARIABLE: str(seconds)}


def install() -> None:
    """Let the clock of this process be wrong, if its environment says so."""
    seconds = float(os.environ.get(_VARIABLE, "0"))
    if not seconds:
        return
    right = time.time

    class Wrong(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:  # type: ignore[override]
            return dt.datetime.fromtimestamp(right() + seconds, tz)

    time.time = lambda: right() + seconds
    clock.dt = sessions.dt = types.SimpleNamespace(**{**vars(dt), "datetime": Wrong})
