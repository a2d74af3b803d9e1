"""What one task of a queue has by itself: how often it is tried, and the options that a hook tells of it."""

import datetime as dt
import re
import sys
from contextlib import suppress

import pytest
from asgiref.sync import async_to_sync
from django.db import OperationalError

import modelqueue
from modelqueue import ONE_HOUR, ZERO_SECS, State, Status, now, signals, testing, verbs
from modelqueue.engines import Candidate, Engine
from modelqueue.exceptions import TimedOut, WorkerDied
from modelqueue.worker.give_back import GiveBack, Held
from modelqueue.worker.recovery import Recovery
from tests.actions import LONG_AGO, SECOND, heard, raising, row, stored, succeed, write_down
from tests.processes import wait_until
from tests.testapp.models import Delivery, ExpressDelivery, Job, Ledger, Paper, Shift

pytestmark = pytest.mark.django_db(transaction=True)

HOUR = ONE_HOUR
KINDS = {"lookup": LookupError, "both": (ValueError, LookupError), "timed out": TimedOut}


def options_of(delivery):
    """What stands in its column."""
    known = dict(delivery.options)
    for name in ("timeout", "delay"):
        if name in known:
            known[name] = dt.timedelta(seconds=known[name])
    if "cancel_on" in known:
        known["cancel_on"] = KINDS[known["cancel_on"]]
    return known


def one_in_a_worker(queue):
    """Claim a task and make the attempt as a process of the worker does."""
    source = queue.source()
    (claim,) = wait_until(lambda: verbs.claim(source))
    queue.attempt(claim, source).process(queue.action)


def quietly(run):
    """Run one, whatever its action raises."""

    def one(queue):
        with suppress(Exception):
            run(queue)

    return one


WAYS = {
    "run": quietly(lambda queue: queue.run()),
    "arun": quietly(lambda queue: async_to_sync(queue.arun)()),
    "drain": lambda queue: queue.drain(),
    "testing": lambda queue: testing.run_one(queue, raises=False),
    "worker": one_in_a_worker,
}


@pytest.fixture(params=WAYS)
def one(request):
    """Each way to run a task of a queue."""
    return WAYS[request.param]


@pytest.fixture(params=["auto", "portable"])
def engine(request, settings):
    settings.MODELQUEUE = {"ENGINE": request.param}
    return request.param


@pytest.fixture
def deliveries(declare):
    """Declare the queue of all deliveries, with their own terms."""

    def make(action, **options):
        given = {"retry": "retries", "task_options": options_of, "error_field": "error", **options}
        return declare(Delivery, "status", name="deliveries", **given)(action)

    return make


# How often


@pytest.mark.parametrize(("retries", "attempts"), [(0, 1), (2, 3), (8, 9)])
def test_task_is_tried_as_often_as_its_own_column_says(retries, attempts, one, deliveries):
    queue = deliveries(raising(ValueError("no")))
    task = Delivery.objects.create(retries=retries)
    while stored(task).state == State.waiting:
        one(queue)
    assert (stored(task).state, stored(task).attempts) == (State.canceled, attempts)


def test_task_without_a_number_has_no_limit(one, deliveries):
    queue = deliveries(raising(ValueError("no")), delay=HOUR)
    task = Delivery.objects.create(retries=None, status=Status.waiting(5, 8))
    for _ in range(3):
        one(queue)
        assert (stored(task).state, stored(task).attempts) == (State.waiting, 9)
        Delivery.objects.update(status=Status.waiting(5, 9))


def test_number_that_is_changed_meanwhile_counts_at_the_next_claim(deliveries):
    queue = deliveries(raising(ValueError("no")))
    task = Delivery.objects.create(retries=0, status=Status.waiting(5))
    Delivery.objects.update(retries=1)
    WAYS["run"](queue)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    Delivery.objects.update(retries=0)
    WAYS["run"](queue)
    assert (stored(task).state, stored(task).attempts) == (State.canceled, 2)


