"""The hooks of declared queues: what a claim sets besides the status, and the priority it gets next."""

import asyncio
import datetime as dt
import pickle
import time

import pytest
from asgiref.sync import async_to_sync
from django.db import DatabaseError, OperationalError, connection, transaction
from django.db.models import F, Q

import modelqueue
from modelqueue import Abort, Cancel, Retry, State, Status, attempts, clock, testing, threads, verbs
from modelqueue.attempts import AsyncAttempt
from modelqueue.engines import Engine
from modelqueue.exceptions import Interrupted
from tests.actions import SECOND, Clock, heard, raising, row, stored, succeed
from tests.processes import wait_until
from tests.test_query_plan import CLAIM, CLAIM_AND_LOAD, OUTCOME, sent, verb
from tests.testapp import models
from tests.testapp.models import Job, Ledger, NightShift, NumberedJob, Paper, PickyPaper, Project, Shift

pytestmark = pytest.mark.django_db(transaction=True)

MORNING = dt.datetime(2026, 3, 4, 6, 30, 0, 123000, tzinfo=dt.timezone.utc)
ENTRY = {"worker": "alpha", "began": MORNING, "facts": {"hall": [1]}}
TITLE = {"title": "alpha"}


@pytest.fixture(params=["auto", "portable"])
def engine(request, settings):
    settings.MODELQUEUE = {"ENGINE": request.param}
    return request.param


#: Each way to claim: the tasks, what a claim of them sets, and how one is made.
WAYS = {
    "plain": (Shift.objects, ENTRY, Shift.objects.create),
    "filtered": (Shift.objects.filter(~Q(worker="nobody")), ENTRY, Shift.objects.create),
    "select_related": (Shift.objects.select_related("project"), ENTRY, Shift.objects.create),
    "join": (Shift.objects.filter(Q(project=None) | Q(project__name="")), ENTRY, Shift.objects.create),
    "only": (Shift.objects.only("facts"), ENTRY, Shift.objects.create),
    "inherited": (NightShift.objects, ENTRY, NightShift.objects.create),
    "inherited with a key of its own": (NumberedJob.objects, TITLE, NumberedJob.objects.create),
    "placeholder": (Shift.objects, {"badge": b"\x00\xff"}, Shift.objects.create),
}
if hasattr(models, "CompositeTask"):
    numbers = iter(range(1, 1000))
    WAYS["composite key"] = (
        models.CompositeTask.objects,
        TITLE,
        lambda **values: models.CompositeTask.objects.create(tenant=1, number=next(numbers), **values),
    )


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


def columns(task, values):
    """What the row of a task holds in the fields that have these values."""
    return {name: made(getattr(row(task), name)) for name in values}


def shown(task, values):
    return {name: made(getattr(task, name)) for name in values}


def made(value):
    return bytes(value) if isinstance(value, memoryview) else value


# claim_values: the claim


def test_claim_sets_them_with_the_status_and_the_task_shows_them(engine, way, declare):
    rows, values, create = way
    queue = declare(rows, "status", name="tasks", claim_values=lambda: values)(succeed)
    tasks = [create() for _ in range(2)]
    claimed = queue.claim(2)
    assert sorted(task.pk for task in claimed) == sorted(task.pk for task in tasks)
    for task in claimed:
        assert stored(task) == task.status
        assert task.status.state == State.working
        assert shown(task, values) == columns(task, values) == values


@pytest.mark.usefixtures("unprepared")
def test_action_sees_them_and_they_are_no_change_of_its_own(engine, vendor, declare):
    seen = []
    queue = declare(Shift, "status", name="shifts", claim_values=ENTRY)(lambda task: seen.append(vars(task)))
    Shift.objects.bulk_create([Shift() for _ in range(2)])
    queue.run()  # recovers, as nothing has been recovered yet
    statements = sent(queue.run)
    assert [verb(statement) for statement in statements] == CLAIM[engine][vendor] + OUTCOME[vendor]
    assert seen[1]["worker"] == "alpha"
    assert [columns(task, ENTRY) for task in Shift.objects.all()] == [ENTRY] * 2


def test_claim_of_a_task_that_is_more_than_its_row_takes_no_more_statements(vendor, declare, settings):
    settings.MODELQUEUE = {"ENGINE": "auto"}
    queue = declare(NightShift, "status", name="shifts", claim_values=ENTRY)(succeed)
    NightShift.objects.create()
    assert [verb(statement) for statement in sent(queue.claim)] == CLAIM_AND_LOAD[vendor]


