"""Workers name their sessions, for who looks at the server, and for ``manage.py modelqueue doctor``."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from modelqueue.engines import engine_for
from modelqueue.queues import Queue

__all__ = ["name_sessions"]


def name_sessions(version: str, queues: Iterable[Queue[Any]]) -> None:
    """Name what this process opens from now on to the databases of these queues, if nobody else has."""
    for queue in queues if version else ():
        with suppress(Exception):  # of the callable that makes its queryset, which the prober tells
            engine_for(queue.using).name_sessions(version)