@pytest.mark.parametrize("retries", [-1, 9])
def test_number_that_can_not_be_is_a_failed_attempt_that_says_so(retries, one, deliveries):
    queue = deliveries(succeed, delay=HOUR)
    task = Delivery.objects.create(retries=retries)
    one(queue)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert f"retry={retries} is out of range" in row(task).error


# Those on their last attempt run alone

#: How often it is retried, how often it was tried: is its next attempt the last one, but not the first?
ATTEMPTS = {
    (0, 0): False,
    (0, 1): False,
    (1, 0): False,
    (1, 1): True,
    (1, 5): True,
    (3, 2): False,
    (3, 3): True,
    (8, 7): False,
    (8, 8): True,
    (None, 0): False,
    (None, 9): False,
    (-1, 0): False,
}


def test_task_on_its_own_last_attempt_is_not_claimed_with_others(engine, deliveries):
    queue = deliveries(succeed)
    assert queue.has_last_attempts
    made = {
        Delivery.objects.create(retries=retries, status=Status.waiting(5, attempts)).pk: (retries, attempts)
        for retries, attempts in ATTEMPTS
    }
    shared = [made[claim.row.pk] for claim in verbs.claim(queue.shared(), 100)]
    assert sorted(shared, key=str) == sorted((one for one in ATTEMPTS if not ATTEMPTS[one]), key=str)
    alone = [made[claim.row.pk] for claim in verbs.claim(queue.alone(), 100)]
    assert sorted(alone) == sorted(one for one in ATTEMPTS if ATTEMPTS[one])


def test_looks_for_due_tasks_tell_the_two_kinds_apart(deliveries):
    queue = deliveries(succeed)
    shared, alone = queue.shared(), queue.alone()
    assert not shared.due(now()).exists()
    last = Delivery.objects.create(retries=1, status=Status.waiting(5, 1))
    assert (shared.due(now()).first(), queue.alone().due(now()).first()) == (None, last)
    Delivery.objects.update(status=Status.waiting(5))
    assert (shared.due(now()).first(), queue.alone().due(now()).first()) == (last, None)
    assert not alone.due(now()).exists()


# What a hook tells


def test_task_has_its_own_timeout(one, deliveries):
    seen = {}

    def look(task):
        seen[task.title] = modelqueue.current().deadline - now()

    queue = deliveries(look, timeout=3 * HOUR)
    for title, options in {"short": {"timeout": 60}, "plain": {}}.items():
        Delivery.objects.create(title=title, options=options)
    while Delivery.objects.filter(status__state="waiting").exists():
        one(queue)
    assert ZERO_SECS < seen["short"] <= 60 * SECOND
    assert 2 * HOUR < seen["plain"] <= 3 * HOUR


def test_task_waits_for_its_own_delay(one, deliveries):
    queue = deliveries(raising(ValueError("no")), delay=HOUR)
    slow, plain = Delivery.objects.create(options={"delay": 3 * 3600}), Delivery.objects.create()
    while queue.source().due(now()).exists():
        one(queue)
    for task, delay in ((slow, 3 * HOUR), (plain, HOUR)):
        soonest = now() + delay - 60 * SECOND
        assert Status.waiting(soonest) < stored(task) < Status.waiting(soonest + 60 * SECOND, 1)


def test_task_is_canceled_on_exceptions_of_its_own(one, deliveries):
    queue = deliveries(raising(KeyError("no")), delay=HOUR, cancel_on=ValueError)
    tasks = [
        Delivery.objects.create(options={"cancel_on": kind} if kind else {})
        for kind in ("lookup", "both", None)
    ]
    while queue.source().due(now()).exists():
        one(queue)
    assert [stored(task).state for task in tasks] == [State.canceled, State.canceled, State.waiting]