def test_they_are_asked_for_once_for_each_claim(engine, declare):
    numbers = iter(range(100))
    queue = declare(
        Shift, "status", name="shifts", claim_values=lambda: {"facts": {"number": [next(numbers)]}}
    )(succeed)
    Shift.objects.bulk_create([Shift() for _ in range(5)])
    first, second, third = queue.claim(3)
    assert first.facts == second.facts == third.facts == {"number": [0]}
    first.facts["number"].append("mine")
    assert second.facts == {"number": [0]}  # each task has a copy
    assert [task.facts for task in queue.claim(3)] == [{"number": [1]}] * 2


def test_no_task_is_claimed_while_they_can_not_be_told(engine, declare):
    queue = declare(Shift, "status", name="shifts", claim_values=lambda: {"worker": {}["name"]})(succeed)
    task = Shift.objects.create(status=Status.waiting(5))
    with pytest.raises(KeyError):
        queue.run()
    assert stored(task) == Status.waiting(5)


def test_key_of_a_related_object_is_set_and_the_old_object_forgotten(engine, declare):
    old, new = Project.objects.create(name="old"), Project.objects.create(name="new")
    rows = Shift.objects.select_related("project")
    queue = declare(rows, "status", name="shifts", claim_values={"project": new.pk})(succeed)
    Shift.objects.create(project=old)
    (task,) = queue.claim()
    assert task.project == new
    assert queue.release(task)
    assert task.project == row(task).project == old


@pytest.fixture(params=[False, True], ids=["", "bound on the server"])
def binding(request, vendor):
    """With PostgreSQL either way in which its driver binds parameters."""
    options = connection.settings_dict["OPTIONS"]
    if request.param:
        if vendor != "postgresql":
            pytest.skip("a matter of PostgreSQL's driver")
        connection.close()
        connection.settings_dict["OPTIONS"] = {**options, "server_side_binding": True}
    yield
    if request.param:
        connection.close()
        connection.settings_dict["OPTIONS"] = options


@pytest.mark.usefixtures("binding")
def test_statement_is_one_for_each_set_of_fields(declare, caplog, settings):
    """On PostgreSQL it is prepared after some uses."""
    settings.MODELQUEUE = {"ENGINE": "auto"}
    caplog.set_level("DEBUG", "modelqueue")
    names = iter([("worker", "began"), ("began", "worker"), ("worker",), ()] * 10)
    queue = declare(
        Shift, "status", name="shifts", claim_values=lambda: {name: ENTRY[name] for name in next(names)}
    )(succeed)
    for _ in range(10):
        for worker, began in [("alpha", MORNING), ("alpha", MORNING), ("alpha", None), ("", None)]:
            task = Shift.objects.create()
            (claimed,) = queue.claim()
            assert (claimed.pk, claimed.worker, claimed.began) == (task.pk, worker, began)
            assert (row(task).worker, row(task).began) == (worker, began)
    assert "step by step" not in caplog.text


def test_order_of_the_values_makes_no_other_statement(declare):
    orders = iter([ENTRY, dict(reversed(ENTRY.items()))])
    queue = declare(Shift, "status", name="shifts", claim_values=lambda: next(orders))(succeed)
    first, second = (list(queue.source().for_a_claim().sets) for _ in range(2))
    assert first == second


def test_field_that_puts_sql_around_its_value_is_set_and_put_back(engine, declare, monkeypatch):
    """As one that the database encrypts."""
    field = Shift._meta.get_field("worker")
    monkeypatch.setattr(field, "get_placeholder", lambda *value: "UPPER(%s)", raising=False)
    from_django_6_1 = lambda value, *others: ("UPPER(%s)", [value])  # noqa: E731
    monkeypatch.setattr(field, "get_placeholder_sql", from_django_6_1, raising=False)
    queue = declare(Shift, "status", name="shifts", claim_values={"worker": "alpha"})(succeed)
    task = Shift.objects.create(worker="old")
    (claimed,) = queue.claim()
    assert (claimed.worker, row(task).worker) == ("alpha", "ALPHA")
    assert queue.release(claimed)
    assert row(task).worker == "OLD"


def test_they_are_set_inside_a_transaction_of_the_caller(engine, declare):
    queue = declare(Shift, "status", name="shifts", claim_values=ENTRY)(succeed)
    task = Shift.objects.create()
    with transaction.atomic():
        (claimed,) = queue.claim()
        assert columns(task, ENTRY) == ENTRY
        assert queue.release(claimed)
    assert (columns(task, ENTRY), stored(task)) == (columns(Shift.objects.create(), ENTRY), task.status)


