"""Results: whom they are found for, and what they say through the life of a task."""

import datetime as dt
import uuid

import pytest
from asgiref.sync import async_to_sync

from modelqueue import State, Status, verbs
from modelqueue.engines import Candidate
from modelqueue.exceptions import LeaseExpired, WorkerDied
from modelqueue.task_backend import receivers, results
from modelqueue.task_backend.execution import worker_id
from modelqueue.task_backend.models import QueuedTask
from tests.actions import LONG_AGO
from tests.task_backend.backends import (
    States,
    api,
    backend,
    queue_of,
    refreshed,
    row_of,
    run_all,
    run_one,
    tasks,
)

pytestmark = pytest.mark.django_db(transaction=True)


# Found


@pytest.mark.parametrize(
    "wrong",
    ["", "nobody", "x" * 65, "a\x00b", "\ud800", "ü", 5, None, b"abc", uuid.UUID(int=5), ["a"], {}],
    ids=repr,
)
def test_result_of_a_wrong_id_does_not_exist(wrong):
    result = tasks.add.enqueue(1)
    if wrong == 5:
        QueuedTask.objects.filter(pk=row_of(result).pk).update(result_id="5")
    for ask in (
        backend().get_result,
        async_to_sync(backend().aget_result),
        backend().cancel,
        backend().retry,
    ):
        with pytest.raises(api.TaskResultDoesNotExist):
            ask(wrong)


def test_result_of_another_alias_does_not_exist():
    result = tasks.note_elsewhere.enqueue("a")
    assert backend("other").get_result(result.id).id == result.id
    with pytest.raises(api.TaskResultDoesNotExist):
        backend().get_result(result.id)
    assert not tasks.times("a")


def test_result_is_found_by_its_task():
    result = tasks.add.enqueue(1)
    assert tasks.add.get_result(result.id).id == result.id
    assert async_to_sync(tasks.add.aget_result)(result.id).args == [1]


def test_result_is_refreshed():
    result = tasks.add.enqueue(1, 2)
    run_all()
    assert result.status == States.READY
    result.refresh()
    assert (result.status, result.return_value) == (States.SUCCESSFUL, 3)
    other = tasks.add.enqueue(1)
    run_all()
    async_to_sync(other.arefresh)()
    assert other.is_finished


def test_result_of_a_pruned_task_does_not_exist():
    result = tasks.add.enqueue(1)
    QueuedTask.objects.all().delete()
    with pytest.raises(api.TaskResultDoesNotExist):
        result.refresh()


def test_task_of_a_result_has_the_options_that_it_was_enqueued_with():
    moment = dt.datetime(2031, 2, 3, 4, 5, 6, tzinfo=dt.timezone.utc)
    task = tasks.add.using(priority=-7, queue_name="slow", run_after=moment)
    found = backend().get_result(task.enqueue(1).id).task
    assert found == task
    assert (found.priority, found.queue_name, found.run_after) == (-7, "slow", moment)


# Through its life


def now():
    return dt.datetime.now(dt.timezone.utc)


def test_task_that_is_claimed_runs():
    result = tasks.add.enqueue(1)
    before = now()
    (row,) = queue_of().claim()
    result.refresh()
    assert result.status == States.RUNNING
    assert (result.worker_ids, result.attempts, result.errors) == ([worker_id()], 1, [])
    assert before - dt.timedelta(seconds=1) <= result.started_at == result.last_attempted_at <= now()
    assert (result.finished_at, result.is_finished) == (None, False)
    with pytest.raises(ValueError, match="has not finished yet"):
        result.return_value  # noqa: B018
    assert queue_of().release(row)
    result.refresh()
    assert (result.status, result.attempts, result.started_at) == (States.READY, 0, None)


def test_task_that_has_succeeded():
    result = tasks.add.enqueue(1, 2)
    run_all()
    result.refresh()
    assert (result.status, result.return_value, result.is_finished) == (States.SUCCESSFUL, 3, True)
    assert (result.worker_ids, result.errors) == ([worker_id()], [])
    assert result.enqueued_at <= result.started_at == result.last_attempted_at
    assert result.finished_at >= result.started_at - dt.timedelta(milliseconds=1)


def test_task_that_waits_for_another_attempt_is_ready():
    result = tasks.fail_at_first.enqueue("a")
    run_one()
    result.refresh()
    assert (result.status, result.attempts, result.worker_ids) == (States.READY, 1, [worker_id()])
    assert result.started_at == result.last_attempted_at != None  # noqa: E711
    assert result.finished_at is None
    (error,) = result.errors
    assert error.exception_class is ValueError
    assert "in fail_at_first" in error.traceback
    assert error.traceback.startswith("Traceback (most recent call last):")
    assert error.traceback.endswith("ValueError: a, attempt 1\n")


