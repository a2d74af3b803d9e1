"""Helpers for a user's own tests: the same comes of a task inside a `TestCase` as in production."""

import asyncio
import datetime as dt
import re
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
from asgiref.sync import sync_to_async
from django.db import IntegrityError, OperationalError, connection, transaction
from django.db.models.signals import post_save
from django.test import TestCase, TransactionTestCase

import modelqueue
from modelqueue import Abort, Cancel, Retry, State, Status, backoff, clock
from modelqueue.testing import (
    assert_state,
    assert_tally,
    drain,
    hooks,
    run_one,
    run_to_end,
    run_until,
    travel,
)
from tests.actions import LONG_AGO, MILLISECOND, SECOND, raising, row, stored, succeed
from tests.testapp.models import Errand, ExclusiveTask, Ledger, Paper, ReviewedTask, Task
from tests.testapp.queues import do_errand, review

MINUTE = 60 * SECOND
HOUR = 60 * MINUTE

inside_a_transaction = pytest.mark.django_db
outside_of_one = pytest.mark.django_db(transaction=True)


@pytest.fixture(
    params=[
        pytest.param(True, marks=inside_a_transaction, id="in a TestCase"),
        pytest.param(False, marks=outside_of_one, id="in production"),
    ]
)
def world(request):
    """Once in the transaction of a test, once in none: what holds in both is as in production."""
    assert connection.in_atomic_block is request.param


@pytest.fixture
def words():
    """What an action and its hooks have said, in that order."""
    return []


# In classes of Django


class InsideTestCase(TestCase):
    def test_task_is_run_in_this_thread_and_transaction(self):
        errand = Errand.objects.create(title="x")
        ran = run_one(do_errand)
        assert (ran.queue, ran.task, ran.outcome, ran.error) == (do_errand, errand, "finish", None)
        assert (ran.status, ran.is_lost) == (stored(errand), False)
        assert_state(errand, "finished", attempts=1, field="status")
        assert errand.status.state == State.waiting  # the instance is left alone
        assert run_one(do_errand) is None

    def test_async_action_sees_what_is_not_committed(self):
        errand = Errand.objects.create(title="read 0", review_status=Status.waiting(0))
        assert run_one(review).task == errand
        assert row(errand).log == ["reviewed"]

    async def test_async_test_runs_them_in_the_thread_of_its_connection(self):
        errand = await Errand.objects.acreate(title="review")
        ran = await sync_to_async(drain)(do_errand, review)
        assert [one.queue for one in ran] == [do_errand, review]
        await sync_to_async(assert_state)(errand, "finished", field="review_status")

    def test_hooks_of_the_test_are_left_to_it(self):
        said = []
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            transaction.on_commit(lambda: said.append("of the test"))
            Errand.objects.create(title="x")
            drain(do_errand)
            assert said == []
            transaction.on_commit(lambda: said.append("of the test, too"))
        assert said == ["of the test", "of the test, too"]
        assert len(callbacks) == 2

    def test_queue_runs_again_after_a_failure_in_the_database(self):
        errands = [Errand.objects.create(title="x", pk=number) for number in (1, 2)]

        def clash(sender, instance, **arguments):
            if instance.task == 1:
                Ledger.objects.bulk_create([Ledger(pk=instance.pk, task=5)])

        post_save.connect(clash, sender=Ledger)
        self.addCleanup(post_save.disconnect, clash, sender=Ledger)
        ran = drain(do_errand, raises=False)
        assert [type(one.error) for one in ran].count(IntegrityError) == 3
        assert_state(errands[0], "canceled", attempts=3, field="status")
        assert_state(errands[1], "finished", field="status")


class OutsideOfATransaction(TransactionTestCase):
    def test_task_is_run(self):
        errands = [Errand.objects.create(title=title) for title in ("review", "x")]
        assert len(drain()) == 3  # no queue named: all declared ones
        assert_state(errands[0], "finished", field="review_status")
        assert_state(errands[1], None, field="review_status")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take notes from Python 3.11 on")
