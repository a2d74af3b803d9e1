"""Tasks of dead workers come back, all of them and soon; rows that can not be run do not block others."""

import datetime as dt
import time

import pytest
from django.db import IntegrityError, OperationalError, ProgrammingError, connection, connections
from django.db.models import Value

import modelqueue
from modelqueue import ONE_HOUR, ZERO_SECS, Abort, State, Status, clock, execution, now, run, verbs
from modelqueue.engines import Candidate, Engine, RowLocked, engine_for
from modelqueue.exceptions import TimedOut, WorkerDied
from modelqueue.outcomes import Policy
from modelqueue.source import Source
from tests.actions import (
    LONG_AGO,
    MILLISECOND,
    SECOND,
    Clock,
    heard,
    raising,
    row,
    stored,
    succeed,
    unexpected,
)
from tests.faults.harm import end_session
from tests.pace import within
from tests.testapp.models import (
    ExclusiveTask,
    Job,
    NumberedJob,
    Paper,
    PickyPaper,
    PickyReference,
    PrintJob,
    ReviewedTask,
    Task,
)

pytestmark = pytest.mark.django_db(transaction=True)

EXPIRED = Status.working(LONG_AGO)


def expired(count, attempts=0, model=Task):
    rows = [model(status=Status.working(LONG_AGO + number * SECOND, attempts)) for number in range(count)]
    return model.objects.bulk_create(rows)


def recover(queryset=None, field="status", error_field=None, **policy):
    source = Source.of(Task.objects.all() if queryset is None else queryset, field, error_field)
    return verbs.recover(source, Policy(**policy), seconds=60)


def statuses(model=Task):
    return [Status(number) for number in model.objects.order_by("pk").values_list("status", flat=True)]


# What becomes of an expired task


def test_expired_task_runs_in_the_call_that_recovers_it():
    task = Task.objects.create(status=EXPIRED)
    assert run(Task.objects, "status", succeed) == task
    assert (stored(task).state, stored(task).attempts) == (State.finished, 2)


@pytest.mark.parametrize("retry", [0, 1, 3, 8, None])
@pytest.mark.parametrize("attempts", range(10))
def test_recovery_charges_an_attempt(attempts, retry):
    expired(1, attempts)
    assert recover(retry=retry) == 1
    is_out = retry is not None and attempts + 1 > retry
    status = statuses()[0]
    assert status.state == (State.canceled if is_out else State.waiting)
    assert status.attempts == min(attempts + 1, 9)


def test_expired_task_with_nine_attempts_is_canceled():
    task = Task.objects.create(status=Status.working(LONG_AGO, 9))
    assert run(Task.objects, "status", unexpected) is None
    assert (stored(task).state, stored(task).attempts) == (State.canceled, 9)


def test_expired_task_with_nine_attempts_runs_where_there_is_no_limit():
    task = Task.objects.create(status=Status.working(LONG_AGO, 9))
    assert run(Task.objects, "status", succeed, retry=None) == task
    assert (stored(task).state, stored(task).attempts) == (State.finished, 9)


def test_recovered_task_waits_for_its_delay():
    now = Clock()
    with clock.use(now):
        expired(1, attempts=1)
        waits = []
        recover(delay=lambda attempts: waits.append(attempts) or 60 * SECOND)
        assert waits == [2]
        assert statuses() == [Status.waiting(now.moment + 60 * SECOND, 2)]


def test_delay_without_an_end():
    expired(1)
    recover(delay=dt.timedelta.max)
    assert statuses() == [Status.waiting(dt.datetime.max, 1)]


def test_broken_delay_does_not_keep_the_task_and_is_logged(caplog):
    expired(2)
    assert recover(delay=lambda attempts: 1 / 0) == 2
    assert [status.state for status in statuses()] == [State.waiting] * 2
    assert "ZeroDivisionError" in caplog.text
    assert "The delay of a recovered task can not be computed" in caplog.text


def test_recovery_is_told():
    task = Task.objects.create(status=EXPIRED)
    with heard("task_recovered") as events:
        recover(Task.objects.using("default"))
    assert events == [
        (
            "task_recovered",
            {
                "sender": Task,
                "pk": task.pk,
                "field": "status",
                "using": "default",
                "queue": None,
                "lease": EXPIRED,
                "status": stored(task),
                "error": None,
            },
        )
    ]


