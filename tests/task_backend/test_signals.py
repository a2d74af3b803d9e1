"""Signals and the log: what Django documents of a task is told once, by the class of its backend."""

import copy
import logging
import sys
from contextlib import contextmanager

import pytest
from django.db import connection

from modelqueue import Status, verbs
from modelqueue.task_backend.models import QueuedTask
from tests.actions import LONG_AGO, succeed
from tests.task_backend.backends import States, api, backend, queue_of, refreshed, run_all, run_one, tasks
from tests.testapp.models import Task

pytestmark = pytest.mark.django_db(transaction=True)


@contextmanager
def heard(receive=None):
    """What the signals of the API tell: name, sender, result, and the exception that is being handled."""
    events, receivers = [], []
    for name in ("task_enqueued", "task_started", "task_finished"):

        def listen(sender, task_result, name=name, **kwargs):
            # As it is now: it goes on to change, as that of Django's immediate backend does.
            events.append((name, sender, copy.copy(task_result), sys.exc_info()[1]))
            if receive:
                receive(name, task_result)

        getattr(api.signals, name).connect(listen)
        receivers.append((name, listen))
    try:
        yield events
    finally:
        for name, listen in receivers:
            getattr(api.signals, name).disconnect(listen)


def told(events):
    return [(name, str(result.status)) for name, _, result, _ in events]


def test_life_of_a_task_is_told_by_the_class_of_its_backend():
    with heard() as events:
        result = tasks.add.enqueue(1, 2)
        run_all()
    assert told(events) == [
        ("task_enqueued", "READY"),
        ("task_started", "RUNNING"),
        ("task_finished", "SUCCESSFUL"),
    ]
    assert {sender for _, sender, _, _ in events} == {type(backend())}
    assert {one.id for _, _, one, _ in events} == {result.id}
    assert [error for *_, error in events] == [None] * 3
    finished = events[2][2]
    assert (finished.return_value, finished.attempts, finished.finished_at is None) == (3, 1, False)


def test_each_of_many_is_told():
    with heard() as events:
        results = backend().enqueue_many([(tasks.add, [number], {}) for number in range(3)])
    assert told(events) == [("task_enqueued", "READY")] * 3
    assert [one.id for _, _, one, _ in events] == [result.id for result in results]


def test_nothing_is_told_of_a_task_that_could_not_be_enqueued():
    with heard() as events, pytest.raises(TypeError):
        tasks.add.enqueue(object())
    assert events == []


@pytest.mark.parametrize(
    ("task", "kind"),
    [(tasks.fail, ValueError), (tasks.note_and_fail, ValueError), (tasks.fail_later, LookupError)],
)
def test_failure_is_told_while_its_exception_is_handled(task, kind):
    with heard() as events:
        task.enqueue("so")
        run_all()
    assert told(events)[1:] == [("task_started", "RUNNING"), ("task_finished", "FAILED")]
    error = events[2][3]
    assert (type(error), str(error)) == (kind, "so")
    assert error.__traceback__ is not None
    assert [one.exception_class for one in events[2][2].errors] == [kind]


def test_end_is_told_once_however_many_attempts_there_were():
    with heard() as events:
        tasks.fail_at_first.enqueue("a", 9)
        run_all()
    assert told(events)[1:] == [("task_started", "RUNNING")] * 3 + [("task_finished", "FAILED")]
    assert [one.attempts for _, _, one, _ in events] == [0, 1, 2, 3, 3]


def test_failure_with_another_attempt_to_come_is_no_end():
    with heard() as events:
        tasks.fail_at_first.enqueue("a")
        run_one()
        assert [name for name, _ in told(events)] == ["task_enqueued", "task_started"]
        run_one()
    assert told(events)[-1] == ("task_finished", "SUCCESSFUL")


@pytest.mark.parametrize("task", [tasks.note, tasks.note_at_once], ids=["plain", "atomic"])
def test_end_is_told_when_it_is_committed(task):
    seen = []

    def look(name, result):
        seen.append((name, connection.in_atomic_block, str(backend().get_result(result.id).status)))

    with heard(look):
        task.enqueue("a")
        run_all()
    assert seen[0] == ("task_enqueued", False, "READY")
    assert seen[2] == ("task_finished", False, "SUCCESSFUL")