def test_drain_and_the_helpers_for_tests_set_them(declare):
    queue = declare(Shift, "status", name="shifts", claim_values=ENTRY)(succeed)
    for run in (queue.drain, lambda: testing.drain(queue), lambda: testing.run_to_end(queue)):
        task = Shift.objects.create()
        run()
        assert (stored(task).state, columns(task, ENTRY)) == (State.finished, ENTRY)


# claim_values: given back


OLD = {"worker": "omega", "began": MORNING - SECOND, "facts": {"hall": 9}}


def old_of(values):
    return {name: OLD.get(name, b"old" if name == "badge" else "old") for name in values}


def test_released_task_gets_back_what_it_had(engine, way, declare):
    rows, values, create = way
    queue = declare(rows, "status", name="tasks", claim_values=lambda: values)(succeed)
    old = old_of(values)
    task = create(status=Status.waiting(5, 1), **old)
    (claimed,) = queue.claim()
    assert columns(task, values) == values
    assert queue.release(claimed)
    assert (stored(task), columns(task, values)) == (Status.waiting(5, 1), old)
    assert (claimed.status, shown(claimed, values)) == (Status.waiting(5, 1), old)


def test_task_left_by_a_dead_process_gets_back_what_it_had(engine, way, declare):
    """What it takes goes to the supervisor by a pipe."""
    rows, values, create = way
    queue = declare(rows, "status", name="tasks", claim_values=lambda: values)(succeed)
    task = create(status=Status.waiting(5, 1), **old_of(values))
    (claim,) = verbs.claim(queue.source())
    left = pickle.loads(pickle.dumps(claim.row))
    assert verbs.release(queue.source(), left, {claim.lease})
    assert (stored(task), columns(task, values)) == (Status.waiting(5, 1), old_of(values))


def test_task_that_was_taken_meanwhile_is_left_alone(engine, declare):
    queue = declare(Shift, "status", name="shifts", claim_values=ENTRY)(succeed)
    task = Shift.objects.create(**OLD)
    (claimed,) = queue.claim()
    Shift.objects.update(status=Status.canceled(5))
    assert not queue.release(claimed)
    assert (columns(task, ENTRY), shown(claimed, ENTRY)) == (ENTRY, ENTRY)


async def cancel_itself(task):
    raise asyncio.CancelledError


GIVEN_BACK = {
    "interrupted": ({}, raising(Interrupted())),
    "canceled": ({}, raising(asyncio.CancelledError())),
    "atomic": ({"atomic": True}, raising(Interrupted())),
    "async": ({}, cancel_itself),
}


@pytest.mark.parametrize("how", GIVEN_BACK)
def test_action_that_is_ended_from_outside_leaves_no_trace(how, engine, way, declare):
    options, action = GIVEN_BACK[how]
    rows, values, create = way
    queue = declare(rows, "status", name="tasks", claim_values=lambda: values, **options)(action)
    task = create(status=Status.waiting(5, 1), **old_of(values))
    with heard("task_finished") as events, pytest.raises((Interrupted, asyncio.CancelledError)):
        async_to_sync(queue.arun)() if how == "async" else queue.run()
    assert (stored(task), columns(task, values)) == (Status.waiting(5, 1), old_of(values))
    (facts,) = [facts for _, facts in events]
    assert facts["outcome"] == "release"
    assert shown(facts["task"], values) == old_of(values)


def test_action_that_could_not_be_called_leaves_no_trace(declare, monkeypatch):
    async def no_thread(*arguments):
        raise threads.NotCalled("can't start new thread")

    monkeypatch.setattr(AsyncAttempt, "call_action", no_thread)
    queue = declare(Shift, "status", name="shifts", claim_values=ENTRY)(succeed)
    task = Shift.objects.create(status=Status.waiting(5), **OLD)
    with pytest.raises(threads.NotCalled):
        async_to_sync(queue.arun)()
    assert (stored(task), columns(task, ENTRY)) == (Status.waiting(5), OLD)


@pytest.mark.parametrize("engine", ["auto"], indirect=True)
def test_atomic_action_that_could_not_begin_leaves_no_trace(engine, declare, monkeypatch):
    def refuse(self, *arguments):
        raise OperationalError("no")

    queue = declare(Shift, "status", name="shifts", atomic=True, claim_values=ENTRY)(succeed)
    task = Shift.objects.create(status=Status.waiting(5), **OLD)
    monkeypatch.setattr(Engine, "hold", refuse)
    with pytest.raises(OperationalError):
        queue.run()
    assert (stored(task), columns(task, ENTRY)) == (Status.waiting(5), OLD)