# When a lease has run out


@pytest.mark.parametrize("timeout", [ZERO_SECS, MILLISECOND, 5 * MILLISECOND, SECOND, ONE_HOUR])
def test_lease_runs_out_at_its_timeout_to_the_millisecond(timeout):
    now = Clock()
    with clock.use(now):
        Task.objects.create(status=Status.working(now.moment))
        now.move(timeout - MILLISECOND)
        assert recover(timeout=timeout) == 0
        now.move(MILLISECOND)
        assert recover(timeout=timeout) == 1


def test_claim_of_the_same_moment_has_not_expired_even_with_a_timeout_of_zero():
    now = Clock()
    with clock.use(now):
        Task.objects.create()

        def action(task):
            assert recover(timeout=ZERO_SECS) == 0
            now.move(MILLISECOND)
            assert recover(timeout=ZERO_SECS) == 1

        with heard("lease_lost") as events:
            run(Task.objects, "status", action)
        assert len(events) == 1


def test_longest_timeout_never_runs_out():
    Task.objects.create(status=Status.working(0))
    assert recover(timeout=dt.timedelta.max) == 0
    assert run(Task.objects, "status", unexpected, timeout=dt.timedelta.max) is None
    assert statuses() == [Status.working(0)]


def test_clocks_of_two_machines_may_differ():
    slow, fast = Clock(), Clock()
    fast.move(3 * SECOND)
    with clock.use(fast):
        task = Task.objects.create()
    with clock.use(slow):
        assert run(Task.objects, "status", unexpected) is None  # not due here yet
    with clock.use(fast):

        def action(task):
            with clock.use(slow):
                assert recover(timeout=SECOND) == 0
                slow.move(6 * SECOND)
                assert recover(timeout=2 * SECOND) == 1
                waiting = stored(task)
                assert waiting.priority >= task.status.priority

        run(Task.objects, "status", action)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


def test_outcome_on_a_slow_clock_is_never_older_than_its_lease():
    fast, slow = Clock(), Clock()
    slow.move(-10 * SECOND)
    with clock.use(fast):
        task = Task.objects.create()

        def action(task):
            clock._clock = slow  # the clock is set back while the action runs
            raise Abort

        run(Task.objects, "status", action)
    assert stored(task) == Status.waiting(fast.moment + MILLISECOND, 1)


# How many, how soon, and whose


def test_five_hundred_expired_tasks_are_back_within_a_call():
    expired(500)
    before = time.monotonic()
    recovered = []
    while any(status.state == State.working for status in statuses()):
        recovered.append(recover())
    assert sum(recovered) == 500
    assert len(recovered) <= 3
    assert time.monotonic() - before < 10


def test_expired_tasks_are_recovered_together(monkeypatch):
    """What goes wrong with all of them is repeated one by one: no other test would show it."""
    monkeypatch.setattr(Engine, "_recover_one_by_one", lambda *arguments: pytest.fail("one by one"))
    expired(3)
    assert recover() == 3


def test_recovery_that_takes_long_goes_on_with_the_next_call():
    expired(60)
    source = Source.of(Task.objects.all(), "status")
    assert verbs.recover(source, Policy(), seconds=0) == 20
    assert verbs.recover(source, Policy(), seconds=0) == 20
    assert [status.state for status in statuses()] == [State.waiting] * 40 + [State.working] * 20
    assert recover() == 20


def test_oldest_lease_is_recovered_first():
    Task.objects.create(status=Status.working(LONG_AGO + SECOND))
    oldest = Task.objects.create(status=Status.working(LONG_AGO))
    with heard("task_recovered") as events:
        recover()
    assert events[0][1]["pk"] == oldest.pk


def test_living_and_ended_tasks_are_left_alone():
    numbers = [
        Status.created(LONG_AGO),
        Status.waiting(LONG_AGO),
        Status.working(),
        Status.finished(LONG_AGO),
        Status.canceled(LONG_AGO),
        Status(0),
        Status(-1),
        Status(6 * 10**18),
    ]
    Task.objects.bulk_create([Task(status=number) for number in numbers])
    assert recover() == 0
    assert statuses() == numbers