@pytest.mark.django_db
def test_error_of_an_action_says_that_it_is_recorded(declare):
    made = declare(Task, "status", name="tasks")(raising(ValueError("no")))
    Task.objects.create()
    with pytest.raises(ValueError, match="no") as caught:
        run_one(made)
    assert "With raises=False it is returned" in caught.value.__notes__[0]


def test_nothing_is_left_on_django():
    assert transaction.Atomic.__exit__ is hooks._django_exit
    assert "on_commit" not in vars(connection)
    assert not hooks._pretences


# Hooks of on_commit


def in_autocommit(say):
    transaction.on_commit(lambda: say("hook"))
    say("after")


def in_block(say, **options):
    with transaction.atomic(**options):
        transaction.on_commit(lambda: say("hook"))
        say("in block")
    say("after")


def in_block_without_savepoint(say):
    in_block(say, savepoint=False)


def in_durable_block(say):
    in_block(say, durable=True)


def in_nested_block(say):
    with transaction.atomic():
        in_block(say)
    say("outside")


def in_block_rolled_back(say):
    try:
        with transaction.atomic():
            transaction.on_commit(lambda: say("hook"))
            raise ValueError
    except ValueError:
        say("after")


def of_a_hook(say):
    def first():
        transaction.on_commit(lambda: say("second"))
        in_block(say)

    with transaction.atomic():
        transaction.on_commit(first)
        transaction.on_commit(lambda: say("third"))


def failing(say):
    with transaction.atomic():
        transaction.on_commit(lambda: say("first"))
        transaction.on_commit(raiser)
        transaction.on_commit(lambda: say("never"))
    say("never")


def failing_of_the_database(say):
    with transaction.atomic():
        transaction.on_commit(lambda: raiser(IntegrityError))
    say("never")


def failing_and_caught(say):
    try:
        transaction.on_commit(raiser)
    except ValueError:
        say("caught")


def failing_robustly(say):
    with transaction.atomic():
        transaction.on_commit(raiser, robust=True)
        transaction.on_commit(lambda: say("second"))
    transaction.on_commit(raiser, robust=True)
    say("after")


def in_block_without_savepoint_rolled_back(say):
    with transaction.atomic(savepoint=False):
        transaction.on_commit(lambda: say("hook"))
        transaction.set_rollback(True)


def before_a_failure(say):
    with transaction.atomic():
        transaction.on_commit(lambda: say("hook"))
    raise ValueError


def no_callable(say):
    try:
        transaction.on_commit("x")
    except TypeError:
        say("refused")


def raiser(error=ValueError):
    raise error("a hook")


PLAIN = [
    (in_autocommit, ["hook", "after"], "finish"),
    (in_block, ["in block", "hook", "after"], "finish"),
    (in_block_without_savepoint, ["in block", "hook", "after"], "finish"),
    (in_durable_block, ["in block", "hook", "after"], "finish"),
    (in_nested_block, ["in block", "after", "hook", "outside"], "finish"),
    (in_block_rolled_back, ["after"], "finish"),
    (in_block_without_savepoint_rolled_back, [], None),
    (of_a_hook, ["second", "in block", "hook", "after", "third"], "finish"),
    (failing, ["first"], "fail"),
    (failing_of_the_database, [], "fail"),
    (failing_and_caught, ["caught"], "finish"),
    (failing_robustly, ["second", "after"], "finish"),
    (before_a_failure, ["hook"], "fail"),
    (no_callable, ["refused"], "finish"),
]

ATOMIC = [
    (in_autocommit, ["after", "hook"], "finish"),
    (in_block, ["in block", "after", "hook"], "finish"),
    (in_durable_block, [], "fail"),
    (in_nested_block, ["in block", "after", "outside", "hook"], "finish"),
    (in_block_rolled_back, ["after"], "finish"),
    (of_a_hook, ["second", "in block", "hook", "after", "third"], "finish"),
    (failing_robustly, ["after", "second"], "finish"),
    (before_a_failure, [], "fail"),
]