def test_what_the_action_changed_is_kept_and_the_rest_put_back(engine, declare):
    def change(task):
        task.worker = "mine"
        task.facts["hall"].append(2)
        raise Interrupted

    queue = declare(Shift, "status", name="shifts", claim_values=ENTRY)(change)
    task = Shift.objects.create(status=Status.waiting(5), **OLD)
    with heard("task_finished") as events, pytest.raises(Interrupted):
        queue.run()
    expected = {"worker": "mine", "began": OLD["began"], "facts": {"hall": [1, 2]}}
    assert (stored(task), columns(task, ENTRY)) == (Status.waiting(5), expected)
    assert shown(events[0][1]["task"], ENTRY) == expected


def test_what_the_action_saved_itself_is_kept_and_the_rest_put_back(engine, declare):
    def save(task):
        task.worker = "mine"
        task.save()
        task.refresh_from_db()
        raise Interrupted

    queue = declare(Shift, "status", name="shifts", claim_values=ENTRY)(save)
    task = Shift.objects.create(status=Status.waiting(5), **OLD)
    with pytest.raises(Interrupted):
        queue.run()
    assert (stored(task), columns(task, ENTRY)) == (Status.waiting(5), {**OLD, "worker": "mine"})


def test_all_is_put_back_where_the_changes_can_not_be_saved(declare, monkeypatch):
    def change(job):
        job.title = "mine"
        raise Interrupted

    def refuse(*arguments):
        raise DatabaseError("no")

    queue = declare(Job, "status", name="jobs", claim_values={**TITLE, "error": "running"})(change)
    old = {"title": "old", "error": "none"}
    job = Job.objects.create(status=Status.waiting(5), **old)
    monkeypatch.setattr(attempts, "save_merged", refuse)
    with pytest.raises(Interrupted):
        queue.run()
    assert (stored(job), columns(job, old)) == (Status.waiting(5), old)


def test_deferred_field_that_was_unloaded_is_put_back(engine, declare):
    def unload(task):
        del task.worker
        raise Interrupted

    queue = declare(Shift, "status", name="shifts", claim_values=ENTRY)(unload)
    task = Shift.objects.create(**OLD)
    with pytest.raises(Interrupted):
        queue.run()
    assert columns(task, ENTRY) == OLD


KEPT = {
    "finish": succeed,
    "fail": raising(ValueError("no")),
    "retry": raising(Retry()),
    "abort": raising(Abort()),
    "cancel": raising(Cancel()),
}


@pytest.mark.parametrize("how", KEPT)
def test_outcome_of_an_attempt_undoes_nothing(how, engine, declare):
    queue = declare(Shift, "status", name="shifts", claim_values=ENTRY)(KEPT[how])
    task = Shift.objects.create(**OLD)
    (ran,) = [testing.run_one(queue, raises=False)]
    assert (ran.outcome, columns(task, ENTRY), shown(ran.task, ENTRY)) == (how, ENTRY, ENTRY)


def test_recovery_undoes_nothing(engine, declare):
    queue = declare(Shift, "status", name="shifts", lease=3 * SECOND, claim_values=ENTRY)(succeed)
    task = Shift.objects.create(**OLD)
    queue.claim()
    later = modelqueue.now() + 60 * SECOND
    with clock.use(lambda: later):
        assert verbs.recover(queue.source(), queue.recovery()) == 1
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert columns(task, ENTRY) == ENTRY


def hang(task):
    Ledger.objects.create(task=task.pk)
    time.sleep(60)


def run_as_first():
    modelqueue.queue(Shift, "status", name="shifts", claim_values={"worker": "first"})(hang).run()


def test_worker_that_is_killed_leaves_its_name_until_the_next_claim(processes, declare):
    queue = declare(Shift, "status", name="shifts", claim_values={"worker": "second"})(succeed)
    task = Shift.objects.create(worker="nobody")
    victim = processes.start(run_as_first)
    wait_until(lambda: Ledger.objects.filter(task=task.pk))
    victim.kill()
    assert (stored(task).state, row(task).worker) == (State.working, "first")
    later = modelqueue.now() + 60 * SECOND
    with clock.use(lambda: later):
        assert verbs.recover(queue.source(), queue.recovery()) == 1
        assert row(task).worker == "first"
        queue.run()
    assert (stored(task).state, stored(task).attempts, row(task).worker) == (State.finished, 2, "second")


# claim_values: rows and values that are not as they should be