def test_only_rows_of_the_queryset_are_recovered():
    Task.objects.bulk_create([Task(data=data, status=EXPIRED) for data in "ab"])
    assert recover(Task.objects.filter(data="b")) == 1
    assert [status.state for status in statuses()] == [State.working, State.waiting]


def test_other_queue_of_the_row_is_left_alone():
    Job.objects.create(status=EXPIRED, review_status=EXPIRED)
    assert recover(Job.objects, "review_status") == 1
    assert Job.objects.get().status == EXPIRED


def test_status_of_a_parent_is_recovered():
    job = PrintJob.objects.create(status=EXPIRED)
    assert recover(PrintJob.objects, error_field="error") == 1
    assert stored(job).state == State.waiting


def test_reason_stands_in_the_error_field():
    paper = Paper.objects.create(status=EXPIRED, error="old")
    recover(Paper.objects, error_field="error", timeout=90 * SECOND)
    assert row(paper).error.startswith(
        "modelqueue.exceptions.LeaseExpired: attempt 1 was not reported within 0:01:30 of its claim"
    )


def test_reason_stands_in_the_error_field_of_a_child_table():
    task = ReviewedTask.objects.create(status=EXPIRED, error="old")
    other = ReviewedTask.objects.create(status=Status.waiting(5), error="old")
    recover(ReviewedTask.objects, error_field="error")
    assert row(task).error.startswith("modelqueue.exceptions.LeaseExpired: ")
    assert row(other).error == "old"


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize("using", ["default", "other"])
def test_reason_that_can_not_be_written_to_a_child_table_leaves_the_lease(using):
    def refuse(execute, sql, params, many, context):
        if sql.startswith("UPDATE") and "testapp_reviewedtask" in sql:
            raise IntegrityError("no")
        return execute(sql, params, many, context)

    task = ReviewedTask.objects.using(using).create(status=EXPIRED)
    source = Source.of(ReviewedTask.objects.using(using), "status", "error")
    row = Candidate(task.pk, task.task_ptr_id, EXPIRED)
    with connections[using].execute_wrapper(refuse), pytest.raises(IntegrityError):
        engine_for(using).compare_and_set(source, row, [EXPIRED], Status.waiting(5), "reason")
    assert stored(task) == EXPIRED


def test_reason_is_emptied_by_the_success_that_follows():
    paper = Paper.objects.create(status=EXPIRED)
    assert run(Paper.objects, "status", succeed, error_field="error") == paper
    assert row(paper).error == ""


# When run() recovers


def test_busy_queue_is_recovered_once_a_second(monkeypatch):
    moment = [1000.0]
    monkeypatch.setattr(execution.time, "monotonic", lambda: moment[0])
    Task.objects.bulk_create([Task(status=Status.waiting(LONG_AGO)) for _ in range(10)])
    run(Task.objects, "status", succeed)
    expired(1)
    moment[0] += 0.9
    run(Task.objects, "status", succeed)
    assert statuses()[-1].state == State.working
    moment[0] += 0.1
    run(Task.objects, "status", succeed)
    assert statuses()[-1].state == State.waiting


def test_empty_queue_is_recovered_at_once():
    Task.objects.create()
    run(Task.objects, "status", succeed)
    task = expired(1)[0]
    assert run(Task.objects, "status", succeed) == task


def test_querysets_take_their_turns_apart():
    for data in "ab":
        Task.objects.create(data=data)
        run(Task.objects.filter(data=data), "status", succeed)
    execution._last_recovery.clear()
    Task.objects.create(data="a")
    Task.objects.create(data="b")
    expired_b = Task.objects.create(data="b", status=EXPIRED)
    run(Task.objects.filter(data="a"), "status", succeed)
    assert stored(expired_b).state == State.working
    run(Task.objects.filter(data="b"), "status", succeed)
    assert stored(expired_b).state == State.waiting