def name(value):
    return getattr(value, "__name__", "")


@pytest.mark.parametrize(("action", "said", "outcome"), PLAIN, ids=name)
def test_hook_of_an_action_is_called_as_in_production(action, said, outcome, world, declare, words):
    made = declare(Task, "status", name="tasks")(lambda task: action(words.append))
    Task.objects.create()
    ran = run_one(made, raises=False)
    assert words == said
    assert ran.outcome == (outcome or ran.outcome)
    assert ran.status == stored(ran.task)
    assert ran.status.state == (State.finished if ran.outcome == "finish" else State.waiting)


@pytest.mark.parametrize(("action", "said", "outcome"), ATOMIC, ids=name)
def test_hook_of_an_atomic_action_is_called_with_the_outcome(action, said, outcome, world, declare, words):
    made = declare(Task, "status", name="tasks", atomic=True)(lambda task: action(words.append))
    Task.objects.create()
    ran = run_one(made, raises=False)
    assert (words, ran.outcome) == (said, outcome)


def test_failing_hook_of_an_atomic_action_is_logged_and_no_failure(world, declare, words, caplog):
    def act(task):
        task.data = "changed"
        failing(words.append)

    made = declare(Task, "status", name="tasks", atomic=True)(act)
    task = Task.objects.create()
    ran = run_one(made)
    assert (ran.outcome, ran.task.data, row(task).data) == ("finish", "changed", "changed")
    assert ran.task.status == ran.status == stored(task)
    assert words == ["never", "first"]  # by the action, and by the hook before the one that fails
    assert "its outcome is recorded, but its commit ended with an error" in caplog.text
    assert_state(task, "finished")


def test_hook_of_an_atomic_action_finds_the_task_finished(world, declare, words):
    def act(task):
        transaction.on_commit(lambda: words.append(stored(task).state.name))

    made = declare(Task, "status", name="tasks", atomic=True)(act)
    Task.objects.create()
    run_one(made)
    assert words == ["finished"]


def test_hook_is_called_by_an_async_action(world, declare, words):
    @declare(Task, "status", name="tasks")
    async def act(task):
        await sync_to_async(in_block)(words.append)

    Task.objects.create()
    run_one(act)
    assert words == ["in block", "hook", "after"]


@pytest.fixture
def saving(request, words):
    """What is to be done in the save() of a paper, which the outcome is written by."""

    def connect(work):
        def receive(sender, instance, **arguments):
            if not arguments["created"]:
                work(instance)

        post_save.connect(receive, sender=Paper, weak=False)
        request.addfinalizer(lambda: post_save.disconnect(receive, sender=Paper))

    return connect


def entitle(paper):
    paper.title = "changed"


async def entitle_async(paper):
    paper.title = "changed"


ENTITLE = [(entitle, {}), (entitle, {"atomic": True}), (entitle_async, {})]


@pytest.mark.parametrize(("action", "options"), ENTITLE)
def test_hook_of_the_outcome_finds_it_written(action, options, world, declare, words, saving):
    saving(lambda paper: transaction.on_commit(lambda: words.append(row(paper).status.state.name)))
    made = declare(Paper, "status", name="papers", **options)(action)
    Paper.objects.create()
    assert run_one(made).outcome == "finish"
    assert words == ["finished"]


@pytest.mark.parametrize(("action", "options"), ENTITLE)
def test_failing_hook_of_the_outcome_is_logged_and_no_failure(
    action, options, world, declare, saving, caplog
):
    saving(lambda paper: transaction.on_commit(raiser))
    made = declare(Paper, "status", name="papers", **options)(action)
    paper = Paper.objects.create()
    ran = run_one(made)
    assert (ran.outcome, row(paper).title) == ("finish", "changed")
    assert "its outcome is recorded, but its commit ended with an error" in caplog.text


