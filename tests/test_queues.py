"""Declared queues: what may be declared, where they are found, and what a queue can do."""

import datetime as dt
import functools
import importlib
import inspect
import re

import pytest
from asgiref.sync import async_to_sync
from django.db import OperationalError, models

import modelqueue
from modelqueue import State, Status, clock, queues
from modelqueue.fields import declared_on
from modelqueue.verbs import Pruned
from tests.actions import MILLISECOND, SECOND, heard, row, stored, succeed
from tests.testapp.models import Errand, Job, Paper, PlainJob, PrintJob, ProxyJob, Quotation, Receipt, Task
from tests.testapp.queues import do_errand, review

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])


# Declaring


def test_queues_of_the_apps_are_found():
    assert [one.name for one in modelqueue.declared_queues()] == ["testapp.do_errand", "testapp.review"]
    assert (do_errand.model, do_errand.lease, do_errand.policy.retry) == (Errand, 3 * SECOND, 2)
    assert re.search(r"testapp/queues\.py:\d+$", do_errand.where)
    assert repr(review) == "<Queue testapp.review>"


def test_queue_is_called_like_its_action():
    errand = Errand.objects.create(title="x")
    do_errand(errand)
    assert errand.log == ["x"]
    assert do_errand.__doc__.startswith("Do what the title says")
    assert do_errand.__name__ == "do_errand"


ORIGINS = {
    "model": Task,
    "manager": Task.objects,
    "queryset": Task.objects.filter(data="x"),
    "callable": lambda: Task.objects.filter(data="x"),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_queue_is_over_a_model_a_manager_a_queryset_or_a_callable(origin, declare):
    made = declare(ORIGINS[origin], "status", name="tasks")(succeed)
    task = Task.objects.create(data="x")
    other = Task.objects.create()
    assert made.run() == task
    assert made.run() == (other if origin in ("model", "manager") else None)


class Lately(models.Manager):
    def get_queryset(self):
        return super().get_queryset().filter(status__gte=int(Status.waiting(clock.now() - SECOND)))


@pytest.mark.parametrize(
    ("origin", "is_same"),
    [
        (Task, True),
        (Task.objects, True),
        (Task.objects.filter(data="a"), True),
        (lambda: Task.objects.filter(data="a"), False),
        (Lately, False),
    ],
)
def test_rows_are_looked_at_anew_for_each_claim_where_they_may_be_others(origin, is_same, declare):
    if origin is Lately:
        origin = Lately()
        origin.model = Task
    queue = declare(origin, "status", name="tasks")(succeed)
    assert (queue.source() is queue.source()) == is_same
    assert (queue.shared() is queue.shared()) == is_same
    assert queue.shared().below == 3


def test_router_is_asked_for_each_claim(declare, settings):
    queue = declare(Task, "status", name="tasks")(succeed)
    assert queue.source().using == "default"
    settings.DATABASE_ROUTERS = [Elsewhere()]
    assert (queue.source().using, queue.shared().using) == ("other", "other")


class Elsewhere:
    def db_for_write(self, model, **hints):
        return "other"


def test_callable_is_called_for_each_claim(declare):
    names = ["a"]
    made = declare(lambda: Task.objects.filter(data__in=names), "status", name="tasks")(succeed)
    task = Task.objects.create(data="b")
    assert made.run() is None
    names.append("b")
    assert made.run() == task


def nameless():
    return functools.partial(succeed)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lease": 2 * SECOND}, ValueError, "lease=0:00:02 is shorter than 3 s.*Give 3 s or more"),
        ({"lease": 30}, TypeError, "lease is a datetime.timedelta, .*not 30"),
        ({"retry": 9}, ValueError, "retry=9 is out of range"),
        ({"timeout": 5}, TypeError, "timeout is a datetime.timedelta"),
        ({"delay": -SECOND}, ValueError, "delay=.* is negative"),
        ({"atomic": "yes"}, TypeError, "atomic is True or False, not 'yes'"),
        ({"slots": 0}, ValueError, "slots=0 would never run a task"),
        ({"slots": True}, TypeError, "slots is an int"),
        ({"slots": 2.5}, TypeError, "slots is an int"),
        ({"cancel_on": "KeyError"}, TypeError, "cancel_on is an exception class or a tuple"),
        ({"cancel_on": (KeyError, 5)}, TypeError, "cancel_on .* 5 is none"),
        ({"error_field": "error"}, ValueError, "Task has no field 'error'"),
        ({"name": "two words"}, ValueError, "name='two words': a queue is called by letters"),
        ({"name": 5}, ValueError, "name=5: a queue is called by letters"),
    ],
)
def test_wrong_option_is_refused(options, error, text, declare):
    with pytest.raises(error, match=text):
        declare(Task, "status", **{"name": "tasks", **options})(succeed)
    assert not declared_on(Task._meta.get_field("status"))