class Unhashable(Value):
    __hash__ = None


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize(
    ("busy", "field", "rows"),
    [
        (Job.objects, "status", Task.objects),
        (Job.objects, "review_status", Job.objects),
        (Task.objects.using("other"), "status", Task.objects),
        (Task.objects.filter(data=Unhashable("b")), "status", Task.objects.filter(data=Unhashable("a"))),
    ],
    ids=["model", "field", "database", "unhashable filter"],
)
def test_a_busy_queue_does_not_use_up_the_turns_of_another(busy, field, rows):
    text = {"data": "b"} if busy.model is Task else {}
    busy.create(**{**text, "status": Status.created(), field: Status.waiting()})
    text = {"data": "a"} if rows.model is Task else {}
    rows.create(**text, status=Status.waiting())
    lost = rows.create(**text, status=EXPIRED)
    assert run(busy, field, succeed) is not None
    assert stored(lost).state == State.working
    assert run(rows, "status", succeed) is not None
    assert stored(lost).state == State.waiting


def test_filter_with_an_unhashable_value():
    task = Task.objects.create(data="a")
    rows = Task.objects.filter(data=Unhashable("a"))
    with pytest.raises(TypeError):
        hash(rows.query.where)
    assert run(rows, "status", succeed) == task


def test_memory_of_recoveries_is_bounded():
    for number in range(1100):
        execution._last_recovery[number] = 0.0
    Task.objects.create()
    run(Task.objects, "status", succeed)
    assert len(execution._last_recovery) == 1


# Rows that can not be run


@pytest.mark.parametrize("retry", [0, 3])
def test_row_that_can_not_be_loaded_neither_blocks_others_nor_comes_up_for_ever(retry):
    unreadable = PickyPaper.objects.create(title="unreadable", status=Status.waiting(0))
    others = [PickyPaper.objects.create(title=title) for title in "ab"]
    ran = []
    failures = 0
    with heard("task_finished", "task_claimed") as events:
        for _ in range(20):
            try:
                task = run(PickyPaper.objects, "status", succeed, retry=retry, error_field="error")
            except ValueError as error:
                assert str(error) == "this value can not be read"  # noqa: PT017
                failures += 1
            else:
                ran += [] if task is None else [task]
    assert ran == others
    assert failures == retry + 1
    number, text = PickyPaper.objects.values_list("status", "error").get(pk=unreadable.pk)
    assert (number.state, number.attempts) == (State.canceled, retry + 1)
    assert text.splitlines()[0] == "builtins.ValueError: this value can not be read"
    told = [(name, event["task"]) for name, event in events if event["pk"] == unreadable.pk]
    assert told == [("task_finished", None)] * failures


def test_row_that_can_not_be_loaded_waits_for_its_delay():
    PickyPaper.objects.create(title="unreadable")
    with pytest.raises(ValueError, match="can not be read"):
        run(PickyPaper.objects, "status", unexpected, delay=ONE_HOUR)
    assert run(PickyPaper.objects, "status", unexpected) is None


def test_row_that_can_not_be_loaded_is_recovered_like_others():
    PickyPaper.objects.create(title="unreadable", status=EXPIRED)
    assert recover(PickyPaper.objects, error_field="error") == 1


def test_row_whose_related_row_can_not_be_loaded_is_a_failed_attempt():
    papers = [PickyPaper.objects.create(title=title) for title in ("unreadable", "a")]
    references = [PickyReference.objects.create(paper=paper) for paper in papers]
    rows = PickyReference.objects.select_related("paper")
    with pytest.raises(ValueError, match="can not be read"):
        run(rows, "status", unexpected)
    assert (stored(references[0]).state, stored(references[0]).attempts) == (State.waiting, 1)
    assert run(rows, "status", succeed) == references[1]


@pytest.fixture
def unmigrated():
    """A column that the code knows and the table does not have: code was deployed before it was migrated."""
    tasks = [Paper.objects.create(title=title) for title in ("a", "b")]
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE testapp_paper RENAME COLUMN title TO former_title")
        yield tasks
        cursor.execute("ALTER TABLE testapp_paper RENAME COLUMN former_title TO title")


@pytest.mark.parametrize("count", [1, 2])
def test_column_that_is_missing_charges_no_task(count, unmigrated):
    """No row loads, but that is no fault of theirs: all would end canceled without an action."""
    Paper.objects.filter(pk__in=[task.pk for task in unmigrated[count:]])._raw_delete("default")
    for _ in range(3):
        with pytest.raises((OperationalError, ProgrammingError)):
            run(Paper.objects, "status", unexpected, retry=0)
    assert statuses(Paper) == [task.status for task in unmigrated[:count]]