def test_value_that_can_not_be_read_is_not_put_back_and_blocks_no_other(engine, vendor, declare):
    queue = declare(PickyPaper, "status", name="papers", claim_values={"title": "new"})(succeed)
    unreadable, sound = PickyPaper.objects.create(title="unreadable"), PickyPaper.objects.create(title="old")
    source = queue.source()
    claims = {claim.row.pk: claim for claim in verbs.claim(source, 2)}
    assert (claims[unreadable.pk].row.before, claims[sound.pk].row.before) == (None, {"title": "old"})
    assert claims[sound.pk].task.title == "new"
    for claim in claims.values():
        assert verbs.release(source, claim.row, {claim.lease})
    titles = dict(PickyPaper.objects.values_list("pk", "title"))
    assert titles == {unreadable.pk: "new", sound.pk: "old"}


def test_database_that_goes_away_while_the_old_values_are_read_is_told(step_by_step, declare, monkeypatch):
    queue = declare(PickyPaper, "status", name="papers", claim_values={"title": "new"})(succeed)
    paper = PickyPaper.objects.create(title="unreadable", status=Status.waiting(5))
    read = Engine._read_before

    def fail(self, source, row):
        def away(*arguments):
            raise OperationalError("away")

        monkeypatch.setattr(self, "is_of_the_database_itself", lambda error: True)
        monkeypatch.setattr(type(source), "owner_rows", away)
        return read(self, source, row)

    monkeypatch.setattr(Engine, "_read_before", fail)
    with pytest.raises(OperationalError, match="away"):
        queue.claim()
    monkeypatch.undo()
    assert PickyPaper.objects.values_list("status", flat=True).get(pk=paper.pk) == Status.waiting(5)


def test_value_that_can_not_be_copied_is_shared(engine, declare):
    only = models.Single("single")
    queue = declare(PickyPaper, "status", name="papers", claim_values=lambda: {"title": only})(succeed)
    PickyPaper.objects.create()
    (paper,) = queue.claim()
    assert paper.title == "single"


def returning(values):
    return lambda: values


FIELDS = "badge, began, error, facts, project, worker"
WRONG = [
    ({5: 1}, TypeError, "a field is given by its name, a str, not by 5"),
    ({"wroker": "a"}, ValueError, f"NightShift has no field 'wroker', .* A claim can set: {FIELDS}"),
    (
        {"lamps": 1},
        ValueError,
        "can not set NightShift.lamps, which is in another table than testapp.Shift",
    ),
    ({"id": 1}, ValueError, "can not set NightShift.id, which is the primary key"),
    ({"status": 1}, ValueError, "can not set NightShift.status, which holds the status"),
    ({"project": 1, "project_id": 1}, ValueError, "names testapp.Shift.project twice, once as 'project_id'"),
    ({"worker": F("error")}, TypeError, r"sets testapp.Shift.worker to F\(error\), an expression"),
    ({"worker": None}, ValueError, "sets testapp.Shift.worker to None, which may not be NULL"),
    ({"worker": "a" * 21}, ValueError, "none of its values: Ensure this value has at most 20 characters"),
    ({"began": "noon"}, ValueError, "to 'noon', which is none of its values: .noon. value has an invalid"),
]


@pytest.mark.parametrize(("values", "error", "text"), WRONG, ids=range(len(WRONG)))
def test_wrong_values_are_refused_before_anything_is_written(values, error, text, declare):
    task = NightShift.objects.create(status=Status.waiting(5))
    with pytest.raises(error, match=text):
        declare(NightShift, "status", name="shifts", claim_values=values)(succeed)
    queue = declare(NightShift, "status", name="shifts", claim_values=returning(values))(succeed)
    with pytest.raises(error, match=text):
        queue.run()
    assert stored(task) == Status.waiting(5)


def test_callable_that_returns_no_dict_is_named(declare):
    queue = declare(Shift, "status", name="shifts", claim_values=returning(5))(succeed)
    with pytest.raises(TypeError, match=r"by field name, not 5 \(returned by .*returning.*\)\. Give for"):
        queue.run()


async def asynchronous(*arguments): ...


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (asynchronous, "is an async function, which nobody awaits"),
        (returning, "can not be called with no arguments: missing a required argument: 'values'"),
        (5, "are a dict .*not 5"),
    ],
)
def test_claim_values_are_a_dict_or_a_callable(given, text, declare):
    with pytest.raises(TypeError, match=f"claim_values.*{text}"):
        declare(Shift, "status", name="shifts", claim_values=given)(succeed)


def test_field_that_no_claim_can_set_is_refused(declare, monkeypatch):
    monkeypatch.setattr(Shift._meta.get_field("worker"), "generated", True, raising=False)
    with pytest.raises(ValueError, match=r"Shift\.worker, which the database computes"):
        declare(Shift, "status", name="shifts", claim_values={"worker": "a"})(succeed)
    with pytest.raises(ValueError, match=r"Paper\.attachments, which has no column"):
        declare(Paper, "status", name="papers", claim_values={"attachments": 1})(succeed)