def test_hook_that_takes_its_outcome_away_is_raised(world, declare, saving):
    def fail(paper):
        Paper.objects.filter(pk=paper.pk).update(status=Status.canceled(5))
        raiser()

    saving(lambda paper: transaction.on_commit(lambda: fail(paper)))
    made = declare(Paper, "status", name="papers")(entitle)
    paper = Paper.objects.create()
    assert run_one(made, raises=False).is_lost
    assert stored(paper) == Status.canceled(5)


def test_ctrl_c_in_a_hook_of_the_outcome_ends_the_test_with_the_outcome_recorded(world, declare, saving):
    saving(lambda paper: transaction.on_commit(lambda: raiser(KeyboardInterrupt)))
    made = declare(Paper, "status", name="papers")(entitle)
    paper = Paper.objects.create()
    with pytest.raises(KeyboardInterrupt):
        run_one(made, raises=False)
    assert_state(paper, "finished")


def test_task_that_a_hook_enqueues_is_run_by_the_same_drain(world, declare):
    second = declare(Paper, "status", name="papers")(succeed)

    @declare(Task, "status", name="tasks")
    def first(task):
        with transaction.atomic():
            transaction.on_commit(Paper.objects.create)

    Task.objects.create()
    assert [ran.queue for ran in drain(second, first)] == [first, second]


def test_action_that_runs_another_queue_has_its_hooks_called(world, declare, words):
    inner = declare(Paper, "status", name="papers")(lambda paper: in_block(words.append))

    @declare(Task, "status", name="tasks")
    def outer(task):
        run_one(inner)
        words.append("inner is over")
        in_autocommit(words.append)

    Task.objects.create()
    Paper.objects.create()
    run_one(outer)
    assert words == ["in block", "hook", "after", "inner is over", "hook", "after"]


@inside_a_transaction
def test_other_threads_keep_their_hooks(declare, words):
    def other():
        with transaction.atomic():
            transaction.on_commit(lambda: words.append("hook"))
            words.append("in block")
        connection.close()

    def act(task):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    Task.objects.create()
    run_one(declare(Task, "status", name="tasks")(act))
    assert words == ["in block", "hook"]


@pytest.mark.parametrize("block", [nullcontext, transaction.atomic])
def test_what_an_action_saved_stays_when_the_database_refuses_what_follows(block, world, declare):
    def act(paper):
        with block():
            paper.title = "saved"
            paper.save()
        Ledger.objects.bulk_create([Ledger(pk=1, task=1), Ledger(pk=1, task=2)])

    made = declare(Paper, "status", name="papers")(act)
    paper = Paper.objects.create()
    assert isinstance(run_one(made, raises=False).error, IntegrityError)
    assert row(paper).title == "saved"


# What is raised, and what is told


def test_failure_is_recorded_and_raised(world):
    errands = [Errand.objects.create(title="fail so", status=Status.waiting(number)) for number in (1, 2)]
    for call in (run_one, drain):
        with pytest.raises(ValueError, match="so"):
            call(do_errand)
    assert [stored(one).attempts for one in errands] == [1, 1]


def test_failures_are_collected_on_request(world):
    Errand.objects.bulk_create([Errand(title=title) for title in ("fail so", "", "miss it")])
    ran = drain(do_errand, raises=False)
    assert sorted(one.outcome for one in ran) == ["fail"] * 4 + ["finish"]
    assert {repr(one.error) for one in ran} == {"ValueError('so')", "KeyError('it')", "None"}
    assert_tally(do_errand, finished=1, canceled=2)


async def fail_async(task):
    raise ValueError("so")


def test_failure_of_an_async_action_is_raised_or_collected(world, declare):
    made = declare(Task, "status", name="tasks")(fail_async)
    task = Task.objects.create()
    assert repr(run_one(made, raises=False).error) == "ValueError('so')"
    with pytest.raises(ValueError, match="so"):
        run_one(made)
    assert_state(task, "waiting", attempts=2)


