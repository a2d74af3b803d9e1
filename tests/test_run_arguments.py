"""Arguments of `run` that can not work get a clear error, and nothing is claimed."""

import datetime as dt
import functools
import inspect

import pytest
from asgiref.sync import sync_to_async
from django.db.models import Count
from django.db.models.functions import Now

from modelqueue import ONE_HOUR, ZERO_SECS, Abort, Status, arun, backoff, run
from tests.actions import SECOND, stored, succeed, unexpected
from tests.testapp.models import Job, Paper, PlainJob, PrintJob, Task

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def task():
    """A due and an expired task, which have to be as they were when the test is over."""
    due = Task.objects.create()
    expired = Task.objects.create(status=Status.working(0))
    yield due
    assert (stored(due), stored(expired)) == (due.status, expired.status)


# Querysets


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (lambda: Task.objects.all()[:5], "a slice"),
        (lambda: Task.objects.all()[1:], "a slice"),
        (Task.objects.distinct, r"distinct\(\)"),
        (lambda: Task.objects.values("pk"), r"values\(\) or values_list\(\)"),
        (lambda: Task.objects.values_list("pk", flat=True), r"values\(\) or values_list\(\)"),
        (lambda: Task.objects.annotate(Count("pk")), "an aggregate"),
        (lambda: Task.objects.values("data").annotate(Count("pk")), "values"),
        (lambda: Task.objects.all().union(Task.objects.all()), r"union\(\)"),
        (lambda: Task.objects.all().difference(Task.objects.all()), r"difference\(\)"),
        (lambda: Task.objects.all().intersection(Task.objects.all()), r"intersection\(\)"),
    ],
)
def test_queryset_whose_rows_can_not_be_claimed_is_refused(rows, what):
    with pytest.raises(ValueError, match=f"Tasks of Task can not be claimed from a queryset with {what}"):
        run(rows(), "status", unexpected)


@pytest.mark.parametrize("source", [None, Task, [], "testapp.Task", 5])
def test_source_of_another_kind_is_refused(source):
    with pytest.raises(TypeError, match="Tasks come from a QuerySet or a Manager, not from"):
        run(source, "status", unexpected)


def test_cure_names_the_model_that_was_given():
    with pytest.raises(TypeError, match=r"Give for example Paper\.objects\.all\(\)"):
        run(Paper, "status", unexpected)


def test_raw_queryset_is_refused():
    with pytest.raises(TypeError, match="Tasks come from a QuerySet or a Manager"):
        run(Task.objects.raw("SELECT * FROM testapp_task"), "status", unexpected)


def test_instance_is_refused(task):
    with pytest.raises(TypeError, match="Tasks come from a QuerySet or a Manager"):
        run(task, "status", unexpected)


def test_function_that_makes_a_delay_is_refused():
    with pytest.raises(TypeError, match=r"makes a delay and is none. Call it, as in backoff\.exponential\("):
        run(Task.objects, "status", unexpected, delay=backoff.exponential)


# Fields


def test_missing_field_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"Task has no field 'state', .* Task has the fields status\."):
        run(Task.objects, "state", unexpected)
    with pytest.raises(ValueError, match=r"PlainJob has the fields status \(a BigIntegerField\)\."):
        run(PlainJob.objects, "x", unexpected)
    with pytest.raises(
        ValueError, match=r"Job has no field 'x', .* Job has the fields .*review_status, status\."
    ):
        run(Job.objects, "x", unexpected)


def test_field_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"Task\.data is a TextField, not a modelqueue\.StatusField\."):
        run(Task.objects, "data", unexpected)
    with pytest.raises(TypeError, match=r"Paper\.attachments is a ManyToOneRel, not"):
        run(Paper.objects, "attachments", unexpected)


def test_primary_key_is_no_queue():
    # To Django a BigAutoField is a BigIntegerField.
    with pytest.raises(TypeError, match=r"Task\.id is a BigAutoField, not a modelqueue\.StatusField"):
        run(Task.objects, "id", unexpected)


@pytest.mark.parametrize("field", [None, 5, b"status", Task._meta.get_field("status")])
def test_field_that_is_no_name_is_refused(field):
    with pytest.raises(TypeError, match="A field is given by its name, a str, not by"):
        run(Task.objects, field, unexpected)


