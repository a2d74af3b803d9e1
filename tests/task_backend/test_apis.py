"""Django's API and that of ``django-tasks``: each alone, and both in one project."""

from __future__ import annotations

import copy
import datetime as dt
import importlib
import json
import pickle

import django
import pytest
from django.core.exceptions import ImproperlyConfigured

from modelqueue.task_backend import ModelQueueBackend, apis, policy
from modelqueue.task_backend.backend import backport_backend
from modelqueue.task_backend.execution import worker_id
from modelqueue.task_backend.models import QueuedTask
from modelqueue.task_backend.policies import options_of, task_class
from modelqueue.task_backend.queues import task_queues

TASKS = {"default": {"BACKEND": "modelqueue.task_backend.ModelQueueBackend", "OPTIONS": {"retry": 0}}}

HAS_DJANGO = django.VERSION >= (6, 0)
of_both = pytest.mark.skipif(not HAS_DJANGO, reason="Django has a task API of its own from 6.0 on")
PACKAGES = [apis.DJANGO, apis.BACKPORT] if HAS_DJANGO else [apis.BACKPORT]
OTHER = {apis.DJANGO: apis.BACKPORT, apis.BACKPORT: apis.DJANGO}


@pytest.fixture(autouse=True)
def tasks_setting(settings):
    settings.TASKS = TASKS


@pytest.fixture(params=PACKAGES)
def package(request):
    """Each of the APIs that there are."""
    return request.param


def tasks_of(package):
    """The module with tasks of an API; imported by a test, as its tasks look for their backend."""
    name = "of_django" if package == apis.DJANGO else "of_backport"
    return importlib.import_module(f"tests.task_backend.{name}")


def backend_of(package, alias="default"):
    return importlib.import_module(package).task_backends[alias]


def run_all():
    for queue in task_queues():
        queue.drain()


class Heard:
    """What the signals of each API have told: which, by whom, and the result."""

    def __init__(self):
        self.told = {package: [] for package in PACKAGES}
        for package in PACKAGES:
            signals = apis.api(package).signals
            for name in ("task_enqueued", "task_started", "task_finished"):
                getattr(signals, name).connect(self.receiver(package, name), dispatch_uid=self)

    def receiver(self, package, name):
        def receive(sender, task_result, **kwargs):
            self.told[package].append((name, sender, task_result))

        setattr(self, f"{package}.{name}", receive)  # signals hold it weakly
        return receive

    def close(self):
        for package in PACKAGES:
            signals = apis.api(package).signals
            for name in ("task_enqueued", "task_started", "task_finished"):
                assert getattr(signals, name).disconnect(dispatch_uid=self)


@pytest.fixture
def heard():
    made = Heard()
    yield made
    made.close()


# Each


def test_backend_is_one_of_its_api(package):
    backend = backend_of(package)
    assert isinstance(backend, apis.api(package).BaseTaskBackend)
    assert isinstance(tasks_of(package).add, apis.api(package).Task)
    assert tasks_of(package).add.get_backend() is backend
    assert backend.api is apis.api(package)


@pytest.mark.django_db(transaction=True)
def test_result_has_the_classes_of_its_api(package):
    api, tasks = apis.api(package), tasks_of(package)
    added, failed, named = (
        tasks.add.enqueue(1, other=2),
        tasks.fail.enqueue(),
        tasks.name_of_context.enqueue(),
    )
    run_all()
    for result in (added, failed, named):
        result.refresh()
        assert type(result) is api.TaskResult
        assert type(result.status) is api.TaskResultStatus
        assert isinstance(result.task, api.Task)
    assert added.return_value == 3
    (error,) = failed.errors
    assert type(error) is api.TaskError
    assert error.exception_class is LookupError
    assert named.return_value == f"{package}.base"  # where its TaskContext is defined