@pytest.mark.parametrize("error", [Retry(HOUR), Abort(HOUR), Cancel()])
def test_steering_is_no_failure(error, world, declare):
    made = declare(Task, "status", name="tasks")(raising(error))
    task = Task.objects.create()
    ran = run_one(made)
    assert (ran.outcome, ran.error) == (type(error).__name__.lower(), error)
    assert_state(task, "canceled" if isinstance(error, Cancel) else "waiting")


def test_ctrl_c_is_never_collected(world, declare):
    made = declare(Task, "status", name="tasks")(raising(KeyboardInterrupt()))
    Task.objects.create()
    with pytest.raises(KeyboardInterrupt):
        drain(made, raises=False)
    assert_tally(made, waiting=1)


def test_cancellation_is_never_collected(world, declare):
    @declare(Task, "status", name="tasks")
    async def act(task):
        raise asyncio.CancelledError

    task = Task.objects.create()
    with pytest.raises(asyncio.CancelledError):
        drain(act, raises=False)
    assert_state(task, "waiting", attempts=0)


def test_task_that_is_given_back_is_never_run_again_and_again(world, declare, monkeypatch):
    def hold(*arguments):
        raise OperationalError("away")

    made = declare(Task, "status", name="tasks", atomic=True)(succeed)
    task = Task.objects.create()
    monkeypatch.setattr("modelqueue.engines.base.Engine.hold", hold)
    with pytest.raises(OperationalError, match="away"):
        drain(made, raises=False)
    assert_state(task, "waiting", attempts=0)


def test_action_is_told_of_its_queue(world, declare):
    seen = []
    made = declare(Task, "status", name="tasks")(lambda task: seen.append(modelqueue.current().queue))
    Task.objects.create()
    run_one(made)
    assert seen == [made]


def test_error_of_the_library_itself_is_raised(world, declare, monkeypatch):
    made = declare(Task, "status", name="tasks")(fail_async)
    Task.objects.create()
    monkeypatch.setattr("modelqueue.engines.base.Engine.compare_and_set", lambda *args, **others: 1 / 0)
    monkeypatch.setattr("modelqueue.engines.base.Engine._way_to_claim_at_once", lambda *args: None)
    with pytest.raises(ZeroDivisionError):
        run_one(made, raises=False)


def test_lost_outcome_is_told(world, declare):
    @declare(Task, "status", name="tasks")
    def act(task):
        Task.objects.update(status=Status.canceled(5))

    Task.objects.create()
    ran = run_one(act)
    assert (ran.is_lost, ran.outcome, ran.status) == (True, "finish", Status.canceled(5))


def test_row_that_the_action_has_deleted_is_told_with_the_outcome(world, declare):
    made = declare(Task, "status", name="tasks")(lambda task: task.delete())
    Task.objects.create()
    ran = run_one(made)
    assert (ran.outcome, ran.status.state, ran.is_lost) == ("finish", State.finished, False)
    assert_tally(made)


# Time


@inside_a_transaction
def test_retries_are_run_when_their_delay_is_over(declare):
    delay = backoff.exponential(MINUTE, jitter=0)
    made = declare(Task, "status", name="tasks", retry=3, delay=delay)(raising(ValueError()))
    task = Task.objects.create()
    with travel() as now:
        begin = now()
        assert len(drain(made, raises=False)) == 1
        assert drain(made) == []
        ran = run_until(3 * MINUTE + SECOND, made, raises=False)
        assert [round((one.at - begin) / MINUTE, 2) for one in ran] == [1, 3]
        assert now() - begin > 3 * MINUTE + SECOND  # it stays there
        assert_state(task, "waiting", attempts=3)
        assert run_until(MINUTE, made) == []
        assert len(run_until(begin + HOUR, made, raises=False)) == 1
    assert_state(task, "canceled", attempts=4)


@inside_a_transaction
def test_clock_goes_back_to_the_present_outside_of_travel(declare):
    made = declare(Task, "status", name="tasks")(succeed)
    Task.objects.create(status=Status.waiting(modelqueue.now() + HOUR))
    assert run_until(HOUR - MINUTE, made) == []
    (ran,) = run_until(HOUR + SECOND, made)
    assert ran.at - modelqueue.now() > HOUR - MINUTE
    assert modelqueue.now() - dt.datetime.now(dt.timezone.utc) < SECOND


