"""What is told of tasks in the words of their API, once it is committed."""

from __future__ import annotations

import logging
from typing import Any

from django.db import models

from modelqueue import signals
from modelqueue.status import State, Status
from modelqueue.task_backend import apis
from modelqueue.task_backend.models import QueuedTask
from modelqueue.task_backend.results import found_task, result_of, sender_of, succeeded

__all__ = ["connect", "record_canceled"]


def connect() -> None:
    """Follow the tasks of the backends."""
    signals.task_claimed.connect(_claimed, sender=QueuedTask, dispatch_uid="modelqueue_tasks")
    signals.task_finished.connect(_attempt_ended, sender=QueuedTask, dispatch_uid="modelqueue_tasks")
    signals.task_recovered.connect(_attempt_ended, sender=QueuedTask, dispatch_uid="modelqueue_tasks")
    signals.lease_lost.connect(_attempt_dropped, sender=QueuedTask, dispatch_uid="modelqueue_tasks")


def _claimed(
    sender: type[QueuedTask], using: str, task: QueuedTask, before: dict[str, Any] | None, **kwargs: Any
) -> None:
    """Note what the last attempt has ended with, where nobody has: it has just failed, or its worker died.

    Not in the transaction of an atomic task, which may be rolled back.
    """
    if before and before.get("worker") and task.error:
        failures = task.failures_with(before["worker"], before.get("last_attempted_at"))
        # Not if this attempt was taken back before it began: then others have noted it, and their own.
        mine = {"worker": task.worker, "last_attempted_at": task.last_attempted_at, "error": task.error}
        if _rows(using, task.pk).filter(**mine).update(failures=failures, error=""):
            # Which is no change of the action's.
            task.refresh_from_db(using=using, fields=["failures", "error"])


def _attempt_ended(
    sender: type[QueuedTask],
    pk: Any,
    using: str,
    status: Status | None,
    error: BaseException | None = None,
    task: QueuedTask | None = None,
    **kwargs: Any,
) -> None:
    """Tell that a task has ended; of one that waits for another attempt note what this one has ended with."""
    if status is None:
        return
    if status.state == State.finished and task is not None and (started := task.started) is not None:
        succeeded(started.result, task)
        started.api.signals.task_finished.send(started.sender, task_result=started.result)
    elif status.state == State.finished and task is not None:
        _tell_finished(task, error)
    elif status.state in (State.finished, State.canceled):
        if (row := _rows(using, pk).first()) is not None:
            if row.status == status:  # at once, as its retry may be claimed by a worker that dies soon
                _record(row, using)
            row.status = status  # what has come of it since, it was retried perhaps, is told in its turn
            _tell_finished(row, error)
    elif status.state == State.waiting and (error is not None or task is None):
        _record(_rows(using, pk).filter(status=status).first(), using)


def _attempt_dropped(
    sender: type[QueuedTask],
    pk: Any,
    using: str,
    status: Status | None,
    task: QueuedTask | None = None,
    **kwargs: Any,
) -> None:
    """Of a task that was canceled while it ran note this attempt, and tell that it has ended.

    One that was recovered, and then canceled as its last attempt was over, has the error of that.
    """
    if status is None or status.state not in (State.canceled, State.waiting):
        return
    rows = _rows(using, pk).filter(status=status, error="")
    if status.state == State.waiting:  # retried since; but not claimed, as that sets another worker
        if task is not None and status.attempts == 0:
            rows = rows.filter(worker=task.worker, last_attempted_at=task.last_attempted_at)
            if (row := rows.first()) is not None:
                _note_failure(row, using)
    elif (row := rows.first()) is not None:
        _record(row, using)
        _tell_finished(row, None)


def _rows(using: str, pk: Any) -> models.QuerySet[QueuedTask]:
    return QueuedTask.objects.using(using).filter(pk=pk)


def record_canceled(rows: models.QuerySet[QueuedTask]) -> None:
    """Note the attempts in which tasks have been canceled, before somebody retries them."""
    for row in rows.filter(status__state="canceled", error="").exclude(worker=""):
        _record(row, rows.db)


def _record(row: QueuedTask | None, using: str) -> None:
    """Note what the last attempt of a task has ended with; one that asked for another, by Retry, is none."""
    if row is None or not row.worker:
        return
    if row.has_unrecorded_attempt:
        _note_failure(row, using)
    elif not row.is_recorded and row.status is not None and row.status.state == State.waiting:
        _as_read(row, using).update(worker="")


def _note_failure(row: QueuedTask, using: str) -> None:
    values: dict[str, Any] = {"failures": row.failures_with(row.worker, row.last_attempted_at)}
    # The error of one that has failed for good stays in sight; with its worker it is not noted twice.
    if row.status is not None and row.status.state == State.waiting:
        values |= {"worker": "", "error": ""}
    _as_read(row, using).update(**values)


def _as_read(row: QueuedTask, using: str) -> models.QuerySet[QueuedTask]:
    """Return the row if it is as it was read: one that is claimed again is left to who has claimed it."""
    return _rows(using, row.pk).filter(status=row.status, worker=row.worker)


def _tell_finished(row: QueuedTask, error: BaseException | None) -> None:
    try:
        task = found_task(row)
    except ImportError as gone:
        logging.getLogger(apis.default().package).error(
            "Task id=%s path=%s state=FAILED: %s", row.result_id, row.function, gone
        )
        return
    api: Any = apis.api_of(task)
    sender, result = sender_of(task), result_of(row, task)
    if error is None:
        api.signals.task_finished.send(sender, task_result=result)
        return
    try:
        raise error
    except BaseException:  # Django's own receiver logs the exception that is being handled
        api.signals.task_finished.send(sender, task_result=result)