@pytest.mark.django_db
def test_what_is_not_there_is_told_in_the_exception_of_the_api(package):
    api = apis.api(package)
    with pytest.raises(api.TaskResultDoesNotExist):
        backend_of(package).get_result("no-such-id")
    with pytest.raises(api.InvalidTask):
        tasks_of(package).add.using(queue_name="unknown")


@pytest.mark.django_db(transaction=True)
def test_signals_are_those_of_the_api_and_sent_by_its_backend(package, heard):
    result = tasks_of(package).add.enqueue(1, 2)
    run_all()
    told = heard.told.pop(package)
    assert [name for name, _, _ in told] == ["task_enqueued", "task_started", "task_finished"]
    assert {sender for _, sender, _ in told} == {type(backend_of(package))}
    assert {told_of.id for _, _, told_of in told} == {result.id}
    assert all(type(told_of) is apis.api(package).TaskResult for _, _, told_of in told)
    assert not any(heard.told.values())


@pytest.mark.django_db(transaction=True)
def test_policy_of_a_task_holds(package):
    result = tasks_of(package).fail_twice.enqueue()
    assert QueuedTask.objects.get().retry == 1
    run_all()
    result.refresh()
    assert result.status == "FAILED"
    assert result.attempts == len(result.errors) == 2


def test_policy_is_said_of_a_task_and_returns_it(package):
    task = make(package, nothing)
    assert policy(task, retry=5, delay=60) is task
    assert options_of(task) == {"retry": 5, "delay": dt.timedelta(minutes=1)}


def nothing(): ...


def make(package, function, **options):
    """A task as each version of each API makes it, with options of a policy."""
    standard = {"priority": 0, "backend": "default", "queue_name": "default", "run_after": None}
    return task_class(apis.api(package))(func=function, **standard, **options)


@pytest.mark.django_db
def test_using_keeps_the_class_and_the_policy_of_a_task(package):
    made = make(package, tasks_of(package).add.func, retry=5)
    other = made.using(priority=7)
    assert type(other) is type(made)
    assert (other.priority, other.retry) == (7, 5)
    assert options_of(other) == {"retry": 5}
    other.enqueue(1, 2)
    row = QueuedTask.objects.get()
    assert (row.task_priority, row.retry) == (7, 5)


@pytest.mark.django_db
def test_using_keeps_what_policy_has_said(package):
    other = tasks_of(package).fail_twice.using(priority=7)
    assert options_of(other) == {"retry": 1}
    assert isinstance(other, task_class(apis.api(package)))
    result = backend_of(package).get_result(other.enqueue().id)
    assert type(result.task) is type(other)
    assert result.task == other


@pytest.mark.skipif(django.VERSION < (6, 1), reason="Django takes options of a task class from 6.1 on")
def test_decorator_of_django_takes_a_policy():
    from django.tasks import task

    made = task(retry=5, timeout=60, atomic=True)(tasks_of(apis.DJANGO).add.func)
    assert options_of(made) == {"retry": 5, "timeout": dt.timedelta(minutes=1), "atomic": True}
    assert options_of(made.using(priority=1)) == options_of(made)


# Copies


@pytest.mark.django_db
def test_copy_of_a_task_is_equal(package):
    for task in (tasks_of(package).add, tasks_of(package).add.using(priority=7)):
        for made in (copy.copy(task), copy.deepcopy(task)):
            assert made == task
            assert type(made) is type(task)
            assert made.func is task.func
        assert options_of(copy.deepcopy(tasks_of(package).fail_twice)) == {"retry": 1}


@pytest.mark.django_db(transaction=True)
def test_copy_of_a_result_is_equal(package):
    result = tasks_of(package).add.enqueue(1, 2)
    assert copy.deepcopy(result) == result
    run_all()
    result.refresh()
    made = copy.deepcopy(result)
    assert made == result
    assert made.return_value == 3