def test_every_attempt_is_told_of_with_its_error():
    result = tasks.fail_at_first.enqueue("a", 2)
    run_one()
    first = refreshed(result).started_at
    run_one()
    run_one()
    result.refresh()
    assert (result.status, result.return_value) == (States.SUCCESSFUL, "at last")
    assert [error.traceback.splitlines()[-1] for error in result.errors] == [
        f"ValueError: a, attempt {number}" for number in (1, 2)
    ]
    assert result.worker_ids == [worker_id()] * 3
    assert result.started_at == first < result.last_attempted_at


def test_task_that_has_failed_for_good():
    result = tasks.fail_at_first.enqueue("a", 9)
    run_all()
    result.refresh()
    assert (result.status, result.attempts, result.is_finished) == (States.FAILED, 3, True)
    assert [error.traceback.splitlines()[-1] for error in result.errors] == [
        f"ValueError: a, attempt {number}" for number in (1, 2, 3)
    ]
    assert result.started_at < result.last_attempted_at
    assert result.last_attempted_at <= result.finished_at + dt.timedelta(milliseconds=1)
    with pytest.raises(ValueError, match="Task failed"):
        result.return_value  # noqa: B018


def test_message_of_an_error_may_have_several_lines():
    result = tasks.fail.enqueue("one\ntwo: three\n")
    run_all()
    (error,) = refreshed(result).errors
    assert error.exception_class is ValueError
    assert "two: three" in error.traceback


def test_attempt_that_asks_for_another_one_is_none():
    result = tasks.snooze.enqueue("a")
    run_one()
    assert (refreshed(result).status, result.attempts, result.errors) == (States.READY, 0, [])
    run_all()
    assert (refreshed(result).return_value, result.attempts, result.errors) == ("awake", 1, [])


# Attempts whose workers have died


def test_attempt_whose_lease_has_run_out_is_told_of():
    result = tasks.add.enqueue(1, 2)
    queue_of().claim()
    QueuedTask.objects.update(status=Status.working(LONG_AGO), worker="alpha:7")
    run_all()
    result.refresh()
    assert (result.status, result.return_value) == (States.SUCCESSFUL, 3)
    assert result.worker_ids == ["alpha:7", worker_id()]
    (error,) = result.errors
    assert error.exception_class_path == "modelqueue.exceptions.LeaseExpired"
    assert issubclass(error.exception_class, Exception)
    assert "was neither reported nor its lease renewed" in error.traceback
    assert result.started_at < result.last_attempted_at


@pytest.mark.parametrize(("task", "status"), [(tasks.add, "READY"), (tasks.fail, "FAILED")])
def test_attempt_whose_process_was_killed_is_told_of(task, status):
    result = task.enqueue(1)
    (row,) = queue_of().claim()
    source, candidate = queue_of().source(), Candidate(row.pk, row.pk, Status.waiting(5))
    policy = queue_of().policy_of(candidate)
    assert verbs.take_back(source, policy, candidate, {row.status}, WorkerDied("its process 7 was killed"))
    result.refresh()
    assert (result.status, result.attempts, result.worker_ids) == (States[status], 1, [worker_id()])
    (error,) = result.errors
    assert error.exception_class is WorkerDied
    assert "its process 7 was killed" in error.traceback


def test_attempt_is_told_of_where_nobody_came_to_note_it(monkeypatch):
    """The process was killed after the outcome was written: the next claim notes it."""
    monkeypatch.setattr(receivers, "_record", lambda row, using: None)
    result = tasks.fail_at_first.enqueue("a")
    run_one()
    assert [error.exception_class for error in refreshed(result).errors] == [ValueError]
    assert (result.attempts, row_of(result).failures) == (1, None)
    run_one()
    result.refresh()
    assert (result.status, result.attempts, len(result.errors)) == (States.SUCCESSFUL, 2, 1)
    assert len(row_of(result).failures) == 1


def test_row_with_a_foreign_number_is_ready_and_in_nobodys_way():
    result, other = tasks.add.enqueue(1), tasks.add.enqueue(2)
    QueuedTask.objects.filter(result_id=result.id).update(status=7)
    assert run_all() == [other.id]
    assert (refreshed(result).status, refreshed(other).status) == (States.READY, States.SUCCESSFUL)
    assert row_of(other).status.state == State.finished


