"""`run`: what it claims, what it records for each end of an attempt, what it returns and raises."""

import asyncio
import contextlib
import datetime as dt

import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import SynchronousOnlyOperation
from django.db import connection

import modelqueue
from modelqueue import Abort, Cancel, Retry, State, Status, clock, run, signals
from tests.actions import LONG_AGO, SECOND, Clock, heard, raising, row, stored, succeed, unexpected
from tests.testapp.models import Job, Paper, PlainJob, StampedPaper, Task

pytestmark = pytest.mark.django_db(transaction=True)

RETRIES = [0, 3, 8, None]


# What is claimed


def test_nothing_due_returns_none():
    for status in (
        Status.created(LONG_AGO),
        Status.waiting(modelqueue.now() + SECOND * 60),
        Status.working(),
        Status.finished(LONG_AGO),
        Status.canceled(LONG_AGO),
    ):
        Task.objects.create(status=status)
    assert run(Task.objects.all(), "status", unexpected) is None


@pytest.mark.parametrize("number", [0, -1, 7, 999_999_999_999_999_999, 6 * 10**18, 2**63 - 1, -(2**63)])
def test_foreign_number_is_never_claimed(number):
    task = Task.objects.create(status=Status(number))
    assert run(Task.objects.all(), "status", unexpected, timeout=dt.timedelta(0)) is None
    assert stored(task) == number


def test_null_is_never_claimed():
    Job.objects.create(review_status=None)
    assert run(Job.objects.all(), "review_status", unexpected) is None


def test_lowest_priority_runs_first():
    for data, priority in (("c", LONG_AGO + SECOND), ("a", 0), ("d", modelqueue.now()), ("b", 5)):
        Task.objects.create(data=data, status=Status.waiting(priority))
    assert [run(Task.objects, "status", succeed).data for _ in range(4)] == ["a", "b", "c", "d"]


def test_new_row_is_due_at_once():
    for _ in range(20):
        Task.objects.create()
        assert run(Task.objects, "status", succeed) is not None


def test_time_that_has_not_come_is_waited_for():
    now = Clock()
    with clock.use(now):
        Task.objects.create(status=Status.waiting(now.moment + SECOND))
        assert run(Task.objects, "status", succeed) is None
        now.move(SECOND)
        assert run(Task.objects, "status", succeed) is not None


def test_claim_is_committed_before_the_action_starts(processes):
    task = Task.objects.create()
    seen = []
    run(Task.objects, "status", lambda task: seen.append(processes.start(read_status, task.pk).result()))
    assert Status(seen[0]).state == State.working
    assert stored(task).state == State.finished


def read_status(pk):
    return Task.objects.get(pk=pk).status


def test_action_gets_a_task_that_shows_its_lease():
    task = Task.objects.create()
    seen = []
    before = modelqueue.datetime_to_int(modelqueue.now())
    run(Task.objects, "status", lambda task: seen.append((task.status, stored(task))))
    assert seen[0][0] == seen[0][1]
    assert seen[0][0].state == State.working
    assert before < seen[0][0].priority <= stored(task).priority


# The outcomes; the whole table is in test_outcomes.py


@pytest.mark.parametrize("retry", RETRIES)
@pytest.mark.parametrize("model", [Task, StampedPaper], ids=["by update", "by save"])
@pytest.mark.parametrize(
    ("error", "reraised", "charged", "state"),
    [
        (None, False, True, State.finished),
        (Retry(), False, False, State.waiting),
        (Cancel(), False, True, State.canceled),
        (Abort(), False, True, None),
        (ValueError("x"), True, True, None),
        (KeyboardInterrupt(), True, True, None),
        (SystemExit(2), True, True, None),
        (asyncio.CancelledError(), True, False, State.waiting),
    ],
    ids=lambda value: type(value).__name__,
)
def test_outcome_is_recorded(model, error, reraised, charged, state, retry):
    task = model.objects.create(status=Status.waiting(LONG_AGO))
    action = raising(error) if error else succeed
    before = modelqueue.now()
    if reraised:
        with pytest.raises(type(error)) as caught:
            run(model.objects, "status", action, retry=retry)
        assert caught.value is error
    else:
        returned = run(model.objects, "status", action, retry=retry)
        assert returned == task
        assert returned.status == stored(task)
        assert isinstance(returned.status, Status)
    status = stored(task)
    assert status.state == (state or (State.canceled if retry == 0 else State.waiting))
    assert status.attempts == charged
    if isinstance(error, asyncio.CancelledError):
        assert status == task.status
    else:
        assert status.priority >= modelqueue.datetime_to_int(before)