@inside_a_transaction
def test_tasks_of_several_queues_are_run_in_the_order_of_their_times(declare):
    tasks = declare(Task, "status", name="tasks")(succeed)
    papers = declare(Paper, "status", name="papers")(succeed)
    begin = modelqueue.now()
    for minutes in (4, 2):
        Task.objects.create(status=Status.waiting(begin + minutes * MINUTE))
        Paper.objects.create(status=Status.waiting(begin + (minutes - 1) * MINUTE))
    ran = run_until(HOUR, tasks, papers)
    assert [one.queue for one in ran] == [papers, tasks, papers, tasks]
    assert [round((one.at - begin) / MINUTE) for one in ran] == [1, 2, 3, 4]


@inside_a_transaction
def test_task_of_a_dead_worker_is_run_when_its_lease_is_over(declare):
    made = declare(Task, "status", name="tasks", lease=30 * SECOND)(succeed)
    begin = modelqueue.now()
    task = Task.objects.create(status=Status.working(begin))
    Task.objects.create(status=Status.finished())
    wait = made.recovery().holds
    assert drain(made) == []
    assert run_until(wait - SECOND, made) == []
    (ran,) = run_until(wait + SECOND, made)
    assert round((ran.at - begin) / SECOND) == round(wait / SECOND)
    assert_state(task, "finished", attempts=2)


@inside_a_transaction
def test_what_is_due_after_the_time_is_not_run_although_the_clock_goes_on(declare):
    begin = modelqueue.now()

    @declare(Task, "status", name="tasks")
    def act(task):
        clock.in_use().move(SECOND)

    statuses = [0, begin + MINUTE, begin + MINUTE, begin + MINUTE + 100 * MILLISECOND]
    for status in statuses:
        Task.objects.create(status=Status.waiting(status))
    assert len(run_until(begin + MINUTE, act)) == 3
    assert_tally(act, finished=3, waiting=1)


@inside_a_transaction
def test_run_to_end_leaves_what_waits_for_ever(declare):
    made = declare(Task, "status", name="tasks", retry=8, delay=30 * 24 * HOUR)(raising(ValueError()))
    Task.objects.create(status=Status.waiting(priority=0))
    never = [
        Task.objects.create(status=Status.waiting(dt.datetime.max)),
        Task.objects.create(status=Status.waiting(priority=29991301000000000)),  # no such month
    ]
    with travel() as now:
        begin = now()
        assert len(run_to_end(made, raises=False)) == 9
        assert 240 <= (now() - begin).days < 241
    assert [stored(one).state for one in never] == [State.waiting] * 2
    assert_tally(made, canceled=1, waiting=2)


@inside_a_transaction
def test_lease_that_never_ends_is_no_moment(declare):
    made = declare(Task, "status", name="tasks", lease=999999 * 24 * HOUR)(succeed)
    Task.objects.create(status=Status.working())
    assert run_to_end(made) == []


@pytest.mark.parametrize("when", [LONG_AGO, -SECOND])
def test_time_that_is_over_is_refused(when, db):
    with pytest.raises(ValueError, match=r"run_until\(.*: that time is over"):
        run_until(when, do_errand)


def test_travel_sets_the_clock_that_the_library_asks(db):
    for to in (dt.datetime(2040, 1, 1), dt.datetime(2040, 1, 1, 1, tzinfo=dt.timezone(HOUR))):
        with travel(to):
            assert str(modelqueue.now()).startswith("2040-01-01 00:00:00")
            assert str(Task.objects.create().status.parse()[1]).startswith("2040-01-01 00:00:00")
    assert modelqueue.now().year < 2040