@pytest.mark.parametrize(
    ("origin", "field", "error", "text"),
    [
        (Task, "state", ValueError, "Task has no field 'state'"),
        (PlainJob, "status", TypeError, "PlainJob.status is a BigIntegerField, which save"),
        (Task.objects.all()[:3], "status", ValueError, "can not be claimed from a queryset with a slice"),
        (5, "status", TypeError, "declared over a model, .*, or a callable .* not over 5"),
        (list, "status", TypeError, r"Tasks come from a QuerySet or a Manager, not from \[\]"),
    ],
)
def test_wrong_source_is_refused(origin, field, error, text, declare):
    with pytest.raises(error, match=text):
        declare(origin, field, name="tasks")(succeed)


async def asynchronous(task): ...


def takes_two(task, other): ...


def takes_none(): ...


@pytest.mark.parametrize(
    ("action", "options", "text"),
    [
        (asynchronous, {"atomic": True}, "atomic=True is not for the action .* async function"),
        (takes_two, {}, "can not be called with a task alone: missing a required argument: 'other'"),
        (takes_none, {}, "can not be called with a task alone: too many positional arguments"),
        ("succeed", {}, "The action is a callable"),
    ],
)
def test_wrong_action_is_refused(action, options, text, declare):
    with pytest.raises((TypeError, AttributeError), match=text):
        declare(Task, "status", name="tasks", **options)(action)


def test_action_whose_arguments_nobody_knows_is_taken_as_it_is(declare):
    """As some of those that are written in C."""

    class Action:
        __signature__ = object()  # of which `inspect` makes nothing
        __qualname__ = "Action"

        def __call__(self, task):
            seen.append(task)

    seen = []
    with pytest.raises(TypeError):
        inspect.signature(Action())
    made = declare(Task, "status", name="tasks")(Action())
    task = Task.objects.create()
    assert made.run() == task
    assert seen == [task]


def test_action_without_a_name_needs_one(declare):
    with pytest.raises(ValueError, match="has no name to call its queue by"):
        declare(Task, "status")(nameless())
    assert declare(Task, "status", name="tasks")(nameless()).name == "tasks"


def test_two_queues_of_one_name_are_refused_with_both_places(declare):
    declare(Task, "status", name="tasks")(succeed)
    with pytest.raises(ValueError, match=r"'tasks': at .*test_queues.py:\d+ and at .*_queues.py:\d+\."):
        declare(Paper, "status", name="tasks")(succeed)


def test_module_that_is_imported_again_declares_its_queues_anew(declare):
    for _ in range(2):
        made = declare(Task, "status", name="tasks")(succeed)
    assert declared_on(Task._meta.get_field("status")) == [made]
    assert queues._declared["tasks"] is made


MODULE = """
import modelqueue
from tests.testapp.models import Task


def declare_for(data):
    @modelqueue.queue(Task.objects.filter(data=data), "status", name="tasks")
    def work(task): ...


declare_for("a")
"""


