"""Running a task: what the ordinary worker calls for each row, and what is done around it."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import os
import socket
from collections.abc import Coroutine, Mapping
from inspect import iscoroutinefunction
from typing import Any

from django.db import DEFAULT_DB_ALIAS, connections

from modelqueue.clock import now
from modelqueue.engines import Change, engine_for
from modelqueue.queues import Queue
from modelqueue.status import Status
from modelqueue.task_backend import apis, priorities
from modelqueue.task_backend.json_values import as_json
from modelqueue.task_backend.models import QueuedTask, Started
from modelqueue.task_backend.policies import options_of
from modelqueue.task_backend.results import declared_task, found_task, result_of, sender_of
from modelqueue.task_backend.times import of_project
from modelqueue.threads import await_with_own_thread, run_coroutine

__all__ = [
    "ReturnValueError",
    "claim_values",
    "execute",
    "next_priority",
    "promote",
    "task_options",
    "worker_id",
]

logger = logging.getLogger("modelqueue")

#: Deferred tasks that are promoted at a time.
_BATCH = 1000


class ReturnValueError(TypeError):
    """What a function returned is not JSON. Another attempt would do all of it again, for the same."""


def execute(row: QueuedTask) -> None:
    """Run the task of a row: the action of its queue."""
    task = found_task(row)
    api: Any = apis.api_of(task)
    result, sender = result_of(row, task), sender_of(task)
    api.signals.task_started.send(sender, task_result=result)
    row.started = Started(result, sender, api)
    args = list(result.args)
    if task.takes_context:
        args.insert(0, api.TaskContext(task_result=result))
    try:
        value = _call(task, args, result.kwargs, row)
    except asyncio.CancelledError as error:
        # Of something that the function awaits: nobody else cancels here. As it is, it would mean that the
        # attempt was ended from outside, and is made again for nothing, and for ever.
        raise RuntimeError("The function ended with asyncio.CancelledError, of its own.") from error
    if value is not None:
        try:
            row.return_value = as_json(api, value, row._state.db or DEFAULT_DB_ALIAS)
        except (TypeError, ValueError) as error:
            raise ReturnValueError(f"{row.function} returned what is not JSON: {error}.") from error


def _call(task: Any, args: list[Any], kwargs: dict[str, Any], row: QueuedTask) -> Any:
    using = row._state.db or DEFAULT_DB_ALIAS
    if not iscoroutinefunction(task.func) or connections[using].in_atomic_block:
        return task.call(*args, **kwargs)  # that of a test: it sees what is in its transaction alone
    return run_coroutine(_await(task.acall(*args, **kwargs)))


async def _await(coroutine: Coroutine[Any, Any, Any]) -> Any:
    value, canceled = await await_with_own_thread(coroutine, lambda value: value)
    if canceled is not None:
        raise canceled
    return value


def worker_id() -> str:
    """Return what a result calls the process that has made an attempt."""
    return f"{socket.gethostname()[:50]}:{os.getpid()}"


def claim_values() -> dict[str, object]:
    """Return what a claim sets: an attempt begins with it."""
    return {"worker": worker_id(), "last_attempted_at": of_project(now())}


def task_options(row: QueuedTask) -> Mapping[str, object]:
    """Return what the code says of a task, but `retry`: how often it is tried stands in its row."""
    try:
        task = declared_task(row.function)
    except ImportError:  # which its attempt will fail with
        return {}
    options = options_of(task)
    return options if "retry" not in options else {n: v for n, v in options.items() if n != "retry"}


def next_priority(row: QueuedTask, at: dt.datetime) -> int | dt.datetime:
    """Return under which priority a task waits for its next attempt: its own, when that may be made."""
    return priorities.next_priority(row.task_priority, at, now())


def promote(queue: Queue[QueuedTask]) -> int:
    """Bring deferred tasks whose time has come into the bands of their priorities; return how many."""
    source = queue.source()
    first = Status.waiting(priorities.FIRST_DEFERRED)
    due = source.due(now(), int(first)).values_list("pk", "status", "task_priority")
    count = 0
    while rows := list(due[:_BATCH]):
        changes = [
            Change(pk, frozenset({status}), priorities.promoted(status, priority))
            for pk, status, priority in rows
        ]
        promoted = len(engine_for(source.using).set_statuses(source, changes))
        count += promoted
        if len(rows) < _BATCH or not promoted:  # somebody has locked the others, or was quicker
            break
    return count
