"""The backends: tasks become rows in the transaction of who enqueues them, and rows become results.

Who runs them is the ordinary worker, see `modelqueue.task_backend.queues`.
"""

from __future__ import annotations

import datetime as dt
import functools
import secrets
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from django.apps import apps as installed
from django.core import checks
from django.db import connections, router

from modelqueue.clock import now
from modelqueue.status import Status
from modelqueue.task_backend import apis, policies
from modelqueue.task_backend.insertion import insert
from modelqueue.task_backend.json_values import as_json
from modelqueue.task_backend.options import OPTIONS, Options, backends_of_setting
from modelqueue.task_backend.policies import options_of
from modelqueue.task_backend.priorities import next_priority
from modelqueue.task_backend.times import aware, of_project

if TYPE_CHECKING:
    from django.db import models

    from modelqueue.task_backend.models import QueuedTask

__all__ = ["LONGEST_ID", "LONGEST_NAME", "LONGEST_PATH", "ModelQueueBackend", "backport_backend"]

APP = "modelqueue.task_backend"
LONGEST_ID, LONGEST_NAME, LONGEST_PATH = 64, 100, 500
#: Rows of one INSERT.
_BATCH = 1000

#: A task with its positional and its named arguments, for `enqueue_many`.
Call = tuple[Any, Sequence[Any], Mapping[str, Any]]