def test_queryset_that_can_not_be_loaded_raises_and_claims_nothing():
    task = Task.objects.create()
    with pytest.raises(AttributeError, match="nonsense"):
        run(Task.objects.prefetch_related("nonsense"), "status", unexpected)
    assert stored(task) == task.status


# Rows that a constraint of their table keeps where they are


@pytest.mark.db_feature("supports_partial_indexes")
def test_row_that_a_constraint_keeps_from_working_is_passed_over(caplog):
    ran = []

    def act(task):
        ran.append(task.group)
        # The other one of this group has to wait; that of another group has not.
        run(ExclusiveTask.objects, "status", lambda other: ran.append(other.group))

    ExclusiveTask.objects.create(group=1, status=Status.waiting(0))
    run(ExclusiveTask.objects, "status", lambda task: add_and_act(task, act))
    assert ran == [1, 2]
    assert "can not be claimed" in caplog.text
    assert run(ExclusiveTask.objects, "status", lambda task: ran.append(task.group)).group == 1
    assert ran == [1, 2, 1]
    assert {status.state for status in statuses(ExclusiveTask)} == {State.finished}


@pytest.mark.db_feature("supports_partial_indexes")
def test_many_rows_that_can_not_be_claimed_are_one_warning(caplog):
    for group in range(70):
        ExclusiveTask.objects.create(group=group, status=Status.working())
        ExclusiveTask.objects.create(group=group, status=Status.waiting(group))
    free = ExclusiveTask.objects.create(group=99, status=Status.waiting(99))
    with caplog.at_level("DEBUG", "modelqueue"):
        assert run(ExclusiveTask.objects, "status", lambda task: None) == free
    told = [one for one in caplog.records if "can not be claimed" in one.getMessage()]
    assert [one.levelname for one in told] == ["WARNING", *["DEBUG"] * 69]
    assert told[0].getMessage().endswith("(and so it is with 69 more)")


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize("using", ["default", "other"])
@pytest.mark.db_feature("supports_partial_indexes")
def test_rows_beside_one_that_a_constraint_keeps_from_working_are_claimed_as_many_as_asked_for(using):
    tasks = ExclusiveTask.objects.using(using)
    for group in (1, 2, 7):
        tasks.create(group=group, status=Status.working())
    waiting = [
        tasks.create(group=group, status=Status.waiting(place))
        for place, group in enumerate((1, 3, 2, 7, 4, 5, 6))
    ]
    claims = verbs.claim(Source.of(tasks, "status"), 3)
    assert [claim.task.group for claim in claims] == [3, 4, 5]
    assert sum(stored(task).state == State.working for task in waiting) == 3


def add_and_act(task, act):
    ExclusiveTask.objects.create(group=1, status=Status.waiting(1))
    ExclusiveTask.objects.create(group=2, status=Status.waiting(2))
    act(task)


@pytest.mark.db_feature("supports_partial_indexes")
def test_row_that_a_constraint_keeps_from_waiting_is_recovered_when_it_may(caplog):
    one = ExclusiveTask.objects.create(group=1, status=EXPIRED)
    two = ExclusiveTask.objects.create(group=1, status=Status.waiting(ONE_HOUR + modelqueue.now()))
    three = ExclusiveTask.objects.create(group=2, status=EXPIRED)
    assert recover(ExclusiveTask.objects) == 1
    assert "can not be recovered" in caplog.text
    assert (one.status, two.status) == (stored(one), stored(two))
    assert (stored(three).state, stored(three).attempts) == (State.waiting, 1)
    two.delete()
    assert recover(ExclusiveTask.objects) == 1
    assert (stored(one).state, stored(one).attempts) == (State.waiting, 1)


@pytest.mark.db_feature("supports_partial_indexes")
def test_all_that_are_recovered_beside_a_row_that_can_not_be_are_told():
    ExclusiveTask.objects.create(group=1, status=Status.waiting())
    tasks = [ExclusiveTask.objects.create(group=group, status=EXPIRED) for group in (1, 2, 3, 4)]
    with heard("task_recovered") as events:
        assert recover(ExclusiveTask.objects) == 3
    assert sorted(facts["pk"] for _, facts in events) == [task.pk for task in tasks[1:]]