@pytest.mark.parametrize("retry", RETRIES)
@pytest.mark.parametrize("error", [Abort(), ValueError("x")])
def test_task_is_canceled_after_its_last_retry(error, retry):
    Task.objects.create()
    attempts = []

    def fail(task):
        attempts.append(task.status.attempts)
        raise error

    for _ in range(12):
        with contextlib.suppress(ValueError):
            run(Task.objects, "status", fail, retry=retry)
    assert attempts == list(range(10))[: 12 if retry is None else retry + 1] + [9] * (2 * (retry is None))
    status = Task.objects.get().status
    assert status.state == (State.waiting if retry is None else State.canceled)
    assert status.attempts == (9 if retry is None else retry + 1)


@pytest.mark.parametrize("error", [None, Cancel(), ValueError()])
def test_waiting_row_with_nine_attempts_may_run_and_ends_with_nine(error):
    task = Task.objects.create(status=Status.waiting(0, 9))
    with contextlib.suppress(ValueError):
        run(Task.objects, "status", raising(error) if error else succeed)
    assert stored(task).attempts == 9
    assert stored(task).state == (State.canceled if error else State.finished)


@pytest.mark.parametrize(
    "value",
    [
        Status.created(0, 4),
        Status.waiting(5, 2),
        Status.waiting(LONG_AGO),
        Status.waiting(dt.datetime.max),
        Status.finished(7),
        Status.canceled(8, 9),
    ],
)
@pytest.mark.parametrize("model", [Task, StampedPaper, PlainJob])
def test_assigned_status_is_recorded_as_assigned(model, value):
    task = model.objects.create(status=Status.waiting(LONG_AGO, 1))

    def assign(task):
        task.status = int(value)

    with heard("task_finished", "lease_lost") as events:
        returned = run(model.objects, "status", assign)
    assert stored(task) == returned.status == value
    assert [(name, event["outcome"], event["status"]) for name, event in events] == [
        ("task_finished", "assign", value)
    ]


def test_assigned_none_takes_the_task_out_of_the_queue():
    job = Job.objects.create(status=Status.created(), review_status=Status.waiting())

    def leave(job):
        job.review_status = None

    assert run(Job.objects, "review_status", leave).review_status is None
    assert row(job).review_status is None


@pytest.mark.parametrize("value", [Status.working(), Status(0), -5, "waiting", 2.5, True, None])
def test_assigned_nonsense_is_a_failed_attempt(value):
    task = Task.objects.create()

    def assign(task):
        task.status = value

    with pytest.raises((TypeError, ValueError), match=r"The action assigned |takes a Status, not True"):
        run(Task.objects, "status", assign)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


def test_other_queue_of_the_row_is_enqueued_in_the_same_write():
    job = Job.objects.create(review_status=None)

    def next_stage(job):
        job.review_status = Status.waiting()

    run(Job.objects, "status", next_stage)
    assert (row(job).status.state, row(job).review_status.state) == (State.finished, State.waiting)
    assert run(Job.objects, "review_status", succeed) == job
    assert (row(job).status.state, row(job).review_status.state) == (State.finished, State.finished)


def test_exception_wins_over_an_assigned_status():
    task = Task.objects.create()

    def confused(task):
        task.status = Status.finished()
        raise Retry

    run(Task.objects, "status", confused)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 0)