def test_receiver_that_fails_at_the_end_changes_nothing(caplog):
    def break_down(name, result):
        if name == "task_finished":
            raise RuntimeError("no receiver")

    with heard(break_down):
        result = tasks.add.enqueue(1, 2)
        run_all()
    assert refreshed(result).return_value == 3
    assert "no receiver" in caplog.text


def test_receiver_that_fails_at_the_start_fails_the_attempt():
    """As it does with Django's own backend."""

    def break_down(name, result):
        if name == "task_started":
            raise RuntimeError("no receiver")

    with heard(break_down) as events:
        result = tasks.fail.enqueue()
        run_all()
    assert refreshed(result).errors[0].exception_class is RuntimeError
    assert told(events)[-1] == ("task_finished", "FAILED")


@pytest.mark.parametrize("task", [tasks.fail, tasks.fail_at_first])
def test_task_whose_worker_died_on_its_last_attempt_is_told_once(task):
    with heard() as events:
        result = task.enqueue("a")
        queue_of().claim()
        attempts = 0 if task is tasks.fail else 2
        QueuedTask.objects.update(status=Status.working(LONG_AGO, attempts))
        run_all()
    assert told(events) == [("task_enqueued", "READY"), ("task_finished", "FAILED")]
    assert refreshed(result).errors[-1].exception_class_path == "modelqueue.exceptions.LeaseExpired"


def test_task_that_is_canceled_while_it_runs_is_told_when_it_has_ended():
    with heard() as events:
        result = tasks.cancel_itself.enqueue()
        run_all()
    assert told(events)[1:] == [("task_started", "RUNNING"), ("task_finished", "FAILED")]
    assert len(events[2][2].errors) == 1
    assert refreshed(result).attempts == 1


def test_late_end_of_a_task_that_was_taken_back_is_not_told():
    with heard() as events:
        tasks.fail.enqueue()
        source = queue_of().source()
        (claim,) = verbs.claim(source)
        QueuedTask.objects.update(status=Status.working(LONG_AGO))
        run_all()
        assert told(events)[1:] == [("task_finished", "FAILED")]
        queue_of().attempt(claim, source).process(queue_of().action)
    assert [name for name, _ in told(events)].count("task_finished") == 1


def test_signals_of_other_models_are_not_ours(declare):
    queue = declare(Task, "status", name="tasks")(succeed)
    Task.objects.create()
    with heard() as events:
        queue.run()
    assert events == []


# The log


def lines(caplog):
    return [
        (record.levelname, record.getMessage(), record.exc_info and record.exc_info[0])
        for record in caplog.records
        if record.name == api.package
    ]


def test_log_has_the_lines_that_django_documents(caplog):
    caplog.set_level(logging.DEBUG, api.package)
    result = tasks.add.enqueue(1)
    run_all()
    task = f"Task id={result.id} path=tests.task_backend.tasks.add"
    assert lines(caplog) == [
        ("DEBUG", f"{task} enqueued backend=default", None),
        ("INFO", f"{task} state=RUNNING", None),
        ("INFO", f"{task} state=SUCCESSFUL", None),
    ]


def test_log_has_the_traceback_of_a_failure(caplog):
    caplog.set_level(logging.INFO, api.package)
    result = tasks.fail.enqueue("so")
    run_all()
    assert lines(caplog)[-1] == (
        "ERROR",
        f"Task id={result.id} path=tests.task_backend.tasks.fail state=FAILED",
        ValueError,
    )
    assert "in fail\n" in caplog.text


def test_results_that_are_told_are_those_of_the_api():
    with heard() as events:
        tasks.add.enqueue(1)
        run_all()
    assert {type(result) for _, _, result, _ in events} == {api.TaskResult}
    assert events[-1][2].status == States.SUCCESSFUL