def test_task_is_one_transaction_if_it_says_so(one, deliveries):
    def note_and_fail(task):
        write_down(task)
        raise ValueError("no")

    queue = deliveries(note_and_fail, delay=HOUR)
    atomic, plain = Delivery.objects.create(options={"atomic": True}), Delivery.objects.create()
    while queue.source().due(now()).exists():
        one(queue)
    assert [entry.task for entry in Ledger.objects.all()] == [plain.pk]
    assert [(stored(task).state, stored(task).attempts) for task in (atomic, plain)] == [
        (State.waiting, 1)
    ] * 2


def test_task_may_be_no_transaction_where_the_others_of_its_queue_are(one, deliveries):
    def note_and_fail(task):
        write_down(task)
        raise ValueError("no")

    queue = deliveries(note_and_fail, delay=HOUR, atomic=True)
    plain, _ = Delivery.objects.create(options={"atomic": False}), Delivery.objects.create()
    while queue.source().due(now()).exists():
        one(queue)
    assert [entry.task for entry in Ledger.objects.all()] == [plain.pk]


def test_options_are_of_the_row_as_it_was_claimed(deliveries):
    asked = []

    def tell(task):
        asked.append((task.pk, task.status.state, task.title))
        return {}

    queue = deliveries(succeed, task_options=tell)
    task = Delivery.objects.create(title="a")
    assert queue.run() == task
    assert asked == [(task.pk, State.working, "a")]


def fail(task):
    raise RuntimeError("nobody knows")


NONSENSE = {
    "none": (lambda task: None, "TypeError: task_options=.* returned None. It returns a dict"),
    "a number": (lambda task: 5, "TypeError: task_options=.* returned 5"),
    "another option": (
        lambda task: {"retry": 5},
        "ValueError: .* returned 'retry', which is no option of a task",
    ),
    "another timeout": (lambda task: {"timeout": 5}, "TypeError: timeout is a datetime.timedelta, not 5"),
    "another delay": (lambda task: {"delay": -SECOND}, "ValueError: delay=.* is negative"),
    "another atomic": (lambda task: {"atomic": "yes"}, "TypeError: atomic is True or False, not 'yes'"),
    "another class": (lambda task: {"cancel_on": [KeyError]}, "TypeError: cancel_on is an exception class"),
    "an error": (fail, "RuntimeError: nobody knows"),
    "an exit": (lambda task: sys.exit("no"), r"RuntimeError: task_options=.* ended with SystemExit\('no'\)"),
    "of the database": (lambda task: Delivery.objects.raw("SELECT nothing")[0], r"\w+Error: "),
}


@pytest.fixture(params=NONSENSE)
def nonsense(request):
    """Make a hook that tells nonsense of the tasks with this title alone, and return what is said of it."""
    tell, text = NONSENSE[request.param]
    return (lambda task: tell(task) if task.title == "nonsense" else {}), text


@pytest.mark.parametrize("way", ["together", "run", "drain", "testing"])
def test_task_of_which_nonsense_is_told_has_failed_and_no_other(way, nonsense, deliveries):
    tell, text = nonsense
    queue = deliveries(write_down, task_options=tell, delay=HOUR)
    tasks = [Delivery.objects.create(title=title) for title in ("", "nonsense", "")]
    if way == "together":
        source = queue.source()
        for claim in verbs.claim(source, 3):
            queue.attempt(claim, source).process(queue.action)
    else:
        for _ in tasks:
            WAYS[way](queue)
    assert [stored(task).state.name for task in tasks] == ["finished", "waiting", "finished"]
    assert (stored(tasks[1]).attempts, Ledger.objects.count()) == (1, 2)
    assert re.search(text, row(tasks[1]).error)


@pytest.mark.parametrize(
    ("retries", "attempts", "state"), [(0, 0, "canceled"), (8, 5, "waiting"), (1, 1, "canceled")]
)
def test_task_of_which_nonsense_is_told_is_tried_as_often_as_others(retries, attempts, state, deliveries):
    queue = deliveries(succeed, task_options=lambda task: None)
    task = Delivery.objects.create(retries=retries, status=Status.waiting(5, attempts))
    WAYS["run"](queue)
    assert (stored(task).state.name, stored(task).attempts) == (state, attempts + 1)


