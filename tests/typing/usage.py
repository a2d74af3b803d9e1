"""The public API as a typed project uses it: never run, `make types` checks each type that a user gets."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import django_tasks
from django.contrib import admin
from typing_extensions import assert_type

import modelqueue
from modelqueue import State, Status, backoff, task_backend, testing
from tests.testapp.models import Task

if TYPE_CHECKING:
    from django.db.models import QuerySet


def make_thumbnail(task: Task) -> None:
    if not task.data:
        raise modelqueue.Cancel
    if task.data == "busy":
        raise modelqueue.Retry(dt.timedelta(minutes=1))
    raise modelqueue.Abort(backoff.exponential(dt.timedelta(seconds=1), cap=modelqueue.ONE_HOUR))


# A task comes back as the model that the queryset is of.
assert_type(modelqueue.run(Task.objects.all(), "status", make_thumbnail), Task | None)
assert_type(modelqueue.run(Task.objects.filter(data="x"), "status", lambda task: task.data), Task | None)
modelqueue.run(
    Task.objects.all(),
    "status",
    make_thumbnail,
    retry=None,
    timeout=dt.timedelta(minutes=5),
    delay=lambda attempts: dt.timedelta(seconds=attempts),
    error_field="error",
)
modelqueue.run(Task.objects.all(), "status", make_thumbnail, 3, modelqueue.ONE_HOUR, modelqueue.ZERO_SECS)
modelqueue.run(Task.objects.all(), "status", len)  # type: ignore[arg-type]
modelqueue.run(Task.objects.all(), "status", make_thumbnail, timeout=3600)  # type: ignore[arg-type]


async def make_thumbnail_async(task: Task) -> None:
    make_thumbnail(task)


async def use_arun() -> None:
    assert_type(await modelqueue.arun(Task.objects.all(), "status", make_thumbnail_async), Task | None)
    assert_type(await modelqueue.arun(Task.objects, "status", make_thumbnail, atomic=True), Task | None)
    await modelqueue.arun(Task.objects.all(), "status", len)  # type: ignore[arg-type]


assert_type(modelqueue.enqueue(Task.objects.all(), "status"), int)
assert_type(modelqueue.enqueue(Task(), "status", at=modelqueue.now() + modelqueue.ONE_HOUR), int)
assert_type(modelqueue.enqueue(Task(), "status", priority=5), int)
modelqueue.enqueue(Task(), "status", at="tomorrow")  # type: ignore[arg-type]

status = Status.combine(State.waiting, modelqueue.now(), 0)
assert_type(status, Status)
assert_type(status.state, State)
assert_type(status.state.name, str)
assert_type(status.priority, int)
assert_type(status.attempts, int)
assert_type(status.parse(), tuple[State, dt.datetime | int, int])
assert_type(Status.combine(*status.parse()), Status)
assert_type(Status.waiting(priority=0, attempts=1), Status)
assert_type(Status.minimum("waiting"), int)
assert_type(Status.tally(Task.objects.all(), "status"), dict[str, int])
assert_type(modelqueue.datetime_to_int(modelqueue.now()), int)

due: QuerySet[Task] = Task.objects.filter(**Status.filter("status", "waiting"))
task = Task(status=Status.waiting())
assert_type(task.status, Status)
assert_type(task.status.state, State)
task.status = Status.finished()
Task(status=2_20260101000000000_0)


class TaskAdmin(admin.ModelAdmin[Task]):
    actions = [*modelqueue.admin_actions("status")]
    list_filter = [modelqueue.admin_list_filter("status")]


@modelqueue.queue(Task, "status")
def hash_data(task: Task) -> None: ...


def choose(task: Task, moment: dt.datetime) -> int | dt.datetime:
    return moment if task.data else 5


@modelqueue.queue(Task, "status", next_priority=choose, claim_values=lambda: {"data": "alpha"})
def enter(task: Task) -> None: ...


modelqueue.queue(Task, "status", claim_values={"data": "alpha"})
modelqueue.queue(Task, "status", claim_values="data")  # type: ignore[arg-type]
modelqueue.queue(Task, "status", next_priority=make_thumbnail)  # type: ignore[arg-type]
modelqueue.queue(Task, "status", upkeep=Task.objects.all().delete)
modelqueue.queue(Task, "status", upkeep=make_thumbnail)  # type: ignore[arg-type]

assert_type(testing.run_one(hash_data), testing.Ran[Task] | None)
testing.drain(hash_data, raises=False)
testing.run_until(dt.timedelta(hours=1), hash_data)
testing.drain(make_thumbnail)  # type: ignore[arg-type]
testing.assert_state(task, "finished", attempts=1)
testing.assert_tally(hash_data, finished=1)
testing.assert_tally(hash_data, done=1)  # type: ignore[call-arg]


# A Django task keeps its type, with its arguments and what it returns.
@task_backend.policy(retry=5, timeout=60, delay=backoff.exponential(dt.timedelta(seconds=1)))
@django_tasks.task
def send(address: str, *, copies: int = 1) -> int:
    return copies


assert_type(send.enqueue("a@example.org", copies=2), django_tasks.TaskResult[int])
assert_type(send.using(priority=5).enqueue("a@example.org").return_value, int | None)
assert_type(task_backend.policy(send, atomic=True).call("a@example.org"), int)
send.enqueue(5)  # type: ignore[arg-type]

backend = django_tasks.task_backends["default"]
assert isinstance(backend, task_backend.ModelQueueBackend)
assert_type(backend.cancel("id"), bool)
assert_type(backend.retry("id"), bool)
backend.enqueue_many([(send, ["a@example.org"], {}), (send, (), {"address": "b@example.org"})])
backend.enqueue_many([send])  # type: ignore[list-item]