class _Backend:
    """What the backends of both APIs share; each is this and the base class of its API."""

    api: apis.Api
    alias: str
    queues: set[str]

    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)  # type: ignore[call-arg]
        for name in set(params) & set(OPTIONS):
            raise self.api.InvalidTaskBackend(
                f"TASKS[{self.alias!r}][{name!r}] has no effect there. Put it into "
                f"TASKS[{self.alias!r}]['OPTIONS']."
            )
        try:
            self.parsed = Options.of(params.get("OPTIONS", {}))
        except (TypeError, ValueError) as error:
            raise self.api.InvalidTaskBackend(f"TASKS[{self.alias!r}]['OPTIONS']: {error}") from error

    def validate_task(self, task: Any) -> None:
        """Raise where a task can not be run by this backend.

        Raises:
            InvalidTask: what is wrong with it.
        """
        super().validate_task(task)  # type: ignore[misc]
        if apis.api_of(task) is not self.api or task.backend != self.alias:
            raise self.api.InvalidTask(
                f"{task.module_path} is a task of the backend {task.backend!r} of {_package_of(task)}, and "
                f"this is {self.alias!r} of {self.api.package}. Enqueue it there, or give "
                f"task.using(backend={self.alias!r})."
            )
        try:
            options_of(task)
        except (TypeError, ValueError) as error:
            raise self.api.InvalidTask(f"{task.module_path}: {error}") from error
        for what, text, longest in (
            ("queue", task.queue_name, LONGEST_NAME),
            ("function", task.module_path, LONGEST_PATH),
        ):
            if len(text) > longest:
                raise self.api.InvalidTask(
                    f"The name of the {what} {text!r} is longer than {longest} characters."
                )

    # Enqueue

    def enqueue(self, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Add a task, in the transaction of the caller: it runs when that is committed, or never.

        Returns:
            Its result.

        Raises:
            InvalidTask: it can not be run by this backend.
            TypeError: an argument is nothing that JSON has.
        """
        row = self._row(task, args, kwargs)
        insert(row, self.database)
        return self._told(row, task)

    def enqueue_many(self, calls: Iterable[Call]) -> list[Any]:
        """Add many tasks at once: by few statements, all or none.

        Args:
            calls: for each the task, its positional arguments and its named ones:
                ``[(send, [address], {}), ...]``.

        Returns:
            Their results, in the same order.

        Raises:
            InvalidTask, TypeError: as `enqueue`, before any of them is added.
        """
        tasks: list[Any] = []
        rows: list[QueuedTask] = []
        for task, args, kwargs in calls:
            tasks.append(task)
            rows.append(self._row(task, args, kwargs))
        self._manager.bulk_create(rows, batch_size=_BATCH)
        return [self._told(row, task) for row, task in zip(rows, tasks, strict=True)]

    async def aenqueue_many(self, calls: Iterable[Call]) -> list[Any]:
        """Do so from asynchronous code, see `enqueue_many`."""
        return await sync_to_async(self.enqueue_many)(calls)

    def _row(self, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> QueuedTask:
        from modelqueue.task_backend.models import QueuedTask

        self.validate_task(task)
        moment, options = now(), options_of(task)
        try:
            at = moment if task.run_after is None else aware(task.run_after).astimezone(dt.timezone.utc)
            number = next_priority(int(task.priority), at, moment)
        except OverflowError as error:
            raise self.api.InvalidTask(f"run_after={task.run_after} is beyond the calendar.") from error
        return QueuedTask(
            result_id=self._id(),
            status=Status.waiting(number),
            backend_name=self.alias,
            queue_name=task.queue_name,
            function=task.module_path,
            arguments=self._json(task, {"args": list(args), "kwargs": dict(kwargs)}),
            task_priority=int(task.priority),
            retry=options.get("retry", self.parsed.retry),
            run_after=None if task.run_after is None else of_project(at),
            enqueued_at=of_project(moment),
        )

    def _id(self) -> str:
        if self.parsed.id_function is None:
            return _new_id()
        made = str(self.parsed.id_function())
        if not 0 < len(made) <= LONGEST_ID:
            raise ValueError(
                f"The id_function of TASKS[{self.alias!r}] returned {made!r}, of {len(made)} characters. The "
                f"id of a result has 1 to {LONGEST_ID}."
            )
        return made

    def _json(self, task: Any, arguments: Any) -> Any:
        try:
            return as_json(self.api, arguments, self.database)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{task.module_path} can not be enqueued with these arguments, as they are stored as JSON: "
                f"{error}. Give numbers, texts, lists and dictionaries; of a model its primary key."
            ) from error

    def _told(self, row: QueuedTask, task: Any) -> Any:
        from modelqueue.task_backend.results import result_of

        result = result_of(row, task)
        self.api.signals.task_enqueued.send(type(self), task_result=result)
        return result

    # Results

    def get_result(self, result_id: str) -> Any:
        """Return the result of a task, as it is now.

        Raises:
            TaskResultDoesNotExist: there is no such task, or it has been pruned.
            ImportError: the function of the task is not there any more.
        """
        from modelqueue.task_backend.results import found_task, result_of

        row = self._find(result_id)
        return result_of(row, found_task(row))

    async def aget_result(self, result_id: str) -> Any:
        """Do so from asynchronous code, see `get_result`."""
        return await sync_to_async(self.get_result)(result_id)

    def cancel(self, result_id: str) -> bool:
        """Cancel a task that waits or runs; return whether it did.

        The action of one that runs goes on until it asks `modelqueue.current`; what it returns is dropped.

        Raises:
            TaskResultDoesNotExist: there is no such task.
        """
        from modelqueue import verbs
        from modelqueue.task_backend.receivers import record_canceled

        rows = self._manager.filter(pk=self._find(result_id).pk)
        has_done_so = bool(verbs.cancel(rows, "status"))
        if has_done_so:  # now, as it may be retried before its worker hears of it
            record_canceled(rows)
        return has_done_so

    async def acancel(self, result_id: str) -> bool:
        """Do so from asynchronous code, see `cancel`."""
        return await sync_to_async(self.cancel)(result_id)

    def retry(self, result_id: str) -> bool:
        """Have a failed task run once more, with all its attempts before it; return whether it will.

        Raises:
            TaskResultDoesNotExist: there is no such task.
        """
        from modelqueue import verbs

        row = self._find(result_id)
        return bool(verbs.retry(self._manager.filter(pk=row.pk), "status"))

    async def aretry(self, result_id: str) -> bool:
        """Do so from asynchronous code, see `retry`."""
        return await sync_to_async(self.retry)(result_id)

    def _find(self, result_id: Any) -> QueuedTask:
        if not isinstance(result_id, str) and apis.is_result(result_id):
            raise TypeError(f"{result_id!r} is a result; give its id, result.id.")
        row = None
        if is_id(result_id):
            row = self._manager.filter(backend_name=self.alias, result_id=result_id).first()
        if row is None or row.result_id != result_id:  # MySQL does not tell a from A
            raise self.api.TaskResultDoesNotExist(result_id)
        return row

    @property
    def database(self) -> str:
        """The alias of the database that its tasks are in."""
        from modelqueue.task_backend.models import QueuedTask

        return self.parsed.database or router.db_for_write(QueuedTask)

    @property
    def _manager(self) -> models.QuerySet[QueuedTask]:
        from modelqueue.task_backend.models import QueuedTask

        return QueuedTask.objects.using(self.database)

    # Checks

    def check(self, **kwargs: Any) -> Iterable[checks.CheckMessage]:
        where = f"TASKS[{self.alias!r}]"
        path = dict(backends_of_setting()).get(self.alias, {}).get("BACKEND")
        for app in ("modelqueue", APP):
            # Of the second one the checks of the first tell, by this path: Django asks here only once
            # somebody has imported its task API.
            is_told = app == APP and installed.is_installed("modelqueue") and str(path).startswith(f"{APP}.")
            if not installed.is_installed(app) and not is_told:
                yield checks.Error(
                    f"{where} uses ModelQueueBackend, but {app!r} is not in INSTALLED_APPS.",
                    hint="Put 'modelqueue' and 'modelqueue.task_backend' there, and run migrate.",
                    id="modelqueue.E002",
                )
        if self.parsed.database is not None and self.parsed.database not in connections:
            yield checks.Error(
                f"{where}['OPTIONS']['database'] is {self.parsed.database!r}, which is not in DATABASES.",
                hint=f"There are: {', '.join(connections)}.",
                id="modelqueue.E003",
            )


@functools.cache
def _backend_class(api: apis.Api, name: str) -> Any:
    class Backend(_Backend, api.BaseTaskBackend):  # type: ignore[misc,name-defined]
        task_class = policies.task_class(api)

    Backend.api = api
    Backend.__name__ = Backend.__qualname__ = name
    return Backend


if TYPE_CHECKING:
    _Default = _Backend
else:
    _Default = _backend_class(apis.default(), "_Default")


class ModelQueueBackend(_Default):
    """The backend of Django's task API, or of that of ``django-tasks`` where Django has none.

    Where there are both, each of them builds its own of the one setting: for ``django-tasks`` this makes a
    `BackportBackend`.
    """

    def __new__(cls, alias: str, params: dict[str, Any]) -> Any:
        asked_by = sys._getframe(1).f_globals.get("__name__")
        if asked_by == apis.BACKPORT and cls.api.package != apis.BACKPORT:
            if cls is not ModelQueueBackend:
                raise apis.api(apis.BACKPORT).InvalidTaskBackend(
                    f"TASKS[{alias!r}]['BACKEND'] is {cls.__module__}.{cls.__qualname__}, which is made of "
                    "the backend for django.tasks, so django_tasks can not use it. Name ModelQueueBackend "
                    "there, or use one API alone."
                )
            return backport_backend()(alias, params)
        return super().__new__(cls)


def backport_backend() -> Any:
    """Return the class of the backends of ``django-tasks`` where Django has an API of its own."""
    return _backend_class(apis.api(apis.BACKPORT), "BackportBackend")


def _package_of(task: Any) -> str:
    api = apis.api_of(task)
    return "another API" if api is None else api.package


def is_id(text: object) -> bool:
    """Say whether a result may have this id, so that a database can be asked for it."""
    if not isinstance(text, str) or len(text) > LONGEST_ID:
        return False
    try:
        return b"\x00" not in text.encode()  # which PostgreSQL has not
    except UnicodeEncodeError:  # half of a surrogate pair, which no database has
        return False


def _new_id() -> str:
    """Return an id that nobody guesses: the time, so that an index of them grows at its end, and 80 bits."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"
