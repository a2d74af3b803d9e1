"""Connection pools that are too small for a worker: an action would wait for a connection, and then fail."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.db import connections

from modelqueue.queues import Queue
from modelqueue.worker.options import ASYNC_SLOTS, Options

__all__ = ["too_small_pools"]

#: Of each process: for its claims, its outcomes and its renewals.
_OWN = 3
#: That of psycopg_pool where nothing is said.
_DEFAULT_SIZE = 4


def too_small_pools(queues: Iterable[Queue[Any]], options: Options) -> list[str]:
    """Return what to say of each database whose pool, one in each process, has too few connections."""
    needed: dict[str, int] = {}
    for queue in queues:
        slots = (queue.slots or ASYNC_SLOTS) if queue.is_async else 0
        try:
            using = queue.using
        except Exception:  # noqa: S112  (of the callable that makes its queryset, which the prober tells)
            continue
        needed[using] = needed.get(using, _OWN + options.threads) + slots
    found = []
    for using, number in needed.items():
        size = _size(connections[using].settings_dict["OPTIONS"].get("pool"))
        if size is not None and size < number:
            found.append(
                f"The pool of the database {using!r} gives a process {size} connections. Where all actions "
                f"use the database it takes {number}, and an action that gets none fails. Set max_size of "
                f"the pool to {number}, or give fewer --threads, or the async queues fewer slots."
            )
    return found


def _size(pool: object) -> int | None:
    """Return how many connections the setting of a pool allows; None: there is no pool, or no limit."""
    if not pool:
        return None
    sizes = pool if isinstance(pool, dict) else {}
    return sizes.get("max_size") or sizes.get("min_size") or _DEFAULT_SIZE
