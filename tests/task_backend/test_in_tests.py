"""In the tests of a user: enqueued tasks run in a TestCase, and other backends are not disturbed."""

import pytest
from django.test import TestCase, override_settings

from modelqueue import testing
from modelqueue.task_backend import policy
from modelqueue.task_backend.models import QueuedTask
from tests.task_backend.backends import TASKS, States, api, handler, queue_of, refreshed, setting, tasks
from tests.testapp.models import Ledger

IMMEDIATE = f"{api.package}.backends.immediate.ImmediateBackend"
DUMMY = f"{api.package}.backends.dummy.DummyBackend"


@override_settings(TASKS=TASKS)
class InTestCase(TestCase):
    def test_enqueued_tasks_are_run(self):
        results = [tasks.add.enqueue(1, 2), tasks.add_later.enqueue(3, 4), tasks.note_at_once.enqueue("a")]
        ran = testing.drain()  # no queue named: all declared ones
        assert [one.outcome for one in ran] == ["finish"] * 3
        assert [refreshed(one).return_value for one in results] == [3, 7, "a"]
        testing.assert_tally(queue_of(), finished=3)

    def test_failure_is_raised_with_what_is_recorded(self):
        result = tasks.fail.enqueue("so")
        with pytest.raises(ValueError, match="so"):
            testing.drain(queue_of())
        assert refreshed(result).status == States.FAILED
        assert result.errors[0].exception_class is ValueError

    def test_task_is_run_to_its_end_through_its_delays(self):
        result = tasks.fail_for_hours.enqueue()
        ran = testing.run_to_end(queue_of(), raises=False)
        assert [one.outcome for one in ran] == ["fail", "fail"]
        assert (refreshed(result).status, result.attempts) == (States.FAILED, 2)

    def test_atomic_task_that_fails_leaves_nothing_behind(self):
        result = tasks.note_and_fail.enqueue("a")
        testing.drain(queue_of(), raises=False)
        assert refreshed(result).status == States.FAILED
        assert not Ledger.objects.exists()

    @override_settings(TASKS=setting(retry=1))
    def test_setting_of_a_test_holds(self):
        result = tasks.note.enqueue("a")
        assert QueuedTask.objects.get(result_id=result.id).retry == 1


def greet(name):
    return f"Hello {name}"


def complain():
    raise ValueError("no")


@pytest.fixture
def declare():
    """Make a function of this module a task with a policy, under the setting of the test."""
    plain = {}

    def declare(function, **options):
        plain[function.__name__] = function
        made = policy(handler.task(function), **options)
        globals()[function.__name__] = made
        return made

    yield declare
    for name, function in plain.items():
        vars(function).pop("modelqueue_policy", None)
        globals()[name] = function


@pytest.mark.django_db
@pytest.mark.parametrize("is_ours", [True, False], ids=["declared for ours", "declared for that"])
def test_immediate_backend_runs_tasks_with_a_policy(is_ours, declare, settings):
    if is_ours:
        made = declare(greet, retry=5, timeout=60, delay=10, atomic=True)
    settings.TASKS = {"default": {"BACKEND": IMMEDIATE}}
    if not is_ours:
        made = declare(greet, retry=5, timeout=60, delay=10, atomic=True)
    result = made.enqueue("World")
    assert (result.status, result.return_value) == (States.SUCCESSFUL, "Hello World")
    failed = declare(complain, retry=5).enqueue()
    assert (failed.status, failed.attempts) == (States.FAILED, 1)
    assert not QueuedTask.objects.exists()


@pytest.mark.django_db
def test_dummy_backend_keeps_tasks_with_a_policy(declare, settings):
    settings.TASKS = {"default": {"BACKEND": DUMMY}}
    made = declare(greet, retry=5)
    result = made.enqueue("World")
    assert [one.id for one in handler.task_backends["default"].results] == [result.id]
    assert testing.drain() == []
    assert not QueuedTask.objects.exists()