@pytest.mark.skipif(not hasattr(models, "CompositeTask"), reason="needs composite primary keys")
def test_part_of_a_composite_key_is_refused(declare):
    with pytest.raises(ValueError, match=r"CompositeTask\.tenant, which is the primary key, or a part of it"):
        declare(models.CompositeTask, "status", name="parts", claim_values={"tenant": 5})(succeed)


def test_model_without_further_fields_says_so(declare):
    with pytest.raises(ValueError, match="A claim can set: none of its fields"):
        declare(models.UuidTask, "status", name="uuids", claim_values={"worker": "a"})(succeed)


def test_value_is_shown_as_its_field_would_load_it(engine, declare):
    queue = declare(Shift, "status", name="shifts", claim_values={"began": "2026-03-04T06:30:00.123Z"})(
        succeed
    )
    Shift.objects.create()
    (task,) = queue.claim()
    assert task.began == row(task).began == MORNING


# next_priority

AGAIN = {
    "fail": raising(ValueError("no")),
    "retry": raising(Retry(60 * SECOND)),
    "abort": raising(Abort(60 * SECOND)),
}


@pytest.mark.parametrize("kind", ["plain", "atomic", "async"])
@pytest.mark.parametrize("how", AGAIN)
def test_queue_chooses_the_priority_of_the_next_attempt(how, kind, declare):
    asked = []

    def choose(task, moment):
        asked.append((task, moment))
        return 77

    async def act(task):
        AGAIN[how](task)

    action = act if kind == "async" else AGAIN[how]
    options = {"delay": 60 * SECOND, "atomic": kind == "atomic", "next_priority": choose}
    queue = declare(Shift, "status", name="shifts", **options)(action)
    shift = Shift.objects.create(status=Status.waiting(5, 1))
    before = modelqueue.now()
    ran = testing.run_one(queue, raises=False)
    assert stored(shift) == Status.waiting(77, 1 if how == "retry" else 2)
    ((task, moment),) = asked
    assert task is ran.task
    assert before + 60 * SECOND <= moment <= modelqueue.now() + 60 * SECOND


def test_task_that_may_run_at_once_is_due_when_its_queue_is_asked(declare):
    seen = []

    def choose(task, moment):
        seen.append(moment <= modelqueue.now())
        return 77

    queue = declare(Shift, "status", name="shifts", retry=None, next_priority=choose)(raising(Retry()))
    Shift.objects.create()
    for _ in range(20):
        queue.run()
    assert seen == [True] * 20


@pytest.mark.parametrize(
    ("chosen", "priority"),
    [
        (0, 0),
        (10**17 - 1, 10**17 - 1),
        (MORNING, 20260304063000123),
        (MORNING.astimezone(dt.timezone(dt.timedelta(hours=2))), 20260304063000123),
        (MORNING.replace(tzinfo=None), 20260304063000123),
    ],
)
def test_priority_is_a_number_or_a_time(chosen, priority, declare):
    queue = declare(Shift, "status", name="shifts", next_priority=lambda task, moment: chosen)(
        raising(Abort())
    )
    task = Shift.objects.create()
    queue.run()
    assert stored(task) == Status.waiting(priority, 1)
    task.refresh_from_db()
    queue.enqueue(Shift.objects.exclude(pk=None), priority=6)  # not asked
    assert stored(task) == Status.waiting(6)


def never(task, moment):
    raise AssertionError(f"{task!r} has no next attempt of its own")


def assign(task):
    task.status = Status.waiting(5)


@pytest.mark.parametrize(
    ("action", "status"),
    [
        (succeed, "finished"),
        (assign, "waiting"),
        (raising(Cancel()), "canceled"),
        (raising(Abort()), "canceled"),
        (raising(ValueError()), "canceled"),
        (raising(Interrupted()), "waiting"),
    ],
    ids=["finish", "assign", "cancel", "abort", "fail", "release"],
)
def test_queue_is_not_asked_where_its_task_does_not_ask_for_another_attempt(action, status, declare):
    queue = declare(Shift, "status", name="shifts", retry=0, next_priority=never)(action)
    task = Shift.objects.create(status=Status.waiting(5))
    try:
        queue.run()
    except (ValueError, Interrupted):
        assert status != "finished"
    assert stored(task).state.name == status
    assert status != "waiting" or stored(task) == Status.waiting(5)