def test_transaction_for_an_async_action_is_refused_for_one_task_too(deliveries):
    async def act(task): ...

    queue = deliveries(act)
    task = Delivery.objects.create(options={"atomic": True})
    with pytest.raises(TypeError, match="a transaction belongs to a thread, and this action is async"):
        async_to_sync(queue.arun)()
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


# When a worker has died


def expired(**values):
    return Delivery.objects.create(status=Status.working(LONG_AGO, values.pop("attempts", 0)), **values)


def recover_by_verb(queue):
    verbs.recover(queue.source(), queue.recovery(), policy_of=queue.asks_for_policy)


def recover_by_run(queue):
    queue.run()  # before it looks for a task


def recover_by_worker(queue):
    recovery = Recovery([queue])
    recovery.start()
    try:
        first = Status.working(LONG_AGO)
        wait_until(lambda: recovery.look_at({queue.name: first}) or not queue.tally()["working"])
    finally:
        recovery.stop()
        wait_until(lambda: recovery.has_ended)


@pytest.mark.parametrize("recover", [recover_by_verb, recover_by_run, recover_by_worker])
def test_expired_task_is_taken_back_on_its_own_terms(recover, deliveries):
    queue = deliveries(succeed, delay=HOUR)
    once, last = expired(retries=0), expired(retries=2, attempts=2)
    unlimited = expired(retries=None, attempts=9)
    slow = expired(retries=2, options={"delay": 3 * 3600})
    recover(queue)
    assert [stored(task).state for task in (once, last)] == [State.canceled] * 2
    assert [stored(task).attempts for task in (once, last, unlimited, slow)] == [1, 3, 9, 1]
    for task, delay in ((unlimited, HOUR), (slow, 3 * HOUR)):
        soonest = now() + delay - 60 * SECOND
        assert Status.waiting(soonest) < stored(task) < Status.waiting(soonest + 60 * SECOND, 9)
    assert "LeaseExpired" in row(once).error


def test_expired_task_of_which_nonsense_is_told_is_taken_back_with_all_others(nonsense, deliveries, caplog):
    tell, _ = nonsense
    queue = deliveries(succeed, task_options=tell)
    tasks = [expired(title=title, retries=2) for title in ("", "nonsense", "")]
    recover_by_verb(queue)
    assert [(stored(task).state, stored(task).attempts) for task in tasks] == [(State.waiting, 1)] * 3
    assert f"deliveries {tasks[1].pk}: its options can not be told: " in caplog.text
    Delivery.objects.update(status=Status.working(LONG_AGO), retries=0)
    recover_by_verb(queue)
    assert [stored(task).state for task in tasks] == [State.canceled] * 3


def test_no_task_is_taken_back_by_other_terms_while_its_own_can_not_be_read(deliveries, monkeypatch):
    def away(task):
        raise OperationalError("the server is away")

    queue = deliveries(succeed, task_options=away)
    task = expired(retries=0)
    monkeypatch.setattr(Engine, "is_of_the_database_itself", lambda self, error: True)
    monkeypatch.setattr(Engine, "patiently", lambda self, work, reconnect=False: work())
    with pytest.raises(OperationalError, match="the server is away"):
        recover_by_verb(queue)
    assert stored(task) == Status.working(LONG_AGO)


DEAD = WorkerDied("its process 5 was killed")


def give_back(queue, tasks, **options):
    """As the supervisor of a process does that had these tasks in hand when it died."""
    back = GiveBack({queue.name: queue})
    back.start(
        [
            Held(
                queue.name,
                Candidate(one.pk, one.pk, Status.waiting(5)),
                {one.status},
                has_begun=True,
                **options,
            )
            for one in tasks
        ],
        DEAD,
    )
    back.wait()


