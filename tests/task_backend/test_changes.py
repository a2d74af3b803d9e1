"""Canceling and retrying: from code, by the actions of the admin, and by the command."""

import json
from io import StringIO

import pytest
from asgiref.sync import async_to_sync
from django.core.management import CommandError, call_command
from django.urls import reverse

from modelqueue import State, Status, verbs
from modelqueue.exceptions import Cancel
from modelqueue.task_backend.models import QueuedTask
from tests.task_backend.backends import States, backend, queue_of, refreshed, row_of, run_all, run_one, tasks

pytestmark = pytest.mark.django_db(transaction=True)


def in_admin(action):
    def change(result, admin_client):
        data = {"action": action, "_selected_action": [row_of(result).pk]}
        response = admin_client.post(
            reverse("admin:modelqueue_tasks_queuedtask_changelist"), data, follow=True
        )
        return any(str(message).startswith("1 ") for message in response.context["messages"])

    return change


def call(*arguments):
    """Call the command; return its exit code and what it has written."""
    out = StringIO()
    try:
        call_command("modelqueue", *arguments, stdout=out, stderr=out)
    except SystemExit as ended:
        return ended.code, out.getvalue()
    return 0, out.getvalue()


def by_number(verb):
    return lambda result, _: call(verb, "default", "--pk", str(row_of(result).pk))[0] == 0


def by_id(verb):
    return lambda result, _: call(verb, "default", "--id", result.id)[0] == 0


CANCEL = {
    "code": lambda result, _: backend().cancel(result.id),
    "async code": lambda result, _: async_to_sync(backend().acancel)(result.id),
    "admin": in_admin("cancel_tasks"),
    "command, by number": by_number("cancel"),
    "command, by id": by_id("cancel"),
}
RETRY = {
    "code": lambda result, _: backend().retry(result.id),
    "async code": lambda result, _: async_to_sync(backend().aretry)(result.id),
    "admin": in_admin("retry_tasks"),
    "command, by number": by_number("retry"),
    "command, by id": by_id("retry"),
}


@pytest.fixture(params=CANCEL)
def cancel(request, admin_client):
    return lambda result: CANCEL[request.param](result, admin_client)


@pytest.fixture(params=RETRY)
def retry(request, admin_client):
    return lambda result: RETRY[request.param](result, admin_client)


def test_waiting_task_is_canceled_and_never_runs(cancel):
    result = tasks.note.enqueue("a")
    assert cancel(result)
    assert run_all() == []
    assert (refreshed(result).status, result.attempts, result.errors) == (States.FAILED, 0, [])
    assert result.finished_at >= result.enqueued_at.replace(microsecond=0)
    assert tasks.times("a") == 0


def test_task_that_waits_for_another_attempt_is_canceled_with_the_errors_it_had(cancel):
    result = tasks.fail_at_first.enqueue("a")
    run_one()
    assert cancel(result)
    assert run_all() == []
    assert (refreshed(result).status, [one.exception_class for one in result.errors]) == (
        States.FAILED,
        [ValueError],
    )


def test_running_task_is_canceled_and_what_it_gives_is_dropped(cancel):
    result = tasks.add.enqueue(1, 2)
    source = queue_of().source()
    (claim,) = verbs.claim(source)
    assert cancel(result)
    assert (refreshed(result).status, result.attempts) == (States.FAILED, 1)
    queue_of().attempt(claim, source).process(queue_of().action)
    assert refreshed(result).status == States.FAILED
    assert [one.exception_class for one in result.errors] == [Cancel]
    assert "canceled while it ran" in result.errors[0].traceback
    assert row_of(result).return_value is None


@pytest.mark.parametrize("status", [Status.finished, Status.canceled])
def test_task_that_is_over_is_not_canceled(status, cancel):
    result = tasks.add.enqueue(1)
    QueuedTask.objects.update(status=status())
    before = row_of(result).status
    assert not cancel(result)
    assert row_of(result).status == before


def test_failed_task_is_retried_with_all_its_attempts_and_keeps_its_errors(retry):
    result = tasks.fail_at_first.enqueue("a", 4)
    run_all()
    assert (refreshed(result).status, result.attempts) == (States.FAILED, 3)
    assert retry(result)
    assert (refreshed(result).status, result.attempts, result.finished_at) == (States.READY, 3, None)
    run_all()
    assert (refreshed(result).status, result.return_value, result.attempts) == (
        States.SUCCESSFUL,
        "at last",
        5,
    )
    assert [one.traceback.split()[-1] for one in result.errors] == ["1", "2", "3", "4"]


