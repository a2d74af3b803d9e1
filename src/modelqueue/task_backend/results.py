"""Results: what a row says, in the words of a task API."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import re
from typing import Any

from django.utils.module_loading import import_string

from modelqueue.status import State, Status, priority_to_datetime
from modelqueue.task_backend import apis
from modelqueue.task_backend.models import QueuedTask
from modelqueue.task_backend.policies import by_task
from modelqueue.task_backend.times import of_project

__all__ = ["READY", "STATES", "forget_senders", "found_task", "result_of", "sender_of", "succeeded"]

#: How a traceback begins, also that of a group of exceptions.
_TRACEBACK = re.compile(r"^(  \+ Exception Group )?Traceback \(most recent call last\):", re.MULTILINE)
#: A return value that is not JSON is a TypeError to Django, which a project may ask for.
_TOLD_AS = {"modelqueue.task_backend.execution.ReturnValueError": "builtins.TypeError"}
READY = "READY"
#: How the task APIs call a state; a number of none is READY, too.
STATES = {
    State.created: READY,
    State.waiting: READY,
    State.working: "RUNNING",
    State.finished: "SUCCESSFUL",
    State.canceled: "FAILED",
}


def found_task(row: QueuedTask) -> Any:
    """Return the task of a row, imported by its path, with the options that it was enqueued with.

    Raises:
        ImportError: there is no task of that path.
    """
    task = declared_task(row.function)
    return by_task(_with_options, task, row.task_priority, row.queue_name, row.run_after, row.backend_name)


def declared_task(path: str) -> Any:
    """Return the task of a path; nothing else that a row may name is ever called.

    Raises:
        ImportError: there is no task of that path.
    """
    try:
        found = import_string(path)
    except (Exception, SystemExit) as error:  # whatever its module raises
        why = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ImportError(
            f"The task {path} can not be imported: {why}. It was renamed, moved or removed, perhaps, since "
            "it was enqueued. Bring it back under that name, and retry the task."
        ) from error
    if apis.api_of(found) is None:
        raise ImportError(
            f"{path} is no task, but {type(found).__name__}, so it is not called. Decorate it with @task."
        )
    return found


@functools.lru_cache(maxsize=1000)
def _with_options(
    task: Any, priority: int, queue_name: str, run_after: dt.datetime | None, backend: str
) -> Any:
    # To make one is to check it, which takes longer than all else of a short task.
    options = {"priority": priority, "queue_name": queue_name, "run_after": run_after, "backend": backend}
    api: Any = apis.api_of(task)
    try:
        return task.using(**options)
    except (api.InvalidTask, api.InvalidTaskBackend):
        # The setting has no such queue or backend any more, and the result is there all the same. By hand,
        # as copy.copy() checks it like the first one, from Django 6.1 on.
        made = object.__new__(type(task))
        for field in dataclasses.fields(task):
            object.__setattr__(made, field.name, options.get(field.name, getattr(task, field.name)))
        return made


def sender_of(task: Any) -> Any:
    """Return who the signals about a task are sent by: the class of its backend."""
    return by_task(_sender_of, task)


@functools.lru_cache(maxsize=1000)
def _sender_of(task: Any) -> Any:
    return type(task.get_backend())


def forget_senders() -> None:
    """Ask the backends anew, as the setting TASKS has changed."""
    _sender_of.cache_clear()


def result_of(row: QueuedTask, task: Any) -> Any:
    """Return the result of a row.

    Args:
        task: what it is a call of, see `found_task`.
    """
    api: Any = apis.api_of(task)
    status = row.status or Status(0)
    failures = list(row.failures or [])
    has_last_attempt = row.has_last_attempt
    if not has_last_attempt and row.has_unrecorded_attempt:
        failures.append(row.failure(row.worker, row.last_attempted_at))
    began = [_moment(failure["began"]) for failure in failures]
    workers = [failure["worker"] for failure in failures]
    if has_last_attempt:
        began.append(row.last_attempted_at)
        workers.append(row.worker)
    result = api.TaskResult(
        task=task,
        id=row.result_id,
        status=api.TaskResultStatus[STATES.get(status.state, READY)],
        enqueued_at=row.enqueued_at,
        started_at=next(iter(began), None),
        last_attempted_at=began[-1] if began else None,
        finished_at=_finished_at(status),
        args=row.arguments["args"],
        kwargs=row.arguments["kwargs"],
        backend=row.backend_name,
        errors=[api.TaskError(**_error(failure["error"])) for failure in failures],
        worker_ids=workers,
    )
    object.__setattr__(result, "_return_value", row.return_value)
    return result


def succeeded(result: Any, row: QueuedTask) -> None:
    """Let the result of an attempt that has begun tell that it has succeeded."""
    api: Any = apis.api_of(result.task)
    object.__setattr__(result, "status", api.TaskResultStatus.SUCCESSFUL)
    object.__setattr__(result, "finished_at", _finished_at(row.status or Status(0)))
    object.__setattr__(result, "_return_value", row.return_value)


def _error(text: str) -> dict[str, str]:
    """Return the parts of an error: `modelqueue.outcomes.error_text` puts class and message first."""
    found, path = _TRACEBACK.search(text), text.partition("\n")[0].partition(":")[0]
    return {
        "exception_class_path": _TOLD_AS.get(path, path),
        "traceback": text.strip("\n") if found is None else f"{text[found.start() :].rstrip()}\n",
    }


def _finished_at(status: Status) -> dt.datetime | None:
    if status.state not in (State.finished, State.canceled):
        return None
    return of_project(priority_to_datetime(status.priority))


def _moment(text: str | None) -> dt.datetime | None:
    return None if text is None else of_project(dt.datetime.fromisoformat(text))