REFUSE = {
    "sqlite": """
        CREATE TRIGGER refuse BEFORE UPDATE ON testapp_task WHEN NEW.data = 'refused'
        BEGIN SELECT RAISE(ABORT, 'refused'); END
        """,
    "postgresql": """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = 'XX000'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON testapp_task FOR EACH ROW WHEN (NEW.data = 'refused')
            EXECUTE FUNCTION refuse()
        """,
    "mysql": """
        CREATE TRIGGER refuse BEFORE UPDATE ON testapp_task FOR EACH ROW
        IF NEW.data = 'refused' THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'refused'; END IF
        """,
}
ALLOW = {
    "sqlite": "DROP TRIGGER refuse",
    "postgresql": "DROP FUNCTION refuse() CASCADE",
    "mysql": "DROP TRIGGER refuse",
}


@pytest.fixture
def refused(vendor):
    """A row that a trigger keeps from any change, by whatever error its database has for that."""
    task = Task.objects.create(data="refused", status=EXPIRED)
    with connection.cursor() as cursor:
        cursor.execute(REFUSE[vendor])
    yield task
    with connection.cursor() as cursor:
        cursor.execute(ALLOW[vendor])


def test_row_that_a_trigger_refuses_holds_up_no_recovery(refused, caplog):
    (other,) = expired(1)
    assert recover() == 1
    assert (stored(refused), stored(other).state) == (EXPIRED, State.waiting)
    assert "can not be recovered" in caplog.text


def test_row_that_a_trigger_refuses_holds_up_no_claim(vendor, caplog, request):
    first = Task.objects.create(data="refused", status=Status.waiting(1))
    request.getfixturevalue("refused")
    other = Task.objects.create()
    assert run(Task.objects, "status", succeed) == other
    assert stored(first) == Status.waiting(1)
    assert "can not be claimed" in caplog.text


@pytest.mark.vendor("postgresql", "mysql")
def test_claims_beside_a_row_that_is_refused_are_none_when_the_session_ends(request, monkeypatch):
    """They are rolled back with it, though each was set: whoever ran them would not be their owner."""

    def end_before_the_last(self, source, row, *arguments, **options):
        if row.pk == last.pk:
            end_session(self.connection)
        return compare_and_set(self, source, row, *arguments, **options)

    first = Task.objects.create(status=Status.waiting(0))
    second = Task.objects.create(data="refused", status=Status.waiting(1))
    last = Task.objects.create(status=Status.waiting(2))
    request.getfixturevalue("refused")
    compare_and_set = Engine.compare_and_set
    monkeypatch.setattr(Engine, "compare_and_set", end_before_the_last)
    with pytest.raises(OperationalError):
        verbs.claim(Source.of(Task.objects, "status"), 3)
    assert [stored(task) for task in (first, second, last)] == [first.status, second.status, last.status]


class BusyRow:
    """A row whose status the database lets nobody set for so many times: "try again"."""

    def __init__(self, monkeypatch, task, times):
        compare_and_set = Engine.compare_and_set
        left = [times]

        def set_later(engine, source, row, *arguments):
            if row.pk == task.pk and left[0] > 0:
                left[0] -= 1
                raise OperationalError("busy")
            return compare_and_set(engine, source, row, *arguments)

        monkeypatch.setattr(Engine, "compare_and_set", set_later)
        monkeypatch.setattr(type(engine_for("default")), "is_try_again", lambda self, e: str(e) == "busy")


@pytest.mark.parametrize("place", [0, 2])
def test_all_that_are_recovered_are_told_also_when_the_database_is_busy_meanwhile(
    place, refused, monkeypatch
):
    tasks = expired(3)
    BusyRow(monkeypatch, tasks[place], times=3)
    with heard("task_recovered") as events:
        assert recover() == 3
    assert [facts["pk"] for _, facts in events] == [task.pk for task in tasks]