def test_clock_goes_on_and_is_moved():
    with travel(2 * HOUR) as now:
        first = now()
        while now() == first:
            pass
        assert modelqueue.now() > first
        now.move(-HOUR)
        assert first - modelqueue.now() > HOUR - MINUTE
        with travel(HOUR):
            assert modelqueue.now() - first < MINUTE
        now.move(LONG_AGO)
        assert modelqueue.now() - LONG_AGO < MINUTE
        now.move(dt.datetime.max)
        assert modelqueue.now().year == 9999
        with pytest.raises(TypeError, match=r"A time is a datetime\.datetime or, from now on, .*, not 5"):
            now.move(5)


def test_moved_clock_is_right_where_the_machine_follows_another():
    try:
        clock.shift(HOUR)
        with travel(LONG_AGO) as now:
            assert modelqueue.now() - LONG_AGO < MINUTE
            now.move(HOUR)
            assert HOUR <= modelqueue.now() - LONG_AGO < HOUR + MINUTE
    finally:
        clock.shift(None)


@travel(LONG_AGO)
def test_travel_is_a_decorator():
    assert modelqueue.now().year == 2020


@inside_a_transaction
def test_no_lease_comes_twice_however_often_a_task_is_tried_again(declare):
    leases = []

    @declare(Task, "status", name="tasks", retry=None)
    def act(task):
        leases.append(task.status)
        raise Retry if len(leases) < 20 else Cancel

    Task.objects.create()
    with travel(LONG_AGO + 100 * 365 * 24 * HOUR):
        assert len(drain(act)) == 20  # each was due at once
    assert len(set(leases)) == 20


# What has no end


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (drain, Retry()),
        (run_to_end, Retry(MINUTE)),
        (lambda *queues, **options: run_until(HOUR, *queues, **options), Retry()),
    ],
)
def test_endless_retries_end_with_an_error(call, error, declare, db):
    made = declare(Task, "status", name="tasks")(raising(error))
    Task.objects.create(status=Status.finished())
    Task.objects.create(status=Status.waiting(0))
    task = Task.objects.create(status=Status.waiting(0))
    text = (
        r"(drain|run_to_end|run_until)\(\) has made 15 attempts, and .* due\. [78] of them were on "
        r"testapp\.Task \d+ of tasks; the last outcome was 'retry'\. .* raise limit=15\."
    )
    with pytest.raises(AssertionError, match=text):
        call(made, limit=15)
    assert_state(task, "waiting", attempts=0)


def test_limit_is_no_error_when_it_was_enough(db):
    Errand.objects.bulk_create([Errand(), Errand()])
    assert len(drain(do_errand, limit=2)) == 2


def test_row_that_can_not_be_claimed_is_passed_over(declare, db):
    if not connection.features.supports_partial_indexes:
        pytest.skip("needs constraints with a condition")
    made = declare(ExclusiveTask, "status", name="exclusive")(succeed)
    ExclusiveTask.objects.create(group=1, status=Status.working(dt.datetime.max))
    blocked = ExclusiveTask.objects.create(group=1, status=Status.waiting(0))
    free = ExclusiveTask.objects.create(group=2, status=Status.waiting(modelqueue.now() + MINUTE))
    assert [ran.task for ran in run_until(HOUR, made)] == [free]
    assert_state(blocked, "waiting", attempts=0)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: run_one(succeed), TypeError, "A queue is what the decorator .*, not <function succeed"),
        (lambda: drain(do_errand, succeed), TypeError, "A queue is what the decorator"),
        (lambda: drain(do_errand, limit=0), ValueError, "limit=0 would run nothing"),
        (lambda: drain(do_errand, limit=True), TypeError, "limit is an int, 1 or more, not True"),
        (lambda: drain(do_errand, limit="5"), TypeError, "limit is an int, 1 or more, not '5'"),
        (lambda: run_until(5, do_errand), TypeError, "A time is a datetime.datetime"),
        (lambda: assert_tally(5), TypeError, "counts a Queue, a QuerySet or a Manager, not 5"),
        (lambda: assert_tally(Errand.objects, finished=1), ValueError, "It has the fields status, review_st"),
        (lambda: assert_tally(Ledger.objects), ValueError, "Ledger is meant. It has none"),
        (lambda: assert_tally(Errand.objects, "title"), TypeError, "Errand.title is a CharField"),
        (lambda: assert_state(Task(), "over"), ValueError, "There is no state 'over'"),
    ],
)
def test_wrong_argument_is_refused(call, error, text, db):
    with pytest.raises(error, match=text):
        call()