@pytest.mark.skipif(django.VERSION < (6, 1), reason="tasks of Django can be pickled from 6.1 on")
@pytest.mark.django_db(transaction=True)
def test_task_and_result_are_pickled():
    tasks = tasks_of(apis.DJANGO)
    for task in (tasks.add, tasks.add.using(priority=7), tasks.fail_twice):
        made = pickle.loads(pickle.dumps(task))
        assert made == task
        assert type(made) is type(task)
        assert options_of(made) == options_of(task)
    result = tasks.add.enqueue(1, 2)
    run_all()
    result.refresh()
    made = pickle.loads(pickle.dumps(result))
    assert made == result
    assert made.return_value == 3


@pytest.mark.skipif(django.VERSION < (6, 1), reason="tasks of Django can be pickled from 6.1 on")
@pytest.mark.django_db
def test_pickled_task_is_read_by_a_process_that_has_built_no_backend_yet(processes):
    pickled = pickle.dumps(tasks_of(apis.DJANGO).add)
    assert processes.start(priority_of_pickled, pickled.hex(), json.dumps(TASKS)).result() == 0


def priority_of_pickled(pickled, setting):
    from django.test import override_settings

    with override_settings(TASKS=json.loads(setting)):
        return pickle.loads(bytes.fromhex(pickled)).priority


# Both


@of_both
def test_each_api_builds_its_own_backend_of_one_setting():
    django_s, backport_s = backend_of(apis.DJANGO), backend_of(apis.BACKPORT)
    assert type(django_s) is ModelQueueBackend
    assert type(backport_s) is backport_backend()
    assert not isinstance(django_s, apis.api(apis.BACKPORT).BaseTaskBackend)
    assert not isinstance(backport_s, apis.api(apis.DJANGO).BaseTaskBackend)
    assert django_s.parsed == backport_s.parsed
    assert django_s.parsed.retry == 0


@of_both
@pytest.mark.django_db(transaction=True)
def test_tasks_of_both_are_in_one_queue():
    results = [tasks_of(package).add.enqueue(1, number) for number, package in enumerate(PACKAGES * 2)]
    (queue,) = task_queues()
    assert queue.tally()["waiting"] == 4
    assert queue.drain() == 4
    for result in results:
        result.refresh()
    assert [result.return_value for result in results] == [1, 2, 3, 4]


@of_both
@pytest.mark.django_db
def test_result_has_the_classes_of_its_task_whichever_api_is_asked(package):
    result = tasks_of(package).add.enqueue(1, 2)
    found = backend_of(OTHER[package]).get_result(result.id)
    assert type(found) is apis.api(package).TaskResult
    assert found == result


@of_both
@pytest.mark.django_db
def test_api_of_a_task_is_that_of_its_class(package):
    assert apis.api_of(tasks_of(package).add) is apis.api(package)
    assert apis.api_of(tasks_of(package).add.func) is None


def test_worker_runs_tasks_of_each(workers):
    results = [
        result
        for package in PACKAGES
        for result in (tasks_of(package).add.enqueue(1, 2), tasks_of(package).fail.enqueue())
    ]
    worker = workers.start("--drain", variables={"MODELQUEUE_TEST_TASK_BACKENDS": json.dumps(TASKS)})
    assert worker.process.wait(60) == 0, worker.output
    for result in results:
        result.refresh()
    assert [result.status for result in results] == ["SUCCESSFUL", "FAILED"] * len(PACKAGES)
    assert {one for result in results for one in result.worker_ids}.isdisjoint({worker_id()})


# Neither


def test_project_without_any_api_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(apis, "find_spec", lambda package: None)
    with pytest.raises(ImproperlyConfigured, match=r"pip install modelqueue\[tasks\]"):
        apis.default()


def test_api_of_django_comes_first(monkeypatch):
    assert apis.default() is apis.api(PACKAGES[0])
    if HAS_DJANGO:
        monkeypatch.setattr(apis, "find_spec", lambda package: package == apis.BACKPORT or None)
        assert apis.default() is apis.api(apis.BACKPORT)