def test_recovery_and_rows_that_do_not_load_do_not_ask(declare):
    queue = declare(PickyPaper, "status", name="papers", lease=3 * SECOND, next_priority=never)(succeed)
    unreadable = PickyPaper.objects.create(title="unreadable", status=Status.waiting(5))
    with pytest.raises(ValueError, match="this value can not be read"):
        queue.run()
    statuses = PickyPaper.objects.filter(pk=unreadable.pk).values_list("status", flat=True)
    assert (statuses[0].state, statuses[0].attempts) == (State.waiting, 1)
    PickyPaper.objects.update(status=Status.working(5))
    assert verbs.recover(queue.source(), queue.recovery()) == 1
    assert (statuses[0].state, statuses[0].attempts) == (State.waiting, 1)


@pytest.mark.parametrize("how", ["fail", "retry", "abort"])
@pytest.mark.parametrize(
    ("chosen", "error", "text"),
    [
        (KeyError("none"), KeyError, "none"),
        (SystemExit(3), SystemExit, "3"),
        (None, TypeError, "A priority is a datetime or an int .* not None"),
        (True, TypeError, "A priority is .* not True"),
        (10**17, ValueError, "does not fit into 17 digits"),
    ],
    ids=["raises", "exits", "none", "bool", "too large"],
)
def test_attempt_whose_queue_can_not_choose_has_failed(chosen, error, text, how, declare, caplog):
    def choose(*arguments):
        if isinstance(chosen, BaseException):
            raise chosen
        return chosen

    queue = declare(Shift, "status", name="shifts", error_field="error", next_priority=choose)(KEPT[how])
    task = Shift.objects.create()
    with heard("task_finished") as events, pytest.raises(error, match=text) as raised:
        queue.run()
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert modelqueue.now() - SECOND < stored(task).parse()[1] <= modelqueue.now()
    assert events[0][1]["outcome"] == "fail"
    assert error.__name__ in row(task).error
    assert error.__name__ in caplog.text
    assert type(raised.value.__cause__) is {"fail": ValueError, "retry": Retry, "abort": Abort}[how]


def test_attempt_whose_queue_can_not_choose_may_be_the_last(declare):
    nothing = {"retry": 0, "next_priority": lambda task, moment: None}
    queue = declare(Shift, "status", name="shifts", **nothing)(raising(Retry()))
    task = Shift.objects.create()
    with pytest.raises(TypeError):
        queue.run()
    assert (stored(task).state, stored(task).attempts) == (State.canceled, 1)


def test_attempt_whose_changes_can_not_be_saved_asks(declare, monkeypatch):
    def change(task):
        task.worker = "mine"

    def refuse(*arguments):
        raise DatabaseError("no")

    queue = declare(Shift, "status", name="shifts", next_priority=lambda task, moment: 77)(change)
    task = Shift.objects.create()
    monkeypatch.setattr(attempts, "save_merged", refuse)
    with pytest.raises(DatabaseError):
        queue.run()
    assert stored(task) == Status.waiting(77, 1)


def test_error_of_the_database_leaves_the_transaction_of_the_caller_usable(declare):
    def choose(task, moment):
        with connection.cursor() as cursor:
            cursor.execute("SELECT nothing FROM nowhere")

    queue = declare(Shift, "status", name="shifts", next_priority=choose)(raising(Retry()))
    with transaction.atomic():
        task = Shift.objects.create()
        with pytest.raises(DatabaseError):
            queue.run()
        assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


def test_no_lease_comes_twice_under_a_priority_that_is_no_time(declare):
    """On a machine that makes several attempts in a millisecond."""
    began, leases = modelqueue.now(), []

    def note(task):
        leases.append(stored(task))
        raise Retry

    queue = declare(Shift, "status", name="shifts", next_priority=lambda task, moment: 77)(note)
    Shift.objects.create(status=Status.waiting(5))
    with clock.use(lambda: began + (dt.datetime.now(dt.timezone.utc) - began) / 50):
        while len(leases) < 30:
            queue.run()
    assert len(set(leases)) == 30


def test_task_waits_for_the_time_of_its_lease_where_the_clock_was_set_back(declare):
    """Else its next claim could stamp the same lease."""
    moment = Clock()

    def set_back(task):
        moment.move(-60 * SECOND)
        raise Retry

    queue = declare(Shift, "status", name="shifts", next_priority=lambda task, moment: 77)(set_back)
    with clock.use(moment):
        task = Shift.objects.create(status=Status.waiting(5))
        (claim,) = verbs.claim(queue.source())
        queue.attempt(claim, queue.source()).process(queue.action)
    assert stored(task) == Status.waiting(claim.lease.priority)