# Assertions


@pytest.mark.parametrize(
    ("status", "state", "attempts", "text"),
    [
        (Status.waiting(5, 2), "finished", None, r"waiting with attempts=2 \(5\), not finished\.$"),
        (Status.waiting(5, 2), "waiting", 3, r"attempts=2 \(5\), not waiting with attempts=3\."),
        (None, State.waiting, None, r"The review_status of testapp.Errand \d+ is NULL, not waiting\."),
        (None, "waiting", 0, "NULL, not waiting with attempts=0"),
        (Status.canceled(LONG_AGO), None, None, r"canceled .*\(2020-01-01 00:00:00\+00:00\), not NULL\."),
        (Status(7), "waiting", None, r"unknown with attempts=7 \(0\), not waiting"),
    ],
)
def test_wrong_state_is_told_with_what_stands_there(status, state, attempts, text, db):
    errand = Errand.objects.create(review_status=status)
    with pytest.raises(AssertionError, match=text):
        assert_state(errand, state, attempts=attempts, field="review_status")


def test_right_state_passes(db):
    errand = Errand.objects.create(status=Status.waiting(5, 2))
    for state in ("waiting", 2, State.waiting):
        assert_state(errand, state, field="status")
        assert_state(errand, state, attempts=2, field="status")
    assert_state(errand, None, field="review_status")


def test_wrong_state_is_told_with_the_failure(db):
    task = ReviewedTask.objects.create(error="builtins.ValueError: so\nTraceback")
    with pytest.raises(AssertionError, match=r"not finished\. It failed with: builtins.ValueError: so$"):
        assert_state(task, "finished")


def test_row_that_is_gone_is_told(db):
    task = Task.objects.create()
    Task.objects.all().delete()
    with pytest.raises(
        AssertionError, match=rf"testapp\.Task {task.pk} has no row, so its status is not fin"
    ):
        assert_state(task, "finished")
    with pytest.raises(AssertionError, match="None has no row"):
        assert_state(Task(), "waiting")


def test_tally_is_of_all_states(db):
    Errand.objects.bulk_create([Errand(status=Status.finished()), Errand(status=Status.waiting(0))])
    assert_tally(do_errand, finished=1, waiting=1)
    assert_tally(Errand.objects.filter(status__state="waiting"), "status", waiting=1)
    text = re.escape("The tasks of testapp.do_errand are 1 waiting, 1 finished, not 1 finished.")
    with pytest.raises(AssertionError, match=text):
        assert_tally(do_errand, finished=1)
    with pytest.raises(AssertionError, match=r"of testapp\.Task are none, not 2 created, 1 working, 3 canc"):
        assert_tally(Task.objects, created=2, working=1, canceled=3)


# pytest


def test_module_needs_no_pytest():
    code = "import sys; sys.modules['pytest'] = None; import modelqueue.testing"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


FIXTURE = """
import datetime as dt
import modelqueue

def test_clock_is_moved(modelqueue_clock):
    modelqueue_clock.move(dt.datetime(2040, 1, 1))
    assert modelqueue.now().year == 2040

def test_clock_is_back():
    assert modelqueue.now().year < 2040
"""


def test_fixture_of_the_plugin_is_a_clock_for_one_test(tmp_path):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["modelqueue.testing.plugin"]')
    (tmp_path / "test_time.py").write_text(FIXTURE)
    arguments = ["-p", "no:randomly", "-p", "no:cacheprovider", "-p", "no:django", "-c", "conftest.ini", "-q"]
    (tmp_path / "conftest.ini").write_text("[pytest]")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr
