"""Retention: results are deleted after their time, and no task that is still to run."""

import datetime as dt
from io import StringIO

import pytest
from django.core.management import call_command

import modelqueue
from modelqueue import State, Status, testing, verbs
from modelqueue.task_backend import queues
from modelqueue.task_backend.models import QueuedTask
from modelqueue.verbs import Pruned
from tests.actions import LONG_AGO
from tests.task_backend.backends import BACKEND, api, backend, queue_of, run_all, setting, tasks

pytestmark = pytest.mark.django_db(transaction=True)

DAY = dt.timedelta(days=1)


def enqueue_all():
    """Enqueue tasks that end, or stay, in each state; return their ids."""
    results = {
        "SUCCESSFUL": tasks.add.enqueue(1),
        "FAILED": tasks.fail.enqueue(),
        "canceled": tasks.add.using(run_after=modelqueue.now() + 9 * DAY).enqueue(1),
        "deferred": tasks.add.using(run_after=modelqueue.now() + 9 * DAY).enqueue(1),
        "other": tasks.note_elsewhere.enqueue("a"),
    }
    run_all("default", "other:red")
    backend().cancel(results["canceled"].id)
    results["READY"] = tasks.add.enqueue(1)
    results["RUNNING"] = tasks.add.enqueue(1)
    QueuedTask.objects.filter(result_id=results["RUNNING"].id).update(status=Status.working())
    return {kind: result.id for kind, result in results.items()}


def left(ids):
    stored = set(QueuedTask.objects.values_list("result_id", flat=True))
    return {kind for kind, result_id in ids.items() if result_id in stored}


def test_upkeep_deletes_results_after_their_time(settings):
    settings.TASKS = setting(result_ttl=2 * 86400)
    ids = enqueue_all()
    with testing.travel(DAY):
        queue_of().keep_up()
        assert left(ids) == {*ids}
    settings.TASKS = setting(result_ttl=2 * 86400)  # it is a minute later
    with testing.travel(3 * DAY):
        queue_of().keep_up()
        assert left(ids) == {"deferred", "other", "READY", "RUNNING"}
    with pytest.raises(api.TaskResultDoesNotExist):
        backend().get_result(ids["SUCCESSFUL"])


def test_results_are_kept_for_ever_by_default():
    ids = enqueue_all()
    with testing.travel(1000 * DAY):
        queue_of().keep_up()
    assert left(ids) == {*ids}


def test_upkeep_looks_for_old_results_now_and_then(settings, monkeypatch):
    settings.TASKS = setting(result_ttl=0)
    seen, queue = [], queue_of()
    monkeypatch.setattr(verbs, "prune", lambda rows, field, ttl, state: seen.append(state.name) or [])
    queue.keep_up()
    queue.keep_up()
    assert seen == ["finished", "canceled"]
    monkeypatch.setattr(queues, "_PRUNE_INTERVAL", 0.0)
    settings.TASKS = setting(result_ttl=0)
    for _ in range(2):
        queue_of().keep_up()
    assert len(seen) == 6


def test_many_old_results_are_deleted_a_part_at_a_time_so_that_deferred_tasks_do_not_wait(
    settings, monkeypatch
):
    settings.TASKS = setting(result_ttl=0)
    monkeypatch.setattr(queues, "_PRUNE_SECONDS", 0.0)
    facts = {
        "backend_name": "default",
        "queue_name": "default",
        "function": "f",
        "enqueued_at": modelqueue.now(),
    }
    QueuedTask.objects.bulk_create(
        QueuedTask(result_id=str(number), status=Status.finished(LONG_AGO), **facts) for number in range(1100)
    )
    queue, counts = queue_of(), []
    for _ in range(5):
        queue.keep_up()
        counts.append(QueuedTask.objects.count())
    assert counts == [600, 100, 0, 0, 0]


def test_many_old_results_that_may_not_be_deleted_are_not_in_the_way_of_others(settings, monkeypatch):
    """Other tables protect all that have succeeded: to find that takes all the time there is."""

    def find_them_protected(rows, field, ttl, state):
        yield from [Pruned(0, 500)] * 3 if state == State.finished else prune(rows, field, ttl, state)

    prune = verbs.prune
    monkeypatch.setattr(verbs, "prune", find_them_protected)
    settings.TASKS = setting(result_ttl=0)
    monkeypatch.setattr(queues, "_PRUNE_SECONDS", 0.0)
    monkeypatch.setattr(queues, "_PRUNE_INTERVAL", 0.0)
    ids, queue = enqueue_all(), queue_of()
    with testing.travel(DAY):
        for _ in range(2):
            queue.keep_up()
    assert left(ids) == {*ids} - {"FAILED", "canceled"}


def test_each_backend_has_a_time_of_its_own(settings):
    ids = enqueue_all()
    other = {"BACKEND": BACKEND, "QUEUES": ["red", "blue"], "OPTIONS": {"result_ttl": 60}}
    settings.TASKS = {**setting(), "other": other}
    with testing.travel(DAY):
        for queue in queues.task_queues():
            queue.keep_up()
    assert left(ids) == {*ids} - {"other"}


@pytest.mark.parametrize(
    ("state", "gone"), [("finished", {"SUCCESSFUL"}), ("canceled", {"FAILED", "canceled"})]
)
def test_command_deletes_results(state, gone):
    ids, out = enqueue_all(), StringIO()
    with testing.travel(3 * DAY):
        call_command("modelqueue", "prune", "default", "--older-than", "2d", "--state", state, stdout=out)
    assert left(ids) == {*ids} - gone
    assert f"{len(gone)} {state} task" in out.getvalue()