@pytest.mark.parametrize("place", [0, 2])
def test_what_is_recovered_before_the_database_answers_no_more_is_told(place, refused, monkeypatch, caplog):
    tasks = expired(3)
    BusyRow(monkeypatch, tasks[place], times=10**6)
    monkeypatch.setattr(Engine, "patience", 0.0)
    with heard("task_recovered") as events:
        if place == 0:
            with pytest.raises(OperationalError, match="busy"):
                recover()
        else:
            assert recover() == 2
            assert "testapp.Task: fewer are recovered: busy" in caplog.text
    assert [facts["pk"] for _, facts in events] == [task.pk for task in tasks[:place]]
    assert [task.state for task in statuses()] == [
        State.working, *[State.waiting] * place, *[State.working] * (3 - place)
    ]  # fmt: skip


@pytest.mark.db_feature("supports_partial_indexes")
def test_failure_that_a_constraint_keeps_from_waiting_is_raised_and_recovered():
    task = ExclusiveTask.objects.create(group=1)

    def fail(task):
        ExclusiveTask.objects.create(group=1)
        raise ValueError("no")

    with pytest.raises(IntegrityError):
        run(ExclusiveTask.objects, "status", fail)
    assert stored(task).state == State.working
    ExclusiveTask.objects.exclude(pk=task.pk).delete()
    assert run(ExclusiveTask.objects, "status", succeed, timeout=ZERO_SECS) == task


# Rows that somebody has locked


def lock(connection, *tasks):
    """Lock the rows of tasks in the session of somebody else."""
    with connection.cursor() as cursor:
        for task in tasks:  # one by one: asked for many of few rows, MariaDB locks them all
            cursor.execute(f"SELECT id FROM {task._meta.db_table} WHERE id = {task.pk} FOR UPDATE")
            cursor.fetchall()


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_locked_head_of_the_queue_is_passed_over_at_once(bystander):
    tasks = [Task.objects.create(status=Status.waiting(number)) for number in range(3)]
    lock(bystander, *tasks[:1])
    before = time.monotonic()
    assert run(Task.objects, "status", succeed) == tasks[1]
    assert run(Task.objects, "status", succeed) == tasks[2]
    assert run(Task.objects, "status", unexpected) is None
    assert time.monotonic() - before < within(2)
    bystander.rollback()
    assert run(Task.objects, "status", succeed) == tasks[0]


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_many_locked_rows_are_passed_over(bystander):
    tasks = Task.objects.bulk_create([Task(status=Status.waiting(number)) for number in range(200)])
    lock(bystander, *tasks[:-1])
    assert run(Task.objects, "status", succeed) == tasks[-1]


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_recovery_passes_over_a_locked_row(bystander):
    tasks = expired(100)
    lock(bystander, tasks[37])
    before = time.monotonic()
    assert recover() == 99
    assert time.monotonic() - before < 5
    assert stored(tasks[37]).state == State.working
    bystander.rollback()
    assert recover() == 1


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_recovery_passes_over_a_row_whose_error_can_not_be_written(bystander):
    # The status is in the table of the parent, and free.
    tasks = [ReviewedTask.objects.create(status=EXPIRED) for _ in range(3)]
    with bystander.cursor() as cursor:
        cursor.execute(f"SELECT 1 FROM testapp_reviewedtask WHERE task_ptr_id = {tasks[1].pk} FOR UPDATE")
        cursor.fetchall()
    before = time.monotonic()
    assert recover(ReviewedTask.objects, error_field="error") == 2
    assert time.monotonic() - before < 5
    assert stored(tasks[1]).state == State.working
    bystander.rollback()
    assert recover(ReviewedTask.objects, error_field="error") == 1


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_locked_row_of_another_table_of_the_query_is_no_obstacle(bystander):
    # Only the table that has the status column is locked, here that of the parent.
    job = PrintJob.objects.create()
    with bystander.cursor() as cursor:
        cursor.execute(f"SELECT pages FROM testapp_printjob WHERE job_ptr_id = {job.pk} FOR UPDATE")
        cursor.fetchall()
    assert run(PrintJob.objects.filter(pages=1), "status", succeed) == job


@pytest.mark.db_feature("has_select_for_no_key_update")
def test_child_row_in_flight_does_not_hide_its_task(bystander):
    # Its foreign key holds a lock on the task, which FOR UPDATE would meet.
    paper = Paper.objects.create()
    with bystander.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # otherwise it is taken at the commit
        cursor.execute(f"INSERT INTO testapp_attachment (paper_id, name) VALUES ({paper.pk}, '')")
    assert run(Paper.objects, "status", succeed) == paper