def test_task_that_was_canceled_while_it_ran_is_retried_and_keeps_that(retry):
    result = tasks.cancel_itself.enqueue()
    run_all()
    assert (refreshed(result).status, result.attempts) == (States.FAILED, 1)
    assert retry(result)
    assert (refreshed(result).status, result.attempts) == (States.READY, 1)
    run_all()
    assert (refreshed(result).status, result.return_value, result.attempts) == (
        States.SUCCESSFUL,
        "returned",
        2,
    )
    assert [one.exception_class for one in result.errors] == [Cancel]


@pytest.mark.parametrize("state", [State.waiting, State.working, State.finished])
def test_task_that_has_not_failed_is_not_retried(state, retry):
    result = tasks.add.enqueue(1)
    QueuedTask.objects.update(status=Status.combine(state, 5, 0))
    assert not retry(result)
    assert row_of(result).status == Status.combine(state, 5, 0)


def test_others_are_left_alone(cancel):
    result, other = tasks.add.enqueue(1), tasks.add.enqueue(2)
    assert cancel(result)
    assert run_all() == [other.id]


def test_canceled_task_that_is_claimed_by_nobody_is_told_by_its_time():
    result = tasks.add.enqueue(1)
    backend().cancel(result.id)
    result.refresh()
    assert result.is_finished
    assert (result.started_at, result.last_attempted_at, result.worker_ids) == (None, None, [])


# By the id, on the command line


def test_tasks_may_be_named_by_id_and_by_number():
    first, second, other = (tasks.add.enqueue(number) for number in range(3))
    ids = ["--id", first.id, second.id, "--id", second.id]
    code, told = call("cancel", "default", *ids, "--pk", str(row_of(second).pk), str(row_of(other).pk))
    assert (code, told) == (0, "3 tasks of default made canceled.\n")


def test_what_is_named_by_id_is_told_by_id():
    done, waiting, elsewhere = tasks.add.enqueue(1), tasks.add.enqueue(2), tasks.note_elsewhere.enqueue("a")
    run_one()
    code, told = call("cancel", "default", "--id", done.id, waiting.id, elsewhere.id, "none", "--dry-run")
    assert (code, told.splitlines()) == (
        1,
        [
            "1 task of default would be canceled.",
            f"default has no task {elsewhere.id}, none.",
            f"Left alone, as finished: {done.id}.",
        ],
    )
    document = json.loads(call("cancel", "default", "--json", "--id", done.id, "none", "--pk", "0")[1])
    assert (document["missing_pks"], document["missing_ids"]) == ([0], ["none"])
    assert document["left"] == [{"pk": row_of(done).pk, "state": "finished"}]
    assert document["pks_by_id"] == {done.id: row_of(done).pk}
    document = json.loads(call("cancel", "default", "--json", "--id", elsewhere.id)[1])
    assert (document["missing_pks"], document["missing_ids"]) == ([], [elsewhere.id])


def test_id_that_no_task_has_means_none_and_not_all():
    waiting = tasks.add.enqueue(1)
    assert call("cancel", "default", "--id", "none")[0] == 1
    assert refreshed(waiting).status == States.READY


def test_id_of_other_letters_is_no_id():
    """Also where the database takes them for the same."""
    result = tasks.add.enqueue(1)
    code, _ = call("cancel", "default", "--id", result.id.upper())
    assert (code, refreshed(result).status) == (1, States.READY)


@pytest.mark.parametrize("text", ["\udcff", "a\x00", "x" * 1000])
def test_id_that_no_result_can_have_is_that_of_none(text):
    code, told = call("cancel", "default", "--id", text)
    assert (code, told.splitlines()[0]) == (1, "0 tasks of default made canceled.")


def test_queue_of_other_tasks_has_no_ids():
    with pytest.raises(
        CommandError, match=r"testapp.review is no queue of Django tasks.* Give --pk"
    ) as error:
        call("cancel", "testapp.review", "--id", "x")
    assert error.value.returncode == 2
