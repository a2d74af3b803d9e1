"""Moving in from django-tasks-db: its rows become ours, those that wait included.

A row of theirs is deleted in the transaction in which ours is added, while it is locked. So each is in one of
the two tables at any time: a worker of django-tasks-db that still runs takes a row or finds it gone, and who
was stopped in the middle goes on with what is left.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from django.apps import apps as installed
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import models, router
from django.db.models.functions import Length

from modelqueue.clock import now
from modelqueue.engines import engine_for
from modelqueue.status import State, Status, datetime_to_int
from modelqueue.task_backend import apis
from modelqueue.task_backend.backend import LONGEST_PATH, ModelQueueBackend
from modelqueue.task_backend.models import QueuedTask
from modelqueue.task_backend.policies import options_of
from modelqueue.task_backend.priorities import next_priority
from modelqueue.task_backend.results import declared_task
from modelqueue.task_backend.times import aware

__all__ = ["MOST_ROWS", "Batch", "MovingIn"]

APP = "django_tasks_db"
READY, RUNNING, SUCCESSFUL, FAILED = "READY", "RUNNING", "SUCCESSFUL", "FAILED"
#: Rows of one transaction, at most.
MOST_ROWS = 400
#: Keys that are read at once: their table has no index for the order, so each time all of it is read.
_PAGE = 20_000
#: Their ``run_after`` of a task that is not deferred.
_NOT_DEFERRED = dt.datetime(9999, 1, 1)  # noqa: DTZ001  (as any zone may show it)
#: Who has made an attempt of which older versions of django-tasks-db have not noted the worker.
_UNKNOWN_WORKER = "unknown"
#: What stands in place of an error that nobody has noted.
_LOST = "modelqueue.exceptions.WorkerDied: django-tasks-db has not noted how this attempt ended"


@dataclass
class Batch:
    """What has become of some rows."""

    moved: Counter[State] = field(default_factory=Counter)
    """How many are ours now, by their state."""
    known: int = 0
    """How many were left alone, as there is a task with that id already."""

    def __iadd__(self, other: Batch) -> Batch:
        self.moved += other.moved
        self.known += other.known
        return self


class MovingIn:
    """Takes over the rows of django-tasks-db.

    Args:
        aliases: of backends of theirs, which have another one here: ``{"old": "new"}``.
        running: take over also what is running, to be run once more: for workers that are gone.

    Raises:
        ImproperlyConfigured: there is no django-tasks-db in this project, or its rows are referred to.
        ValueError: `aliases` names a backend that is none of ours.
    """

    def __init__(self, aliases: Mapping[str, str] | None = None, running: bool = False) -> None:
        self._model = _their_model()
        self._aliases = dict(aliases or {})
        self._running = running
        self._backends = _our_backends()
        self._retries: dict[str, Any] = {}
        self.using = router.db_for_write(self._model)
        for old, new in self._aliases.items():
            if new not in self._backends:
                raise ValueError(
                    f"{old}={new}: TASKS has no backend {new!r} of ModelQueue. {_there_are(self._backends)}"
                )

    def check(self) -> None:
        """Find out whether all rows can be moved in; nothing is written.

        Raises:
            ImproperlyConfigured: some can not, and what to do about it.
        """
        names = self._movable().values_list("backend_name", "queue_name").distinct()
        problems = [self._problem_of(*one) for one in sorted(names)]
        problems.append(self._problem_of_paths())
        if found := dict.fromkeys(filter(None, problems)):
            raise ImproperlyConfigured("\n".join(found))

    def count(self) -> Counter[State]:
        """Return how many rows are to be moved in, by the state that they will have."""
        counts: Counter[State] = Counter()
        for status, count in self._statuses():
            if status in self._wanted:
                counts[_STATES[status]] += count
        return counts

    def left(self) -> Counter[str]:
        """Return how many rows there are, by their status in the words of django-tasks-db."""
        return Counter(dict(self._statuses()))

    def move(self, batch: int = MOST_ROWS) -> Iterator[Batch]:
        """Move rows in, in batches of a transaction each: those that wait first, in the order of enqueueing.

        Those that somebody has locked are passed over.

        Args:
            batch: how many rows to move in one transaction, 1 to `MOST_ROWS`.

        Yields:
            After each batch what has become of it.
        """
        engine = engine_for(self.using)
        for statuses in ({READY, RUNNING}, {SUCCESSFUL, FAILED}):
            rows = self._movable().filter(status__in=sorted(statuses & set(self._wanted)))
            for keys in self._keys(rows, batch):
                yield engine.patiently(partial(self._move, rows.filter(pk__in=keys)), reconnect=True)
                engine.give_way()

    # Their rows

    @property
    def _wanted(self) -> list[str]:
        return [status for status in _STATES if status != RUNNING or self._running]

    def _all(self) -> models.QuerySet[Any]:
        return self._model._base_manager.using(self.using).order_by()

    def _movable(self) -> models.QuerySet[Any]:
        return self._all().filter(status__in=self._wanted)

    def _statuses(self) -> list[tuple[str, int]]:
        return list(self._all().values_list("status").annotate(models.Count("pk")))

    def _keys(self, rows: models.QuerySet[Any], size: int) -> Iterator[list[Any]]:
        """Yield the keys of rows in the order of their enqueueing, so many at a time."""
        engine = engine_for(self.using)

        def read(behind: models.Q) -> list[tuple[Any, Any]]:
            ordered = rows.filter(behind).order_by("enqueued_at", "pk")
            return list(ordered.values_list("enqueued_at", "pk")[:_PAGE])

        page = engine.patiently(partial(read, models.Q()), reconnect=True)
        while page:
            for start in range(0, len(page), size):
                yield [pk for _, pk in page[start : start + size]]
            # On from the last one, as those that were passed over are still there, however many they are.
            moment, pk = page[-1]
            behind = models.Q(enqueued_at__gt=moment) | models.Q(enqueued_at=moment, pk__gt=pk)
            page = engine.patiently(partial(read, behind), reconnect=True)

    # What they become

    def _move(self, rows: models.QuerySet[Any]) -> Batch:
        engine, ours = engine_for(self.using), QueuedTask.objects.using(self.using)
        with engine.transaction():
            engine.take_write_lock(QueuedTask._meta.get_field("status"))
            # What a worker has claimed meanwhile has another status by now, and is none of `rows`.
            locked = rows.select_for_update(skip_locked=engine.passes_over_locked_rows)
            free = {str(row.pk): row for row in locked.order_by("enqueued_at", "pk")}
            known = set(ours.filter(result_id__in=free).values_list("result_id", flat=True))
            taken = {key: row for key, row in free.items() if key not in known}
            moment = now()
            made = [self._made_of(key, row, moment) for key, row in taken.items()]
            ours.bulk_create(made)
            deleted, _ = rows.filter(pk__in=[row.pk for row in taken.values()]).delete()
            if deleted != len(made):  # on a database without locks of rows
                raise RuntimeError(
                    f"Of {len(made)} rows of django-tasks-db that were moved in {len(made) - deleted} were "
                    "changed by somebody else meanwhile. This batch was rolled back. Run the command again."
                )
        return Batch(Counter(_STATES[row.status] for row in taken.values()), len(known))

    def _made_of(self, result_id: str, row: Any, moment: dt.datetime) -> QueuedTask:
        alias = self._aliases.get(row.backend_name, row.backend_name)
        run_after = None if row.run_after.replace(tzinfo=None) == _NOT_DEFERRED else row.run_after
        made = QueuedTask(
            result_id=result_id,
            backend_name=alias,
            queue_name=row.queue_name,
            function=row.task_path,
            arguments=row.args_kwargs,
            task_priority=row.priority,
            retry=self._retry_of(alias, row.task_path),
            run_after=run_after,
            enqueued_at=row.enqueued_at,
            return_value=row.return_value,
        )
        workers = list(row.worker_ids)
        if not workers and row.status != READY:
            workers = [_UNKNOWN_WORKER]
        attempts = min(len(workers), Status.max_attempts)
        if row.status in (READY, RUNNING):
            at = aware(run_after or row.enqueued_at)
            made.status = Status.waiting(next_priority(row.priority, at, moment), attempts)
        else:
            made.worker, made.last_attempted_at = workers.pop(), row.started_at
            ended = aware(row.finished_at or row.started_at or row.enqueued_at)
            made.status = Status.combine(_STATES[row.status], datetime_to_int(ended), attempts)
        if row.status == FAILED:
            made.error = f"{_first_line(row.exception_class_path, row.traceback)}\n{row.traceback}"
        began = None if row.started_at is None else row.started_at.isoformat()
        made.failures = [{"worker": worker, "began": began, "error": _LOST} for worker in workers]
        return made

    def _retry_of(self, alias: str, path: str) -> int | None:
        """Return how often a task is retried: as the code says of it, or else its backend."""
        if path not in self._retries:
            try:
                self._retries[path] = options_of(declared_task(path))
            except Exception:  # which its attempt will fail with
                self._retries[path] = {}
        retry: int | None = self._retries[path].get("retry", self._backends[alias].parsed.retry)
        return retry

    # What can be wrong

    def _problem_of(self, name: str, queue: str) -> str | None:
        alias = self._aliases.get(name, name)
        backend = self._backends.get(alias)
        if backend is None:
            return (
                f"django-tasks-db has rows of the backend {name!r}, and TASKS has no backend {alias!r} of "
                f"ModelQueue. {_there_are(self._backends)} Set it up there, or say whose these rows become: "
                f"--backend {name}=ALIAS."
            )
        if backend.database != self.using:
            return (
                f"The rows of django-tasks-db are in the database {self.using!r}, and those of "
                f"TASKS[{alias!r}] in {backend.database!r}. They can be moved in within one database only, "
                "as that takes one transaction. Let OPTIONS['database'] and your routers name the same one."
            )
        if backend.queues and queue not in backend.queues:
            return (
                f"django-tasks-db has rows in the queue {queue!r} of the backend {name!r}, and "
                f"TASKS[{alias!r}]['QUEUES'] has only {', '.join(sorted(backend.queues))}. Nobody would run "
                f"them. Put {queue!r} there."
            )
        return None

    def _problem_of_paths(self) -> str | None:
        long = self._movable().annotate(length=Length("task_path")).filter(length__gt=LONGEST_PATH)
        path = long.values_list("task_path", flat=True).first()
        if path is None:
            return None
        return f"The path of the task {path!r} is longer than {LONGEST_PATH} characters. Delete its rows."


_STATES = {
    READY: State.waiting,
    RUNNING: State.waiting,
    SUCCESSFUL: State.finished,
    FAILED: State.canceled,
}


def _their_model() -> type[models.Model]:
    try:
        model = installed.get_app_config("django_tasks_database").get_model("DBTaskResult")
    except LookupError as error:
        raise ImproperlyConfigured(
            f"There is no app {APP!r} in INSTALLED_APPS, so its rows can not be read. "
            f"Install django-tasks-db, and put {APP!r} there until all rows are moved in."
        ) from error
    if referring := [relation.related_model._meta.label for relation in model._meta.related_objects]:
        raise ImproperlyConfigured(
            f"{', '.join(sorted(referring))} has a foreign key to the rows of django-tasks-db, which are "
            "deleted when they are moved in. Keep the id of the result in a field of text instead: it stays "
            "the same."
        )
    return model


def _our_backends() -> dict[str, Any]:
    backends = import_module(apis.default().package).task_backends
    built = {alias: backends[alias] for alias in getattr(settings, "TASKS", {})}
    return {alias: one for alias, one in built.items() if isinstance(one, ModelQueueBackend)}


def _there_are(backends: Mapping[str, Any]) -> str:
    return f"It has: {', '.join(backends)}." if backends else "It has none at all."


def _first_line(path: str, traceback: str) -> str:
    """Return what an `ErrorField` begins with: ``module.Class: message``."""
    shown = path.removeprefix("builtins.")
    for line in reversed(traceback.splitlines()):
        if line.startswith(f"{shown}: "):
            return path + line.removeprefix(shown)
    return path