def test_error_of_a_claim_is_not_an_attempt():
    task = Task.objects.create()
    with pytest.raises(ZeroDivisionError):
        run(Task.objects.filter(data__in=(1 / zero for zero in [0])), "status", raising(Abort()))
    assert stored(task) == task.status


# Of a worker that is dead for sure

DEAD = WorkerDied("its process 5 was killed")


def take_back(task, leases, policy=None, why=DEAD, **options):
    row = Candidate(task.pk, task.pk, Status.waiting(7, task.status.attempts))
    source = Source.of(Paper.objects, "status", error_field="error", **options)
    return verbs.take_back(source, policy or Policy(), row, leases, why)


@pytest.mark.parametrize(("attempts", "state"), [(0, State.waiting), (2, State.waiting), (3, State.canceled)])
def test_task_of_a_dead_worker_is_charged_before_its_lease_runs_out(attempts, state):
    task = Paper.objects.create(status=Status.working(attempts=attempts))
    with heard("task_recovered") as events:
        assert take_back(task, {task.status})
    assert (stored(task).state, stored(task).attempts) == (state, attempts + 1)
    assert row(task).error == "modelqueue.exceptions.WorkerDied: its process 5 was killed"
    ((_, event),) = events
    assert (event["lease"], event["status"], event["error"]) == (task.status, stored(task), DEAD)


@pytest.mark.parametrize(
    ("cancel_on", "why", "state"),
    [
        ((TimedOut,), TimedOut("too long"), State.canceled),
        ((LookupError,), TimedOut("too long"), State.waiting),
        ((Exception,), DEAD, State.waiting),
    ],
)
def test_task_whose_action_could_not_be_ended_is_canceled_where_that_is_to_be_the_last_attempt(
    cancel_on, why, state
):
    task = Paper.objects.create(status=Status.working())
    assert take_back(task, {task.status}, Policy(cancel_on=cancel_on), why)
    assert (stored(task).state, stored(task).attempts) == (state, 1)


def test_task_that_is_not_the_dead_workers_any_more_is_left_alone():
    task = Paper.objects.create(status=Status.working())
    with heard("task_recovered") as events:
        assert not take_back(task, {Status.working(5), Status.working(6)})
    assert stored(task) == task.status
    assert events == []


def test_time_of_a_task_that_is_taken_back_is_not_before_that_of_its_lease():
    """Or its next claim might get the same one."""
    ahead = now() + 20 * MILLISECOND
    task = Paper.objects.create(status=Status.working(ahead))
    assert take_back(task, {task.status})
    assert stored(task).priority >= task.status.priority


def test_task_of_a_dead_worker_is_left_to_its_recovery_if_the_clock_was_set_back():
    task = Paper.objects.create(status=Status.working(now() + 60 * SECOND))
    assert not take_back(task, {task.status})
    assert stored(task) == task.status


def test_task_of_a_dead_worker_whose_delay_is_broken_waits_without_one(caplog):
    task = Paper.objects.create(status=Status.working())
    assert take_back(task, {task.status}, Policy(delay=lambda attempts: 1 / 0))
    assert stored(task).state == State.waiting
    assert "The delay of a recovered task can not be computed" in caplog.text


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_locked_row_of_an_error_field_in_another_table_is_not_waited_for(bystander):
    """The others of the dead process would wait with it."""
    job = NumberedJob.objects.create(status=Status.working())
    with bystander.cursor() as cursor:
        cursor.execute("SELECT number FROM testapp_numberedjob FOR UPDATE")
        cursor.fetchall()
    source, row = Source.of(NumberedJob.objects, "status", error_field="remark"), Status.waiting(7)
    with pytest.raises(RowLocked):
        verbs.take_back(source, Policy(), Candidate(job.pk, job.job_id, row), {job.status}, DEAD)
    bystander.rollback()
    assert verbs.take_back(source, Policy(), Candidate(job.pk, job.job_id, row), {job.status}, DEAD)
    assert NumberedJob.objects.get().remark.startswith("modelqueue.exceptions.WorkerDied")