def test_wrong_error_field_is_refused():
    with pytest.raises(
        ValueError, match=r"Task has no field 'error', which should be a modelqueue\.ErrorField"
    ):
        run(Task.objects, "status", unexpected, error_field="error")
    with pytest.raises(TypeError, match=r"Task\.status is a StatusField, not a modelqueue\.ErrorField"):
        run(Task.objects, "status", unexpected, error_field="status")
    with pytest.raises(TypeError, match=r"Paper\.title is a CharField.*Paper has the fields error\."):
        run(Paper.objects, "status", unexpected, error_field="title")


def test_field_of_a_parent_is_found():
    PrintJob.objects.create()
    assert run(PrintJob.objects, "status", succeed, error_field="error") is not None


# Actions


async def coroutine_function(task):
    raise AssertionError("awaited")


async def with_options(task, option):
    raise AssertionError("awaited")


class AsyncCallable:
    async def __call__(self, task):
        raise AssertionError("awaited")

    async def method(self, task):
        raise AssertionError("awaited")


@pytest.mark.parametrize(
    "action",
    [
        coroutine_function,
        functools.partial(with_options, option=1),
        functools.partial(functools.partial(with_options), option=1),
        AsyncCallable(),
        functools.partial(AsyncCallable()),
        AsyncCallable().method,
        sync_to_async(succeed),
    ],
    ids=range(7),
)
def test_async_action_is_refused_before_a_claim(action):
    with pytest.raises(TypeError, match=r"run\(\) can not await the action .*arun\(\).*async_to_sync"):
        run(Task.objects, "status", action)


@pytest.mark.parametrize("action", [None, "succeed", 5, Abort()])
def test_action_that_can_not_be_called_is_refused(action):
    with pytest.raises(TypeError, match="The action is a callable that gets the task, not"):
        run(Task.objects, "status", action)


# Options; each limit is in test_outcomes.py


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"retry": 9}, ValueError, "retry=9 is out of range"),
        ({"retry": True}, TypeError, "retry is an int from 0 to 8"),
        ({"retry": "3"}, TypeError, "retry is an int from 0 to 8"),
        ({"timeout": 60}, TypeError, "timeout is a datetime.timedelta"),
        ({"timeout": None}, TypeError, "timeout is a datetime.timedelta"),
        ({"timeout": -SECOND}, ValueError, "timeout=.* is negative"),
        ({"delay": 1.5}, TypeError, "delay is a datetime.timedelta or a callable"),
        ({"delay": None}, TypeError, "delay is a datetime.timedelta or a callable"),
        ({"delay": -SECOND}, ValueError, "delay=.* is negative"),
        ({"delay": Now()}, TypeError, "delay is a datetime.timedelta or a callable"),
    ],
    ids=str,
)
def test_wrong_option_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        run(Task.objects, "status", unexpected, **options)


def test_options_have_the_defaults_of_2_2_1_and_are_the_same_for_arun():
    options = inspect.signature(run).parameters
    assert inspect.signature(arun).parameters == options
    defaults = [options[name].default for name in ("retry", "timeout", "delay", "error_field", "atomic")]
    assert defaults == [3, ONE_HOUR, ZERO_SECS, None, False]


def test_options_may_be_given_by_position(task):
    with pytest.raises(ValueError, match="retry=10 "):
        run(Task.objects, "status", unexpected, 10, dt.timedelta(1), dt.timedelta(1))
    with pytest.raises(TypeError, match="positional"):
        run(Task.objects, "status", unexpected, 1, SECOND, SECOND, "error")


def test_generator_functions_are_no_actions():
    task = Task.objects.create()

    def generator(task):
        yield task

    async def async_generator(task):
        yield task

    for action in (generator, async_generator):
        with pytest.raises(TypeError, match="is a generator function"):
            run(Task.objects, "status", action)
    assert stored(task) == task.status


def test_delay_is_no_async_function():
    task = Task.objects.create()

    async def delay(attempts):
        return SECOND

    with pytest.raises(TypeError, match="nobody awaits"):
        run(Task.objects, "status", unexpected, delay=delay)
    assert stored(task) == task.status