def test_queue_that_a_function_declares_twice_for_other_tasks_is_refused(declare, tmp_path, monkeypatch):
    (tmp_path / "made_by_function.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("made_by_function")
    first = queues._declared["tasks"]
    with pytest.raises(ValueError, match=r"There are two queues of the name 'tasks'.*name="):
        module.declare_for("b")
    assert queues._declared["tasks"] is first
    importlib.reload(module)
    assert queues._declared["tasks"] is not first
    assert declared_on(Task._meta.get_field("status")) == [queues._declared["tasks"]]


def test_attributes_of_an_action_hide_nothing_of_its_queue(declare):
    def work(task): ...

    work.retry = work.name = work.claim_values = 5
    made = declare(Task, "status", name="tasks")(work)
    assert (made.retry(), made.name, made.claim_values) == (0, "tasks", None)


@pytest.mark.parametrize("model", [Job, ProxyJob, PrintJob])
def test_run_refuses_a_field_that_has_a_declared_queue(model, declare):
    declare(Job, "status", name="jobs")(succeed)
    job = model.objects.create()
    for call in (modelqueue.run, async_to_sync(modelqueue.arun)):
        with pytest.raises(
            ValueError,
            match=r"testapp\.Job\.status belongs to the declared queue 'jobs' \(.*Call succeed\.a?run\(\)",
        ):
            call(model.objects, "status", succeed)
    assert stored(job).state == State.waiting
    modelqueue.run(model.objects.filter(review_status__isnull=False), "review_status", succeed)


# Running


def test_run_runs_the_next_task_and_records():
    errand = Errand.objects.create()
    assert do_errand.run() == errand
    assert (stored(errand).state, row(errand).log) == (State.finished, ["done"])
    assert do_errand.run() is None


def test_failure_is_recorded_and_raised():
    errand = Errand.objects.create(title="fail so")
    with pytest.raises(ValueError, match="so"):
        do_errand.run()
    assert (stored(errand).state, stored(errand).attempts) == (State.waiting, 1)
    assert row(errand).error.startswith("builtins.ValueError: so")


def test_exception_of_cancel_on_ends_the_task_at_once():
    errand = Errand.objects.create(title="miss it")
    with heard("task_finished") as events, pytest.raises(KeyError):
        do_errand.run()
    assert (stored(errand).state, stored(errand).attempts) == (State.canceled, 1)
    assert [facts["outcome"] for _, facts in events] == ["fail"]
    assert row(errand).error.startswith("builtins.KeyError")


def test_async_action_is_for_arun():
    errand = Errand.objects.create(status=Status.created(), review_status=Status.waiting(0))
    for call in (review.run, review.drain):
        with pytest.raises(TypeError, match=r"testapp\.review has an async action"):
            call()
    assert async_to_sync(review.arun)() == errand
    assert stored(errand, "review_status").state == State.finished
    assert async_to_sync(review.arun)() is None


def test_two_fields_are_two_stages():
    errand = Errand.objects.create(title="review")
    do_errand.run()
    async_to_sync(review.arun)()
    assert row(errand).log == ["review", "reviewed"]
    assert [stored(errand, name).state for name in ("status", "review_status")] == [State.finished] * 2


def test_drain_runs_all_that_is_due_failures_included():
    Errand.objects.bulk_create([Errand(title=title) for title in ("", "fail", "miss it", "")])
    later = Errand.objects.create(status=Status.waiting(modelqueue.now() + 60 * SECOND))
    assert do_errand.drain() == 6  # three attempts of the one that fails
    assert do_errand.tally() == {"created": 0, "waiting": 1, "working": 0, "finished": 2, "canceled": 2}
    assert stored(later).state == State.waiting


def test_drain_ends_at_ctrl_c(declare):
    def interrupt(task):
        raise KeyboardInterrupt

    made = declare(Task, "status", name="tasks", retry=0)(interrupt)
    Task.objects.bulk_create([Task(), Task()])
    with pytest.raises(KeyboardInterrupt):
        made.drain()
    assert made.tally()["canceled"] == 1


@pytest.mark.parametrize("atomic", [False, True])
def test_tasks_of_dead_workers_are_recovered_by_the_lease_and_not_the_timeout(atomic, declare):
    made = declare(Task, "status", name="tasks", lease=10 * SECOND, atomic=atomic)(succeed)
    wait = made.recovery().lease
    alive = Task.objects.create(status=Status.working(modelqueue.now() - wait + 2 * SECOND))
    dead = Task.objects.create(status=Status.working(modelqueue.now() - wait - MILLISECOND))
    assert made.run() == dead
    assert (stored(dead).attempts, stored(alive).state) == (2, State.working)


def test_longest_lease_of_several_queues_on_a_field_counts(declare):
    short = declare(Task, "status", name="short", lease=10 * SECOND)(succeed)
    longer = declare(Task, "status", name="longer", lease=60 * SECOND)(succeed)
    assert short.recovery().lease == longer.recovery().lease >= 60 * SECOND


def test_lease_of_queues_that_share_no_row_is_their_own(declare):
    short = declare(Task.objects.filter(data="a"), "status", name="short", lease=10 * SECOND)(succeed)
    longer = declare(Task.objects.filter(data="b"), "status", name="longer", lease=60 * SECOND)(succeed)
    short.group, longer.group = "a", "b"
    assert longer.recovery().lease - short.recovery().lease == 50 * SECOND


# The verbs


def test_enqueue_takes_all_some_or_one():
    errands = [Errand.objects.create(status=Status.created(number)) for number in range(3)]
    assert do_errand.enqueue(errands[0]) == 1
    assert do_errand.enqueue(Errand.objects.filter(pk=errands[1].pk), priority=5) == 1
    assert do_errand.enqueue(at=dt.datetime(2099, 1, 1)) == 3
    assert do_errand.tally()["waiting"] == 3


VERBS = {"enqueue": State.finished, "retry": State.canceled, "cancel": State.waiting}


@pytest.mark.parametrize("verb", VERBS)
def test_verb_is_for_one_task_for_some_or_without_an_argument_for_all(verb):
    first, *_ = errands = [Errand.objects.create(status=Status.combine(VERBS[verb], 5, 0)) for _ in range(4)]
    change = getattr(do_errand, verb)
    assert change(first) == 1
    assert change(Errand.objects.filter(pk=errands[1].pk)) == 1
    assert change() == 2


@pytest.mark.parametrize("verb", VERBS)
def test_verb_refuses_what_is_no_task_of_the_queue(verb):
    errand = Errand.objects.create(status=Status.combine(VERBS[verb], 5, 0))
    change = getattr(do_errand, verb)
    with pytest.raises(TypeError, match=rf"{verb}\(\) takes .* not None. Call {verb}\(\) without it for all"):
        change(Errand.objects.filter(title="nobody").first())
    for other in (Task.objects.all(), Task.objects.create()):
        with pytest.raises(TypeError, match=rf"{verb}\(\) .* takes tasks of Errand, not of Task"):
            change(other)
    with pytest.raises(ValueError, match=rf"{verb}\(\): .* is not saved"):
        change(Errand())
    assert stored(errand) == errand.status


@pytest.mark.parametrize("model", [Job, ProxyJob, PrintJob])
def test_verb_takes_tasks_of_kinds_of_the_model(model, declare):
    made = declare(Job, "status", name="jobs")(succeed)
    first, _ = model.objects.create(), model.objects.create()
    assert made.cancel(first) == 1
    assert made.cancel(model.objects.all()) == 1


def test_tally_counts_where_claims_are_made(declare, settings):
    class Replica:
        def db_for_read(self, model, **hints):
            return "other"

        def db_for_write(self, model, **hints):
            return "default"

    made = declare(Task, "status", name="tasks")(succeed)
    settings.DATABASE_ROUTERS = [Replica()]
    Task.objects.create()
    assert made.tally()["waiting"] == 1


def test_claimed_task_is_released_as_it_was():
    before = [Errand.objects.create(status=Status.waiting(number, number)).status for number in range(2)]
    claimed = do_errand.claim(5)
    assert [task.status.state for task in claimed] == [State.working] * 2
    assert do_errand.run() is None
    assert [do_errand.release(task) for task in claimed] == [True, True]
    assert [stored(task) for task in claimed] == before
    with pytest.raises(ValueError, match=r"was not claimed by Queue.claim\(\), or is given back already"):
        do_errand.release(claimed[0])


def test_task_that_somebody_has_taken_is_not_released():
    Errand.objects.create()
    (task,) = do_errand.claim()
    Errand.objects.update(status=Status.canceled(5))
    assert do_errand.release(task) is False
    assert stored(task) == Status.canceled(5)


def test_row_that_can_not_be_claimed_as_an_instance_has_failed(monkeypatch):
    broken, sound = Errand.objects.create(), Errand.objects.create()
    from_db = Errand.from_db.__func__

    def fail_for_one(cls, using, names, values):
        if values[list(names).index("id")] == broken.pk:
            raise LookupError
        return from_db(cls, using, names, values)

    monkeypatch.setattr(Errand, "from_db", classmethod(fail_for_one))
    assert do_errand.claim(2) == [sound]
    monkeypatch.undo()
    assert (stored(broken).state, stored(broken).attempts) == (
        State.canceled,
        1,
    )  # LookupError is in cancel_on


def test_failure_that_can_not_be_recorded_costs_nobody_the_other_tasks(monkeypatch, caplog):
    broken, sound = Errand.objects.create(), Errand.objects.create()
    from_db = Errand.from_db.__func__

    def fail_for_one(cls, using, names, values):
        if values[list(names).index("id")] == broken.pk:
            raise LookupError
        return from_db(cls, using, names, values)

    def fail(self, error):
        raise OperationalError("the disk is full")

    monkeypatch.setattr(Errand, "from_db", classmethod(fail_for_one))
    monkeypatch.setattr(queues.Attempt, "settle", fail)
    assert do_errand.claim(2) == [sound]
    assert f"testapp.do_errand: the failure of {broken.pk} can not be recorded" in caplog.text


@pytest.mark.parametrize(
    ("limit", "error", "text"),
    [
        (None, TypeError, r"claim\(\) takes an int, how many tasks at most, not None"),
        (True, TypeError, "not True"),
        (-1, ValueError, r"claim\(-1\) would take no task. Give 1 or more"),
        (0, ValueError, "Give 1 or more"),
    ],
)
def test_claim_of_no_number_is_refused(limit, error, text):
    with pytest.raises(error, match=text):
        do_errand.claim(limit)


def test_task_is_not_given_back_while_its_lease_is_in_the_future(monkeypatch):
    """The clock was set back. The same lease could come up again."""
    Errand.objects.create(status=Status.waiting(5))
    (task,) = do_errand.claim()
    lease = stored(task)
    with clock.use(lambda: dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)):
        assert do_errand.release(task) is False
    assert stored(task) == lease