# Delays


@pytest.mark.parametrize("error", [Retry(), Abort(), ValueError()])
def test_delay_is_waited_for(error):
    now = Clock()
    with clock.use(now):
        Task.objects.create()
        with contextlib.suppress(ValueError):
            run(Task.objects, "status", raising(error), delay=60 * SECOND)
        now.move(59 * SECOND)
        assert run(Task.objects, "status", succeed) is None
        now.move(2 * SECOND)
        assert run(Task.objects, "status", succeed) is not None


@pytest.mark.parametrize("error", [Retry(), Abort(), ValueError()])
def test_without_a_delay_the_next_call_finds_the_task_due(error):
    Task.objects.create()
    calls = []

    def fail(task):
        calls.append(task.status)
        raise error

    for _ in range(50):
        with contextlib.suppress(ValueError):
            assert run(Task.objects, "status", fail, retry=None) is not None
    assert len(calls) == 50


def test_delay_without_an_end_never_comes():
    task = Task.objects.create()
    run(Task.objects, "status", raising(Retry(dt.timedelta.max)))
    assert stored(task) == Status.waiting(dt.datetime.max)
    assert run(Task.objects, "status", unexpected) is None


@pytest.mark.parametrize("error", [Retry, Abort])
@pytest.mark.parametrize("delay", [5, -SECOND, lambda attempts: "soon", lambda attempts: 1 / 0])
def test_wrong_delay_of_an_exception_is_a_failed_attempt(error, delay):
    task = Task.objects.create()
    with pytest.raises((TypeError, ValueError, ZeroDivisionError)):
        run(Task.objects, "status", raising(error(delay)), delay=60 * SECOND)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert stored(task).parse()[1] > modelqueue.now() + 50 * SECOND


@pytest.mark.parametrize("delay", [lambda attempts: -SECOND, lambda: SECOND, lambda attempts: 1 / 0])
def test_wrong_result_of_the_delay_does_not_keep_the_task(delay):
    task = Task.objects.create()
    with pytest.raises((TypeError, ValueError, ZeroDivisionError)):
        run(Task.objects, "status", raising(Abort()), delay=delay)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


def test_delay_may_depend_on_the_attempts():
    now = Clock()
    waits = []
    with clock.use(now):
        Task.objects.create()
        for _ in range(4):
            task = run(Task.objects, "status", raising(Abort()), delay=modelqueue.backoff.linear(60 * SECOND))
            if task.status.state == State.waiting:
                waits.append(round((task.status.parse()[1] - now.moment).total_seconds()))
                now.move(waits[-1] * SECOND)
    assert waits == [60, 120, 180]


# Actions that can not be run


def test_coroutine_of_an_action_is_a_failed_attempt():
    task = Task.objects.create()

    async def later():
        raise AssertionError("awaited")

    with pytest.raises(TypeError, match=r"returned a coroutine, which nobody runs\. Give arun"):
        run(Task.objects, "status", lambda task: later())
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


def test_event_loop_gets_the_error_of_django_and_nothing_is_claimed():
    task = Task.objects.create()

    async def on_a_loop():
        run(Task.objects.all(), "status", unexpected)

    with pytest.raises(SynchronousOnlyOperation, match="You cannot call this from an async context"):
        asyncio.run(on_a_loop())
    assert stored(task) == task.status


def test_action_may_run_coroutines_by_itself():
    Task.objects.create()
    seen = []

    async def work(task):
        await asyncio.sleep(0)
        seen.append(task.pk)

    task = run(Task.objects, "status", async_to_sync(work))
    assert seen == [task.pk]
    assert task.status.state == State.finished


# The text of the last failure