def test_priority_stands_where_the_lease_is_renewed_before_it_is_written(declare, monkeypatch):
    queue = declare(Shift, "status", name="shifts", next_priority=lambda task, moment: 77)(raising(Abort()))
    task = Shift.objects.create()
    (claim,) = verbs.claim(queue.source())
    attempt = queue.attempt(claim, queue.source())

    def away(*arguments):
        raise OperationalError("away")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "compare_and_set", away)
        patch.setattr(Engine, "is_of_the_database_itself", lambda self, error: True)
        patch.setattr(Engine, "patiently", lambda self, work, reconnect=False: work())
        with pytest.raises(OperationalError):
            attempt.settle(Abort())
    time.sleep(0.005)
    verbs.renew(queue.source(), {task.pk: attempt.leases})
    assert attempt.lease > claim.lease
    attempt.settle(Abort())
    assert stored(task) == Status.waiting(77, 1)


# next_priority: enqueueing


def test_enqueued_task_gets_the_priority_that_its_queue_chooses(declare):
    asked = []

    def choose(task, moment):
        asked.append((task, moment))
        return 77

    queue = declare(Shift, "status", name="shifts", next_priority=choose)(succeed)
    task = Shift.objects.create(status=Status.finished())
    before = modelqueue.now()
    assert queue.enqueue(task) == 1
    assert stored(task) == task.status == Status.waiting(77)
    assert [one for one, _ in asked] == [task]
    assert before <= asked[0][1] <= modelqueue.now()
    assert queue.enqueue(task) == 0  # it is due: not sent to the end of the queue
    assert queue.enqueue(task, at=MORNING) == queue.enqueue(task, priority=5) == 1
    assert len(asked) == 2
    later = Shift.objects.create(status=Status.waiting(modelqueue.now() + 60 * SECOND))
    assert queue.enqueue(later) == 1
    assert stored(later) == Status.waiting(77)


def test_queue_is_not_asked_for_those_that_are_not_loaded(declare):
    queue = declare(Shift, "status", name="shifts", next_priority=never)(succeed)
    task = Shift.objects.create(status=Status.canceled())
    assert queue.retry() == 1
    Shift.objects.update(status=Status.created())
    assert queue.enqueue() == 1
    Shift.objects.update(status=Status.created())
    assert queue.enqueue(Shift.objects.all()) == 1
    assert stored(task).priority > 10**16


@pytest.mark.parametrize("chosen", [None, "high", -1])
def test_task_is_not_enqueued_where_its_queue_can_not_choose(chosen, declare):
    queue = declare(Shift, "status", name="shifts", next_priority=lambda task, moment: chosen)(succeed)
    task = Shift.objects.create(status=Status.created(5))
    with pytest.raises((TypeError, ValueError), match=r"[Pp]riority"):
        queue.enqueue(task)
    assert stored(task) == task.status == Status.created(5)


def test_queue_is_not_asked_for_what_can_not_be_enqueued(declare):
    queue = declare(Shift, "status", name="shifts", next_priority=never)(succeed)
    with pytest.raises(ValueError, match="is not saved"):
        queue.enqueue(Shift())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (5, "is a callable that gets a task and a time, not 5"),
        (asynchronous, "is an async function, which nobody awaits"),
        (returning, "can not be called with a task and a time: too many positional arguments"),
    ],
)
def test_next_priority_is_a_callable_of_two_arguments(given, text, declare):
    with pytest.raises(TypeError, match=f"next_priority.*{text}"):
        declare(Shift, "status", name="shifts", next_priority=given)(succeed)


def test_hook_whose_signature_nobody_knows_is_taken(declare):
    class Chooser:
        __signature__ = 5

        def __call__(self, task, moment):
            return 77

    declare(Shift, "status", name="shifts", next_priority=Chooser())(succeed)


# upkeep, in tests


def run_for_an_hour(*queues):
    return testing.run_until(3600 * SECOND, *queues)


@pytest.mark.parametrize("run", [testing.run_to_end, run_for_an_hour])
def test_upkeep_is_done_once_before_tasks_are_looked_for(run, declare):
    calls = []

    def make_task():
        calls.append(Shift.objects.create(status=Status.waiting(modelqueue.now() + 60 * SECOND)))

    queue = declare(Shift, "status", name="shifts", upkeep=make_task)(succeed)
    other = declare(Job, "status", name="jobs")(succeed)
    (ran,) = run(queue, other)
    assert [ran.task] == calls


def test_upkeep_of_a_queue_that_is_not_run_is_not_done(declare):
    declare(Shift, "status", name="shifts", upkeep=lambda: 1 / 0)(succeed)
    assert testing.run_to_end(declare(Job, "status", name="jobs")(succeed)) == []
