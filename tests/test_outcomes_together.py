"""Outcomes of many tasks in one statement: each under its own lease, and none holds up another."""

import pytest
from django.db import OperationalError, connection, transaction
from django.test.utils import CaptureQueriesContext

from modelqueue import Status, verbs
from modelqueue.engines import Change, Engine, engine_for
from modelqueue.source import Source
from tests.actions import stored
from tests.faults.harm import end_session
from tests.testapp.models import Job, PlainJob, PrintJob, Task, TextTask, UuidTask

pytestmark = pytest.mark.django_db(transaction=True)


def claimed(model, count):
    """That many claimed tasks; their source, and for each what is to be written."""
    for number in range(count):
        own = {"name": f"{number}é"} if model is TextTask else {}
        model.objects.create(status=Status.waiting(0, number % 10), **own)
    source = Source.of(model.objects, "status")
    claims = verbs.claim(source, count)
    assert len(claims) == count
    changes = [
        Change(claim.row.key, frozenset({claim.lease}), Status.finished(number, 1))
        for number, claim in enumerate(claims)
    ]
    return source, claims, changes


@pytest.fixture(params=["own", "portable"])
def set_statuses(request):
    engine = engine_for("default") if request.param == "own" else Engine("default")
    return engine.set_statuses


@pytest.mark.parametrize("model", [Task, Job, PrintJob, PlainJob, UuidTask, TextTask])
def test_each_gets_a_status_of_its_own(model, set_statuses):
    source, claims, changes = claimed(model, 5)
    assert set_statuses(source, changes) == {claim.row.key for claim in claims}
    assert [stored(claim.task) for claim in claims] == [Status.finished(number, 1) for number in range(5)]


@pytest.mark.vendor("postgresql")
def test_each_change_is_met_by_its_own_row_alone(unprepared):
    """And not by all the others: of four hundred that took longer than all else of their tasks.

    Nor by all that have its status: when the table was looked at last each had one of its own.
    """
    Task.objects.bulk_create([Task(status=Status.waiting(1000 + number)) for number in range(3000)])
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE testapp_task")  # in a table that seems to be empty any plan will do
    source, _, changes = claimed(Task, 200)
    with CaptureQueriesContext(connection) as queries, transaction.atomic():
        engine_for("default").set_statuses(source, changes)
        transaction.set_rollback(True)
    (sql,) = [query["sql"] for query in queries if "modelqueue_given" in query["sql"]]
    with connection.cursor() as cursor, transaction.atomic():
        cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}")
        ((explained,),) = cursor.fetchall()
        transaction.set_rollback(True)
    steps = list(steps_of(explained[0]["Plan"]))
    removed = [step.get(f"Rows Removed by {kind}", 0) for step in steps for kind in ("Filter", "Join Filter")]
    assert sum(removed) == 0
    read = [step for step in steps if "Scan" in step["Node Type"]]
    assert len(read) > 5
    assert {step["Actual Rows"] * step["Actual Loops"] for step in read} == {200}


def steps_of(plan):
    yield plan
    for part in plan.get("Plans", []):
        yield from steps_of(part)


def test_what_is_not_under_its_lease_is_left_as_it_is(set_statuses):
    source, claims, changes = claimed(Task, 4)
    Task.objects.filter(pk=claims[1].row.key).update(status=Status.canceled(7))
    Task.objects.filter(pk=claims[2].row.key).delete()
    assert set_statuses(source, changes) == {claims[0].row.key, claims[3].row.key}
    assert [stored(claim.task) for claim in claims] == [
        changes[0].new,
        Status.canceled(7),
        None,
        changes[3].new,
    ]
    assert set_statuses(source, changes) == set()  # as after an answer that was lost


def test_lease_may_be_one_of_several(set_statuses):
    source, claims, changes = claimed(Task, 2)
    changes = [one._replace(old=one.old | {Status.working(7)}) for one in changes]
    Task.objects.filter(pk=claims[1].row.key).update(status=Status.working(7))
    assert len(set_statuses(source, changes)) == 2
    assert [stored(claim.task) for claim in claims] == [one.new for one in changes]


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_locked_row_costs_the_others_nothing(bystander, set_statuses):
    source, claims, changes = claimed(Task, 3)
    with bystander.cursor() as cursor:
        cursor.execute("SELECT id FROM testapp_task WHERE id = %s FOR UPDATE", [claims[1].row.key])
        cursor.fetchall()
    assert set_statuses(source, changes) == {claims[0].row.key, claims[2].row.key}
    bystander.rollback()
    assert set_statuses(source, changes) == {claims[1].row.key}


def test_more_than_one_statement_takes(set_statuses):
    source, claims, changes = claimed(Task, 1)
    others = [Change(-number, changes[0].old, changes[0].new) for number in range(1, 1000)]
    assert set_statuses(source, [*others, *changes]) == {claims[0].row.key}


@pytest.mark.vendor("postgresql", "mysql")
def test_it_is_repeated_on_a_new_connection(set_statuses):
    source, claims, changes = claimed(Task, 2)
    end_session(connection)
    assert set_statuses(source, changes) == {claim.row.key for claim in claims}


def test_field_that_puts_sql_around_its_values_is_left_to_single_rows(monkeypatch, set_statuses):
    source, _, changes = claimed(Task, 2)
    monkeypatch.setattr("modelqueue.engines.base._puts_sql_around_values", lambda field: True)
    assert set_statuses(source, changes) == set()


def test_error_changes_nothing(monkeypatch, set_statuses):
    source, claims, changes = claimed(Task, 2)

    def fail(*arguments):
        raise OperationalError("full")

    for kind in {Engine, type(engine_for("default"))}:
        monkeypatch.setattr(kind, "_set_statuses_together", fail)
    with pytest.raises(OperationalError):
        set_statuses(source, changes)
    assert [stored(claim.task) for claim in claims] == [claim.lease for claim in claims]
