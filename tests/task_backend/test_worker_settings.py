"""What a worker makes of the setting TASKS: its backends, their options, priorities and policies."""

import json
import os

import pytest

import modelqueue
from modelqueue import State
from tests.actions import SECOND
from tests.processes import wait_until
from tests.task_backend.backends import BACKEND, TASKS, States, backend, refreshed, row_of, setting, tasks
from tests.testapp.models import Ledger

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])


@pytest.fixture
def start(workers):
    def start(*arguments, setting=TASKS, **variables):
        variables["MODELQUEUE_TEST_TASK_BACKENDS"] = json.dumps(setting)
        return workers.start(*arguments, variables=variables)

    return start


def has(result, status):
    return lambda: refreshed(result).status == status


def test_worker_serves_all_backends_and_drains(start):
    results = [
        tasks.add.enqueue(1, 2),
        tasks.add_later.enqueue(3, 4),
        tasks.note_at_once.enqueue("atomic"),
        tasks.tell_later.enqueue(),
        tasks.note_elsewhere.enqueue("red"),
        tasks.note_elsewhere.using(queue_name="blue").enqueue("blue"),
        tasks.fail_at_first.enqueue("a", 2),
    ]
    failed = [tasks.fail.enqueue(), tasks.fail_later.enqueue()]
    worker = start("--drain", "--processes", 2, MODELQUEUE_TEST_LEAN="")  # with the admin
    assert worker.process.wait(60) == 0, worker.output
    values = [refreshed(one).return_value for one in results]
    assert values == [3, 7, "atomic", results[3].id, "red", "blue", "at last"]
    assert [refreshed(one).status for one in failed] == [States.FAILED] * 2
    assert (results[-1].attempts, len(results[-1].errors)) == (3, 2)
    assert all(str(os.getpid()) not in one.worker_ids[0] for one in results)


def test_deferred_task_is_run_when_its_time_has_come(start):
    moment = modelqueue.now() + 3 * SECOND
    result = tasks.add.using(run_after=moment, priority=5).enqueue(1)
    worker = start("--poll", 0.2)
    wait_until(has(result, States.SUCCESSFUL))
    assert result.started_at >= moment
    assert worker.stop()[0] == 0


def test_one_thread_runs_tasks_in_the_order_of_their_priorities(start):
    numbers = [3, -5, 100, 0, 3, -100, 0, 7]
    for place, number in enumerate(numbers):
        tasks.note.using(priority=number).enqueue(f"{number} {place}")
    worker = start("--drain", "--threads", 1)
    assert worker.process.wait(60) == 0, worker.output
    order = list(Ledger.objects.order_by("pk").values_list("worker", flat=True))
    assert order == ["100 2", "7 7", "3 0", "3 4", "0 3", "0 6", "-5 1", "-100 5"]


def test_worker_deletes_old_results_and_leaves_others(start, settings):
    old, waiting = (
        tasks.add.enqueue(1),
        tasks.add.using(run_after=modelqueue.now() + 3600 * SECOND).enqueue(1),
    )
    backend().cancel(old.id)
    start(setting=setting(result_ttl=0))
    wait_until(lambda: not type(row_of(waiting)).objects.filter(result_id=old.id).exists())
    assert row_of(waiting).status.state == State.waiting


def test_tasks_of_another_database_are_run_there(start, settings):
    settings.TASKS = setting(database="other")
    result = tasks.add.enqueue(1, 2)
    worker = start("default", "--drain", setting=settings.TASKS)
    assert worker.process.wait(60) == 0, worker.output
    assert refreshed(result).return_value == 3
    assert row_of(result, "other").status.state == State.finished


@pytest.mark.vendor("sqlite")
def test_wrong_option_is_told_when_a_worker_starts(start):
    wrong = {"default": {"BACKEND": BACKEND, "OPTIONS": {"retries": 5}}}
    worker = start("--drain", setting=wrong)
    assert worker.process.wait(60) != 0
    assert "TASKS['default']['OPTIONS']" in worker.output
    assert "Did you mean 'retry'?" in worker.output