def test_task_of_a_dead_process_is_given_back_on_its_own_terms(deliveries):
    queue = deliveries(succeed, delay=HOUR)
    claimed = {"status": Status.working()}
    once, twice = [Delivery.objects.create(retries=retries, **claimed) for retries in (0, 1)]
    slow = Delivery.objects.create(options={"delay": 3 * 3600}, **claimed)
    give_back(queue, [once, twice, slow])
    assert [stored(task).state.name for task in (once, twice, slow)] == ["canceled", "waiting", "waiting"]
    assert stored(slow).priority > stored(twice).priority
    assert row(once).error == "modelqueue.exceptions.WorkerDied: its process 5 was killed"


def test_action_that_could_be_ended_by_the_end_of_its_process_alone_is_told_its_own_timeout(deliveries):
    queue = deliveries(succeed)
    options = {"timeout": 90, "cancel_on": "timed out"}
    task = Delivery.objects.create(options=options, status=Status.working())
    give_back(queue, [task], is_overdue=True)
    assert stored(task).state == State.canceled
    assert "longer than its timeout of 0:01:30" in row(task).error


def test_task_that_is_gone_when_its_process_died_stops_nothing(deliveries):
    queue = deliveries(succeed)
    gone, other = [Delivery.objects.create(status=Status.working()) for _ in range(2)]
    Delivery.objects.filter(pk=gone.pk).delete()
    give_back(queue, [gone, other])
    assert stored(other).state == State.waiting


# Declared


@pytest.mark.parametrize(
    ("model", "name", "error", "text"),
    [
        (
            Delivery,
            "nothing",
            ValueError,
            "Delivery has no field 'nothing', which retry names. Give a number, or",
        ),
        (
            Delivery,
            "title",
            TypeError,
            "retry='title' names testapp.Delivery.title, a CharField. It is an Integ",
        ),
        (Delivery, "options", TypeError, "a JSONField"),
        (Delivery, "status", TypeError, "a StatusField"),
        (Delivery, "id", TypeError, "a BigAutoField"),
        (Paper, "score", TypeError, "a FloatField"),
        (Paper, "project", TypeError, "a ForeignKey"),
        (Paper, "attachments", TypeError, "a ManyToOneRel"),
        (ExpressDelivery, "price", ValueError, "which is in another table than testapp.Delivery.status"),
    ],
)
def test_field_that_can_not_say_how_often_is_refused(model, name, error, text, declare):
    with pytest.raises(error, match=text):
        declare(model, "status", name="tasks", retry=name)(succeed)


def test_field_may_be_of_a_parent_beside_the_status(declare):
    queue = declare(ExpressDelivery, "status", name="tasks", retry="retries")(raising(ValueError("no")))
    task = ExpressDelivery.objects.create(retries=0)
    WAYS["run"](queue)
    assert stored(task).state == State.canceled


async def asynchronous(task): ...


def takes_two(task, other): ...


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"timeout": SECOND}, "task_options is a callable that gets a task, not {"),
        (asynchronous, "task_options=.* is an async function, which nobody awaits"),
        (takes_two, "task_options=.* can not be called with a task: missing a required argument: 'other'"),
    ],
)
def test_hook_that_can_not_be_asked_of_a_task_is_refused(given, text, declare):
    with pytest.raises(TypeError, match=text):
        declare(Delivery, "status", name="tasks", task_options=given)(succeed)


def test_queue_of_which_all_tasks_are_alike_asks_for_none(declare):
    queue = declare(Delivery, "status", name="tasks", retry=2)(succeed)
    assert (queue.asks_for_policy, queue.retry_field) == (None, None)


# The signal task_claimed


