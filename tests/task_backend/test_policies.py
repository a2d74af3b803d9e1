"""Policies: how a Django task is tried, by its decorator, by `policy`, or by the options of its backend."""

import dataclasses
import inspect
import pickle

import pytest

import modelqueue
from modelqueue import Status
from modelqueue.backoff import exponential
from modelqueue.task_backend import policy
from modelqueue.task_backend.models import QueuedTask
from tests.actions import SECOND
from tests.task_backend.backends import (
    States,
    api,
    backend,
    handler,
    refreshed,
    row_of,
    run_all,
    run_one,
    setting,
    tasks,
)
from tests.testapp.models import Ledger

pytestmark = pytest.mark.django_db(transaction=True)

HOUR = 3600 * SECOND
task = handler.task

takes_options = pytest.mark.skipif(
    not any(one.kind is one.VAR_KEYWORD for one in inspect.signature(task).parameters.values()),
    reason="@task of this version takes no further options",
)


def do_nothing():
    return "done"


@dataclasses.dataclass
class Wait:
    """A delay that has no hash, as that of a dataclass that can be changed."""

    seconds: int

    def __call__(self, attempts):
        return self.seconds * SECOND


def test_delay_may_have_no_hash(monkeypatch):
    made = dataclasses.replace(tasks.fail_at_first, delay=Wait(0), retry=1)
    monkeypatch.setattr(tasks, "fail_at_first", made)
    result = made.enqueue("a")
    run_one()
    assert [error.exception_class for error in refreshed(result).errors] == [ValueError]
    run_one()
    assert (refreshed(result).status, backend().get_result(result.id).task) == (States.SUCCESSFUL, made)


def complain():
    raise ValueError("no")


async def complain_later():
    raise ValueError("no")


def look():
    return (modelqueue.current().deadline - modelqueue.now()).total_seconds()


@pytest.fixture(autouse=True)
def _functions(monkeypatch):
    """The functions above are no tasks yet, and nothing is said of them."""
    functions = {one.__name__: one for one in (do_nothing, complain, complain_later, look)}
    yield
    for name, function in functions.items():
        vars(function).pop("modelqueue_policy", None)
        globals()[name] = function


def declare(function, policies=None, **options):
    """Make a function of this module a task, as a decorator does."""
    made = task(**options)(function) if options else task(function)
    if policies is not None:
        made = policy(made, **policies)
    globals()[function.__name__] = made
    return made


# Where they come from


@pytest.mark.parametrize(
    ("options", "retry"), [({}, 3), ({"retry": 5}, 5), ({"retry": None}, None), ({"retry": 0}, 0)]
)
def test_options_of_the_backend_hold_for_all_tasks(options, retry, settings):
    settings.TASKS = setting(**options)
    assert row_of(tasks.add.enqueue(1)).retry == retry
    assert row_of(tasks.fail.enqueue(1)).retry == 0  # of which more is said


@pytest.mark.parametrize(("given", "attempts"), [(0, 1), (2, 3)])
def test_task_is_retried_as_often_as_its_policy_says(given, attempts):
    result = declare(complain, {"retry": given}).enqueue()
    run_all()
    assert (refreshed(result).status, result.attempts, len(result.errors)) == (
        States.FAILED,
        attempts,
        attempts,
    )


def test_task_without_a_limit_is_tried_for_ever():
    result = declare(complain, {"retry": None}).enqueue()
    for number in range(1, 13):
        run_one()
        assert (refreshed(result).status, result.attempts) == (States.READY, number)


@takes_options
def test_task_is_retried_as_often_as_its_decorator_says():
    result = declare(complain, retry=1).enqueue()
    assert row_of(result).retry == 1
    run_all()
    assert (refreshed(result).status, result.attempts) == (States.FAILED, 2)


@takes_options
def test_decorator_of_a_task_is_above_its_policy():
    made = declare(complain, {"retry": 5, "delay": 60}, retry=1)
    row = row_of(made.enqueue())
    assert row.retry == 1
    run_one()
    assert Status.waiting(modelqueue.now() + 50 * SECOND) < QueuedTask.objects.get().status


@takes_options
def test_task_with_options_can_be_used_with_others():
    made = declare(complain, retry=1).using(priority=7)
    assert (row_of(made.enqueue()).retry, made.priority) == (1, 7)
    with pytest.raises(TypeError):
        made.using(retry=2)


def test_policy_holds_for_all_tasks_that_are_made_of_the_function():
    declare(complain, {"retry": 1})
    assert row_of(complain.using(priority=7).enqueue()).retry == 1


def test_policy_may_be_said_in_parts():
    made = policy(declare(complain, {"retry": 1, "delay": 60}), retry=0)
    assert row_of(made.enqueue()).retry == 0
    assert policy(made) is made
    run_all()
    assert QueuedTask.objects.get().status.attempts == 1


def test_policy_is_a_decorator_too():
    made = policy(retry=2)(declare(complain))
    assert made is complain
    assert row_of(made.enqueue()).retry == 2


def test_task_that_is_enqueued_keeps_its_number_of_retries():
    """It stands in its row, as the database is asked for it."""
    result = declare(complain, {"retry": 1}).enqueue()
    policy(complain, retry=0)
    run_one()
    assert refreshed(result).status == States.READY


# What they do


@pytest.mark.parametrize("timeout", [90, 90.0, 90 * SECOND])
def test_attempt_may_take_as_long_as_its_policy_says(timeout):
    result = declare(look, {"timeout": timeout}).enqueue()
    run_all()
    assert 0 < refreshed(result).return_value <= 90