EACH = [Status.combine(state, 5, attempts) for attempts, state in enumerate(Status.states)]


def test_cancel_ends_what_has_not_ended():
    errands = [Errand.objects.create(status=status) for status in EACH]
    foreign = Errand.objects.create(status=7)
    assert do_errand.cancel() == 3
    assert [(stored(one).state.name, stored(one).attempts) for one in errands] == [
        ("canceled", 0),
        ("canceled", 1),
        ("canceled", 2),
        ("finished", 3),
        ("canceled", 4),
    ]
    assert stored(errands[0]).priority > 10**16  # when it was canceled
    assert (stored(errands[4]), stored(foreign)) == (EACH[4], Status(7))


def test_retry_is_for_canceled_tasks_alone():
    errands = [Errand.objects.create(status=status) for status in EACH]
    assert do_errand.retry(Errand.objects.exclude(pk=errands[0].pk)) == 1
    assert [stored(one) for one in errands[:4]] == EACH[:4]
    assert (stored(errands[4]).state, stored(errands[4]).attempts) == (State.waiting, 0)
    assert do_errand.retry() == 0


def test_prune_deletes_what_ended_long_ago_in_batches():
    now = modelqueue.now()
    old, new = now - 11 * SECOND, now - 5 * SECOND
    kept = [
        Errand.objects.create(status=Status.finished(new)),
        Errand.objects.create(status=Status.canceled(old)),
    ]
    Errand.objects.bulk_create([Errand(status=Status.finished(old, number)) for number in range(5)])
    batches = modelqueue.verbs.prune(Errand.objects, "status", 10 * SECOND, batch=2)
    assert list(batches) == [Pruned(2), Pruned(2), Pruned(1)]
    assert set(Errand.objects.all()) == set(kept)
    assert do_errand.prune(10 * SECOND, "canceled") == 1
    assert list(Errand.objects.all()) == kept[:1]


