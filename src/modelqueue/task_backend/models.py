"""The tasks of Django's task API: rows of an ordinary ModelQueue."""

from __future__ import annotations

import datetime as dt
from typing import Any, NamedTuple

from django.db import models
from django.utils.translation import gettext_lazy as _

from modelqueue.fields import ErrorField, StatusField
from modelqueue.status import State
from modelqueue.task_backend.backend import LONGEST_ID, LONGEST_NAME, LONGEST_PATH

__all__ = ["QueuedTask", "Started"]


class Started(NamedTuple):
    """What was told of an attempt when it began, and by which API: to make it anew takes its time."""

    result: Any
    sender: Any
    api: Any


class QueuedTask(models.Model):
    """One call of a task, from its enqueueing until it is pruned.

    Its attempts: those that have failed stand in `failures`. The last one, if it is not among them, is that
    of `worker`: it is under way, or has succeeded; or its error, that of its worker's death for example, is
    in `error`, and moves to `failures` with what comes next.
    """

    #: Of the instance that an attempt is made with.
    started: Started | None = None

    id = models.BigAutoField(primary_key=True)
    result_id = models.CharField(_("id"), max_length=LONGEST_ID, editable=False)
    status = StatusField(_("status"), db_index=False)
    backend_name = models.CharField(_("backend"), max_length=LONGEST_NAME)
    queue_name = models.CharField(_("queue"), max_length=LONGEST_NAME)
    function = models.CharField(_("function"), max_length=LONGEST_PATH)
    arguments = models.JSONField(_("arguments"), default=dict)
    task_priority = models.SmallIntegerField(_("task priority"), default=0)
    retry = models.SmallIntegerField(_("retries"), null=True, blank=True)
    run_after = models.DateTimeField(_("run after"), null=True, blank=True)
    enqueued_at = models.DateTimeField(_("enqueued"))
    last_attempted_at = models.DateTimeField(_("last attempt"), null=True, blank=True)
    worker = models.CharField(_("worker"), max_length=64, blank=True, default="")
    failures = models.JSONField(_("failed attempts"), null=True, blank=True)
    error = ErrorField(_("last error"))
    return_value = models.JSONField(_("return value"), null=True, blank=True)

    class Meta:
        app_label = "modelqueue_tasks"  # so that the table that is missing has its name, where the app is
        verbose_name = _("task")
        verbose_name_plural = _("tasks")
        constraints = [models.UniqueConstraint(fields=["result_id"], name="modelqueue_task_id")]
        # Serve the claims of each queue: its waiting tasks in the order in which they run. The second is for
        # a backend whose QUEUES is empty, which has one queue of all names. With the key at the end, as all
        # that are deferred to one moment have one number: PostgreSQL would sort them for each claim.
        indexes = [
            models.Index(fields=["backend_name", "queue_name", "status", "id"], name="modelqueue_task_queue"),
            models.Index(fields=["backend_name", "status", "id"], name="modelqueue_task_backend"),
        ]

    def __str__(self) -> str:
        return f"{self.function} {self.result_id}"

    @property
    def has_unrecorded_attempt(self) -> bool:
        """Whether the last attempt has failed, and does not stand in `failures` yet."""
        if not self.worker or self.status is None or self.is_recorded:
            return False
        is_over = self.status.state == State.canceled
        return is_over or (self.status.state == State.waiting and bool(self.error))

    @property
    def has_last_attempt(self) -> bool:
        """Whether `worker` is running it, or has done so with success."""
        has_one = self.status is not None and self.status.state in (State.working, State.finished)
        return has_one and bool(self.worker)

    @property
    def is_recorded(self) -> bool:
        """Whether the attempt of `worker` stands in `failures`."""
        return self._is_last_failure(self.worker, self.last_attempted_at)

    def _is_last_failure(self, worker: str, began: Any) -> bool:
        last = self.failures[-1] if self.failures else {}
        return bool(last) and (last["worker"], last["began"]) == (worker, _iso(began))

    def failures_with(self, worker: str, began: Any) -> list[dict[str, Any]]:
        """Return what is to stand in `failures` when the attempt whose error is in `error` is noted."""
        so_far = list(self.failures or [])
        return so_far if self._is_last_failure(worker, began) else [*so_far, self.failure(worker, began)]

    def failure(self, worker: str, began: Any) -> dict[str, Any]:
        """Return what stands in `failures` for the attempt whose error is in `error`."""
        return {
            "worker": worker,
            "began": _iso(began),
            "error": self.error or "modelqueue.exceptions.Cancel: canceled while it ran",
        }


def _iso(moment: dt.datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
