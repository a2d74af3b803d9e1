"""What the kill matrix kills workers of: the tasks of a plain queue, or Django tasks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from django.db import models
from django.test import override_settings

from modelqueue import Status
from tests.testapp.models import Errand, Ledger


class Target:
    """A kind of tasks; each writes down in the ledger that it is run."""

    #: The queues that a worker serves, none: all; and what its environment says.
    queues: tuple[str, ...] = ()
    variables: dict[str, str] = {}

    def serving(self) -> AbstractContextManager[object]:
        """Return what is to be around all else."""
        return nullcontext()

    def seconds_of_lease(self) -> float:
        raise NotImplementedError

    def make(self, *titles: str) -> list[Any]:
        """Enqueue tasks that do what their titles say; return their rows, the first to run first."""
        raise NotImplementedError

    def check(self, tasks: list[Any]) -> None:
        """See that tasks which are finished tell so themselves."""


class Errands(Target):
    def __str__(self) -> str:
        return "plain queue"

    def seconds_of_lease(self) -> float:
        from tests.testapp.queues import do_errand

        return do_errand.recovery().lease.total_seconds()

    def make(self, *titles: str) -> list[Any]:
        return [
            Errand.objects.create(title=title, status=Status.waiting(number))
            for number, title in enumerate(titles)
        ]


class DjangoTasks(Target):
    queues = ("default",)  # alone, so that its first claim takes a task for each thread

    def __str__(self) -> str:
        return "Django tasks"

    def __init__(self) -> None:
        from tests.task_backend.serving import VARIABLES

        self.variables = VARIABLES

    def serving(self) -> AbstractContextManager[object]:
        from tests.task_backend.serving import SERVED

        return override_settings(TASKS=SERVED)

    def seconds_of_lease(self) -> float:
        from modelqueue.task_backend.queues import task_queues

        return max(queue.recovery().lease.total_seconds() for queue in task_queues())

    def make(self, *titles: str) -> list[Any]:
        from tests.task_backend.deeds import do

        backend: Any = do.get_backend()
        results = backend.enqueue_many(
            [(do.using(priority=-number), [title], {}) for number, title in enumerate(titles)]
        )
        return [_row(result.id) for result in results]

    def check(self, tasks: list[Any]) -> None:
        """Each attempt that was counted stands in the result, and all but the last one have an error."""
        from tests.task_backend.deeds import do

        backend: Any = do.get_backend()
        for task in tasks:
            task.refresh_from_db()
            result = backend.get_result(task.result_id)
            assert result.status.name == "SUCCESSFUL"
            assert result.return_value == "did "
            assert result.attempts == task.status.attempts == len(result.errors) + 1
            assert result.started_at <= result.last_attempted_at <= result.finished_at
            last = Ledger.objects.filter(task=task.pk).latest("pk")
            assert result.worker_ids[-1].rpartition(":")[2] == last.worker


def _row(result_id: str) -> models.Model:
    from modelqueue.task_backend.models import QueuedTask

    return QueuedTask.objects.get(result_id=result_id)