@pytest.mark.parametrize("is_set", [True, False])
def test_signal_of_a_claim_tells_what_it_has_replaced(is_set, one, declare):
    options = {"claim_values": {"worker": "alpha", "facts": {"hall": 1}}} if is_set else {}
    queue = declare(Shift, "status", name="shifts", **options)(succeed)
    Shift.objects.create(worker="old", facts={"hall": 0})
    with heard("task_claimed") as events:
        one(queue)
    assert [event["before"] for _, event in events] == [
        {"worker": "old", "facts": {"hall": 0}} if is_set else None
    ]


class Receiver:
    """Of the signal: writes to the row, and loads what it has written."""

    def __init__(self):
        signals.task_claimed.connect(self.load, sender=Delivery)

    def load(self, task, using, **kwargs):
        Delivery.objects.using(using).filter(pk=task.pk).update(title="loaded")
        task.refresh_from_db(using=using, fields=["title"])

    def close(self):
        signals.task_claimed.disconnect(self.load, sender=Delivery)


@pytest.fixture
def _loading():
    receiver = Receiver()
    yield
    receiver.close()


@pytest.mark.usefixtures("_loading")
@pytest.mark.parametrize("atomic", [True, False])
def test_what_receivers_of_a_claim_have_loaded_survives_an_action_that_is_undone(atomic, one, deliveries):
    seen = []

    def change_and_fail(task):
        seen.append((task, task.title))
        task.title, task.log = "changed", ["changed"]
        raise ValueError("no")

    queue = deliveries(change_and_fail, delay=HOUR)
    task = Delivery.objects.create(title="claimed", options={"atomic": atomic})
    one(queue)
    ((instance, title),) = seen
    assert title == "loaded"
    left = ("loaded", []) if atomic else ("changed", ["changed"])
    assert (row(task).title, row(task).log) == (instance.title, instance.log) == left


@pytest.mark.usefixtures("_loading")
def test_what_receivers_of_a_claim_have_loaded_is_no_change_of_the_action(one, deliveries):
    def act(task):
        Delivery.objects.filter(pk=task.pk).update(title="edited by somebody")
        task.log = ["done"]

    queue = deliveries(act)
    task = Delivery.objects.create(title="claimed")
    one(queue)
    assert (row(task).title, row(task).log) == ("edited by somebody", ["done"])


def test_signal_is_put_together_for_the_models_that_somebody_listens_to_alone():
    def listen(**kwargs): ...

    assert not signals.is_heard(signals.task_finished, Paper, "finish")
    signals.task_finished.connect(listen, sender=Job)
    try:
        assert signals.is_heard(signals.task_finished, Job, "finish")
        assert not signals.is_heard(signals.task_finished, Paper, "finish")
        signals.task_finished.connect(listen)
        assert signals.is_heard(signals.task_finished, Paper, "finish")
    finally:
        signals.task_finished.disconnect(listen)
        signals.task_finished.disconnect(listen, sender=Job)
    assert not signals.is_heard(signals.task_finished, Job, "finish")


# All at once


def test_terms_are_not_made_anew_for_each_of_many_tasks(deliveries):
    """To check options takes longer than all else of a short task; but what differs is told apart."""
    queue = deliveries(succeed)
    Delivery.objects.bulk_create(
        [Delivery(retries=number % 3, options={"timeout": number % 2 + 1}) for number in range(30)]
    )
    source = queue.source()
    terms = [queue.terms(claim) for claim in verbs.claim(source, 30)]
    assert len({id(one) for one in terms}) == 6
    assert {(one.policy.retry, one.policy.timeout) for one in terms} == {
        (retry, seconds * SECOND) for retry in (0, 1, 2) for seconds in (1, 2)
    }


def test_options_that_can_not_be_kept_are_taken_all_the_same(deliveries):
    class Wait:
        __hash__ = None

        def __call__(self, attempts):
            return HOUR

    queue = deliveries(raising(ValueError("no")), task_options=lambda task: {"delay": Wait()})
    task = Delivery.objects.create()
    WAYS["run"](queue)
    assert stored(task) > Status.waiting(now() + HOUR - 60 * SECOND)