@pytest.mark.parametrize("model", [Paper, StampedPaper], ids=["by update", "by save"])
def test_error_field_holds_the_last_failure_until_a_success(model):
    task = model.objects.create()

    def attempt(action):
        try:
            returned = run(model.objects, "status", action, error_field="error")
            assert returned.error == row(task).error
        except ValueError:
            pass
        return row(task).error

    failure = attempt(raising(ValueError("bad\x00 page \ud800")))
    assert failure.splitlines()[0] == "builtins.ValueError: bad\\x00 page \\ud800"
    assert "Traceback" in failure
    assert attempt(raising(Retry())) == failure
    with pytest.raises(asyncio.CancelledError):
        attempt(raising(asyncio.CancelledError()))
    assert row(task).error == failure
    assert attempt(raising(Abort())).splitlines()[0] == "modelqueue.exceptions.Abort"
    assert attempt(succeed) == ""
    assert row(task).status.state == State.finished


@pytest.mark.parametrize("model", [Paper, StampedPaper])
def test_error_field_holds_a_failure_that_comes_twice(model):
    paper = model.objects.create()
    texts = []
    for _ in range(3):
        with pytest.raises(ValueError, match="again"):
            run(model.objects, "status", raising(ValueError("again")), error_field="error")
        texts.append(row(paper).error)
    assert texts[0].startswith("builtins.ValueError: again")
    assert texts[1] == texts[2]
    assert texts[1].startswith("builtins.ValueError: again")


def test_error_field_holds_why_the_task_was_canceled():
    paper = Paper.objects.create()
    run(Paper.objects, "status", raising(Cancel("no such customer")), error_field="error")
    assert row(paper).error.splitlines()[0] == "modelqueue.exceptions.Cancel: no such customer"


def test_error_field_is_capped():
    paper = Paper.objects.create()
    with pytest.raises(ValueError, match="xxx"):
        run(Paper.objects, "status", raising(ValueError("x" * 100_000)), error_field="error")
    assert 5_000 < len(row(paper).error) <= 10_000


def test_without_its_name_the_error_field_is_left_alone():
    paper = Paper.objects.create(error="mine")
    run(Paper.objects, "status", raising(Abort()))
    run(Paper.objects, "status", succeed)
    assert row(paper).error == "mine"


def test_error_field_is_emptied_when_the_action_assigns_the_status():
    paper = Paper.objects.create(error="old")

    def assign(paper):
        paper.status = Status.waiting(dt.datetime.max)

    run(Paper.objects, "status", assign, error_field="error")
    assert row(paper).error == ""


def test_text_that_the_action_wrote_into_the_error_field_gives_way():
    paper = Paper.objects.create()

    def note(paper):
        paper.error = "my own"

    run(Paper.objects, "status", note, error_field="error")
    assert row(paper).error == ""


# Plain columns


def test_plain_integer_column_is_a_queue_too():
    job = PlainJob.objects.create(status=int(Status.waiting()))
    assert run(PlainJob.objects, "status", raising(Abort())).status.attempts == 1
    returned = run(PlainJob.objects, "status", succeed)
    assert isinstance(returned.status, Status)
    assert row(job).status == returned.status
    assert returned.status.state == State.finished


def test_no_transaction_is_left_open():
    Task.objects.create()
    run(Task.objects, "status", succeed)
    assert connection.get_autocommit()
    assert not connection.in_atomic_block


async def yield_later():
    yield


@pytest.mark.parametrize(
    "made", [lambda: (item for item in "a"), yield_later], ids=["generator", "async generator"]
)
def test_action_that_returns_a_generator_has_failed(made):
    task = Task.objects.create()
    with pytest.raises(TypeError, match=r"returned an? (async )?generator"):
        run(Task.objects, "status", lambda task: made())
    assert stored(task).attempts == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interruption_before_the_action_is_a_failed_attempt(error):
    task = Task.objects.create()

    def interrupt(sender, **facts):
        raise error

    signals.task_claimed.connect(interrupt)
    try:
        with pytest.raises(error):
            run(Task.objects, "status", unexpected)
    finally:
        signals.task_claimed.disconnect(interrupt)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