def claim_after_a_failure(monkeypatch):
    """Claim a task once more whose first attempt has failed, which nobody has noted yet."""
    result = tasks.fail_at_first.enqueue("a")
    with monkeypatch.context() as patch:
        patch.setattr(receivers, "_record", lambda row, using: None)
        run_one()
    source = queue_of().source()
    (claim,) = verbs.claim(source)
    return result, source, claim


def test_attempt_that_begins_after_it_was_taken_back_changes_nothing_of_what_others_noted(monkeypatch):
    result, source, claim = claim_after_a_failure(monkeypatch)
    policy = queue_of().policy_of(claim.row)
    assert verbs.take_back(source, policy, claim.row, {claim.lease}, WorkerDied("its process 7 was killed"))
    before = QueuedTask.objects.filter(result_id=result.id).values().get()
    receivers._claimed(QueuedTask, "default", claim.task, claim.row.before)
    assert QueuedTask.objects.filter(result_id=result.id).values().get() == before


def test_attempt_that_was_given_back_is_none_and_counts_none_twice(monkeypatch):
    result, source, claim = claim_after_a_failure(monkeypatch)
    receivers._claimed(QueuedTask, "default", claim.task, claim.row.before)
    assert verbs.release(source, claim.row, {claim.lease})
    result.refresh()
    assert ([one.exception_class for one in result.errors], result.attempts) == ([ValueError], 1)
    backend().cancel(result.id)
    result.refresh()
    assert ([one.exception_class for one in result.errors], result.attempts) == ([ValueError], 1)


def test_attempt_that_asked_for_another_is_no_canceled_one():
    result = tasks.snooze.enqueue("a")
    run_one()
    assert backend().cancel(result.id)
    result.refresh()
    assert (result.status, result.attempts, result.errors) == (States.FAILED, 0, [])


def test_attempt_that_was_canceled_stays_though_the_task_is_retried_at_once():
    result = tasks.add.enqueue(1)
    queue_of().claim()
    assert backend().cancel(result.id)
    assert backend().retry(result.id)
    result.refresh()
    assert (result.status, result.attempts) == (States.READY, 1)
    assert "canceled while it ran" in result.errors[0].traceback
    run_all()
    assert (refreshed(result).status, result.attempts, len(result.errors)) == (States.SUCCESSFUL, 2, 1)


def test_error_of_a_failed_task_stays_though_its_retry_dies_before_it_begins():
    result = tasks.fail.enqueue("first")
    run_all()
    (error,) = refreshed(result).errors
    assert row_of(result).error.startswith("builtins.ValueError: first")  # the admin shows it still
    assert backend().retry(result.id)
    assert (refreshed(result).attempts, result.errors) == (1, [error])
    queue_of().claim()
    assert (refreshed(result).status, result.attempts, result.errors) == (States.RUNNING, 2, [error])
    QueuedTask.objects.update(status=Status.working(LONG_AGO))
    run_all()
    assert (refreshed(result).status, result.attempts, result.errors[0]) == (States.FAILED, 2, error)
    assert [one.exception_class for one in result.errors[1:]] == [LeaseExpired]
    assert backend().retry(result.id)
    run_all()
    assert [one.exception_class for one in refreshed(result).errors] == [ValueError, LeaseExpired, ValueError]


@pytest.mark.parametrize("is_heard_at_once", [True, False])
def test_attempt_that_was_canceled_from_elsewhere_stays_though_the_task_is_retried(is_heard_at_once):
    """From the command line, for example; its worker hears of it later."""
    result = tasks.add.enqueue(1)
    source = queue_of().source()
    (claim,) = verbs.claim(source)
    assert queue_of().cancel() == 1
    if not is_heard_at_once:
        assert queue_of().retry() == 1
    queue_of().attempt(claim, source).settle(None)
    assert (refreshed(result).attempts, len(result.errors)) == (1, 1)
    assert "canceled while it ran" in result.errors[0].traceback
    if is_heard_at_once:
        assert queue_of().retry() == 1
    run_all()
    assert (refreshed(result).status, result.attempts, len(result.errors)) == (States.SUCCESSFUL, 2, 1)


def test_result_of_a_queue_or_backend_that_is_no_more_is_found(settings):
    result = tasks.note_elsewhere.using(queue_name="blue").enqueue("a")
    ran = tasks.note_elsewhere.enqueue("b")
    run_all()
    settings.TASKS = {**settings.TASKS, "other": {**settings.TASKS["other"], "QUEUES": ["green"]}}
    results._with_options.cache_clear()  # as in another process
    assert backend("other").get_result(result.id).status == States.SUCCESSFUL
    assert backend("other").get_result(ran.id).return_value == "b"
    assert backend("other").get_result(ran.id).task.queue_name == "red"