def test_prune_passes_over_what_a_foreign_key_protects_and_logs_it(declare, caplog):
    queue = declare(Paper, "status", name="papers")(succeed)
    Paper.objects.bulk_create([Paper(status=Status.finished(number // 2)) for number in range(8)])
    papers = list(Paper.objects.order_by("pk"))
    kept = [papers[number] for number in (0, 1, 2, 5)]
    Receipt.objects.bulk_create([Receipt(paper=paper) for paper in kept[:3]])
    Quotation.objects.create(paper=kept[3])
    in_batches = modelqueue.verbs.prune(Paper.objects.all(), "status", SECOND, batch=2)
    receipts, quotations = frozenset({"testapp.Receipt"}), frozenset({"testapp.Quotation"})
    assert [next(in_batches), next(in_batches)] == [Pruned(0, 2, receipts), Pruned(1, 1, receipts)]
    assert queue.prune(SECOND) == 3
    assert list(Paper.objects.order_by("pk")) == kept
    assert list(in_batches) == [Pruned(0, 1, quotations)]
    (text,) = caplog.messages
    assert "4 old tasks are not deleted, as foreign keys of testapp.Quotation, testapp.Receipt" in text
    Receipt.objects.all().delete()
    assert queue.prune(SECOND) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((5,), TypeError, "older_than is a datetime.timedelta, not 5"),
        ((SECOND, "waiting"), ValueError, "deletes what has ended, finished or canceled, not waiting"),
        ((SECOND, "over"), ValueError, "There is no state 'over'"),
    ],
)
def test_prune_refuses_what_has_not_ended(arguments, error, text):
    with pytest.raises(error, match=text):
        do_errand.prune(*arguments)


# Inside an action


def test_current_tells_of_the_attempt(declare):
    seen = []

    def look(task):
        now = modelqueue.current()
        seen.append((now.task is task, now.queue.name, now.attempt, now.cancel_requested))
        seen.append(now.deadline - modelqueue.now())

    made = declare(Task, "status", name="tasks", timeout=60 * SECOND)(look)
    Task.objects.create(status=Status.waiting(0, 3))
    made.run()
    assert seen[0] == (True, "tasks", 4, False)
    assert 50 * SECOND < seen[1] <= 60 * SECOND


def test_current_of_run_has_no_queue():
    seen = []

    def look(task):
        now = modelqueue.current()
        seen.append((now.queue, now.deadline, now.renew()))

    Task.objects.create()
    modelqueue.run(Task.objects, "status", look, timeout=dt.timedelta.max)
    assert seen == [(None, None, True)]


def test_current_of_an_async_action(declare):
    seen = []

    async def look(task):
        seen.append(modelqueue.current().queue.name)
        left.append(modelqueue.current().deadline - modelqueue.now())

    left = []
    made = declare(Task, "status", name="tasks", timeout=60 * SECOND)(look)
    Task.objects.create()
    async_to_sync(made.arun)()
    assert seen == ["tasks"]
    assert 50 * SECOND < left[0] <= 60 * SECOND


def test_current_outside_of_an_action_is_an_error():
    with pytest.raises(LookupError, match="for the code of an action while it is run"):
        modelqueue.current()
    Errand.objects.create()
    do_errand.run()
    with pytest.raises(LookupError):
        modelqueue.current()