def test_attempt_may_take_as_long_as_its_backend_says(settings):
    settings.TASKS = setting(timeout=90)
    result = declare(look).enqueue()
    run_all()
    assert 0 < refreshed(result).return_value <= 90


DELAYS = {"seconds": 7200, "timedelta": 2 * HOUR, "callable": lambda attempts: 2 * attempts * HOUR}


@pytest.mark.parametrize("place", ["policy", "OPTIONS"])
@pytest.mark.parametrize("kind", DELAYS)
def test_task_waits_as_long_as_is_said(kind, place, settings):
    if place == "OPTIONS":
        settings.TASKS = setting(delay=DELAYS[kind])
    declare(complain, {"delay": DELAYS[kind]} if place == "policy" else None).enqueue()
    run_all()
    status, soonest = QueuedTask.objects.get().status, modelqueue.now() + 2 * HOUR - 60 * SECOND
    assert Status.waiting(soonest) < status < Status.waiting(soonest + 61 * SECOND)
    assert status.attempts == 1


def test_delay_of_a_backend_may_be_named_by_its_path(settings):
    settings.TASKS = setting(delay="tests.task_backend.test_policies.in_two_hours")
    declare(complain).enqueue()
    run_all()
    assert QueuedTask.objects.get().status > Status.waiting(modelqueue.now() + HOUR)


def in_two_hours(attempts):
    return 2 * HOUR


def test_delay_may_be_one_of_the_library():
    declare(complain, {"delay": exponential(HOUR)}).enqueue()
    run_all()
    assert QueuedTask.objects.get().status.attempts == 1


def test_function_and_its_outcome_are_one_transaction_if_it_says_so():
    failing, other = tasks.note_and_fail.enqueue("a"), tasks.note_at_once.enqueue("b")
    run_all()
    assert [refreshed(one).status for one in (failing, other)] == [States.FAILED, States.SUCCESSFUL]
    assert [entry.worker for entry in Ledger.objects.all()] == ["b"]
    assert "ValueError: a" in failing.errors[0].traceback


def test_failure_of_an_atomic_task_is_told_of_each_time():
    """What notes the failure of the last attempt is no part of the transaction that is rolled back."""
    result = policy(tasks.note_and_fail.using(priority=1), retry=2).enqueue("a")
    try:
        run_all()
    finally:
        policy(tasks.note_and_fail, retry=0)
    assert (refreshed(result).status, result.attempts, len(result.errors)) == (States.FAILED, 3, 3)


# Wrong ones

WRONG = [
    ({"retry": 9}, ValueError, "retry=9 is out of range"),
    ({"retry": -1}, ValueError, "retry=-1 is out of range"),
    ({"retry": "3"}, TypeError, "retry is an int from 0 to 8"),
    ({"retry": True}, TypeError, "retry is an int from 0 to 8"),
    ({"timeout": "60"}, TypeError, "timeout is a number of seconds or a datetime.timedelta, not '60'"),
    ({"timeout": True}, TypeError, "timeout is a number of seconds"),
    ({"timeout": None}, TypeError, "timeout is a number of seconds"),
    ({"timeout": float("nan")}, ValueError, "timeout=nan is no number of seconds"),
    ({"timeout": 1e300}, ValueError, "is no number of seconds that a timedelta can hold"),
    ({"timeout": -1}, ValueError, "timeout=.* is negative"),
    ({"delay": "60"}, TypeError, "delay is a number of seconds"),
    ({"delay": -1}, ValueError, "delay=.* is negative"),
    ({"delay": exponential}, TypeError, "makes a delay and is none"),
    ({"atomic": 1}, TypeError, "atomic is True or False, not 1"),
]


@pytest.mark.parametrize(("options", "error", "text"), WRONG, ids=[one[2] for one in WRONG])
def test_wrong_policy_is_refused(options, error, text):
    made = declare(do_nothing)
    with pytest.raises(error, match=text):
        policy(made, **options)
    assert row_of(made.enqueue()).retry == 3


@takes_options
@pytest.mark.parametrize(("options", "error", "text"), WRONG, ids=[one[2] for one in WRONG])
def test_wrong_option_of_a_decorator_is_refused(options, error, text):
    with pytest.raises(api.InvalidTask, match=text):
        declare(do_nothing, **options)


def test_unknown_option_is_refused():
    with pytest.raises(
        TypeError, match=r"policy\(\) has no option 'retries'. There are: retry, timeout, delay, atomic"
    ):
        policy(declare(do_nothing), retries=5)


def test_policy_is_for_tasks_alone():
    with pytest.raises(
        TypeError, match=r"policy\(\) takes a task, as @task makes it of a function, not <function do"
    ):
        policy(do_nothing, retry=5)


def test_transaction_is_not_for_async_functions():
    with pytest.raises(TypeError, match=r"a transaction belongs to a thread, and .*complain_later is async"):
        policy(declare(complain_later), atomic=True)


@takes_options
def test_transaction_is_not_for_async_functions_by_their_decorator_either():
    with pytest.raises(api.InvalidTask, match="complain_later: atomic=True is for synchronous functions"):
        declare(complain_later, atomic=True)


@pytest.mark.skipif("_reconstruct" not in vars(api.Task), reason="tasks of this version can not be pickled")
def test_task_can_be_pickled():
    assert pickle.loads(pickle.dumps(tasks.add)) == tasks.add
    made = declare(complain, retry=1).using(priority=7)
    assert pickle.loads(pickle.dumps(made)) == made
    assert backend().task_class is type(made)
