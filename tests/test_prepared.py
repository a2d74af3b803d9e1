"""Prepared statements of PostgreSQL: which, how long, and in a session that does not have them any more."""

from decimal import Decimal
from types import SimpleNamespace

import pytest
from django.db import IntegrityError, OperationalError, connection, transaction
from django.db.models import DecimalField, F, Value
from django.db.models.lookups import GreaterThan
from django.test.utils import CaptureQueriesContext

from modelqueue import State, Status, now, run, verbs
from modelqueue.engines import engine_for, prepared
from tests.actions import stored, succeed
from tests.testapp.models import Job, Task

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.vendor("postgresql")]


@pytest.fixture(autouse=True)
def _new_session(settings):
    settings.MODELQUEUE = {"ENGINE": "auto"}  # the portable one prepares nothing
    connection.close()
    yield
    connection.close()


def run_and_see(count, rows=None):
    """Run tasks; return the first words of the statements of each."""
    seen = []
    for _ in range(count):
        task = Task.objects.create()
        with CaptureQueriesContext(connection) as queries:
            assert run(Task.objects.all() if rows is None else rows, "status", succeed) == task
        assert stored(task).state == State.finished
        words = [query["sql"].split()[0] for query in queries.captured_queries]
        seen.append([word for word in words if word != "SELECT"])  # a recovery, perhaps
    return seen


USED_AGAIN = [["WITH", "UPDATE"], ["PREPARE", "EXECUTE", "PREPARE", "EXECUTE"]]


def test_statement_that_a_session_uses_again_is_prepared():
    assert run_and_see(4) == [*USED_AGAIN, ["EXECUTE", "EXECUTE"], ["EXECUTE", "EXECUTE"]]


def test_statements_of_a_queue_are_prepared_with_the_values_of_its_queryset(declare):
    """As parameters these would be of other types: a tenth of an integer would be none."""
    tenth = F("pk") * Value(Decimal("0.1"), output_field=DecimalField())
    rows = Task.objects.filter(GreaterThan(tenth, 0), data="50% of 'x' %s", pk__gt=0)
    source = declare(rows, "status", name="tasks")(succeed).source()
    tasks = [Task.objects.create(data="50% of 'x' %s") for _ in range(8)]
    Task.objects.create(data="50% of 'x' %s", status=Status.created())
    Task.objects.create(data="other")
    engine, seen = engine_for("default"), []
    for task in tasks:
        with CaptureQueriesContext(connection) as queries:
            asked = [source.any_due(now()), source.any_expired(now())]
            assert engine.probe(asked, is_usual=True) == [task.status, None]
            (claim,) = verbs.claim(source, 1)
            assert claim.task == task
            Task.objects.filter(pk=task.pk).update(status=Status.finished())
        seen.append([query["sql"].split()[0] for query in queries.captured_queries])
    assert seen[0] == ["SELECT", "WITH", "UPDATE"]
    assert seen[-1] == ["EXECUTE", "EXECUTE", "UPDATE"]


def test_session_that_knows_very_many_statements_sends_the_others_as_they_are(monkeypatch):
    """Some may have ever new texts, which would fill its memory, and that of the server."""
    monkeypatch.setattr(prepared, "_MOST", 1)
    known = [["EXECUTE", "UPDATE"]] * 2
    assert run_and_see(4) == [["WITH", "UPDATE"], ["PREPARE", "EXECUTE", "UPDATE"], *known]


def test_new_session_begins_anew():
    run_and_see(7)
    connection.close()
    assert run_and_see(2) == USED_AGAIN


def deallocate_all():
    with connection.cursor() as cursor:
        cursor.execute("DEALLOCATE ALL")


def test_session_that_has_changed_behind_a_pooler_prepares_again():
    run_and_see(7)
    deallocate_all()
    assert run_and_see(2) == [["EXECUTE", "WITH", "EXECUTE", "UPDATE"], USED_AGAIN[-1]]


def test_what_another_client_of_the_pooler_has_prepared_is_the_same():
    run_and_see(7)
    # To this connection the session is a new one.
    vars(connection._connections[connection._alias]).pop("_modelqueue_prepared")
    assert run_and_see(3) == [*USED_AGAIN, ["EXECUTE", "EXECUTE"]]


def test_setting_forbids_it(settings):
    settings.MODELQUEUE = {"PREPARED_STATEMENTS": False}
    assert run_and_see(8) == [["WITH", "UPDATE"]] * 8


def test_name_says_what_a_statement_does():
    assert prepared._name("SELECT 1") == prepared._name("SELECT 1") != prepared._name("SELECT 2")


def test_column_whose_type_has_changed():
    run_and_see(7)
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE testapp_task ALTER COLUMN data TYPE varchar(1000)")
    try:
        [[*first], second] = run_and_see(2)
        assert first == ["EXECUTE", "DEALLOCATE", "WITH", "EXECUTE"]
        assert second == ["PREPARE", "EXECUTE", "EXECUTE"]
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE testapp_task ALTER COLUMN data TYPE text")


def test_plan_is_made_anew_after_a_while(monkeypatch):
    def after(seconds):
        time[0] += seconds
        return run_and_see(1)

    time, again = [0.0], ["DEALLOCATE", "PREPARE", "EXECUTE"]
    monkeypatch.setattr(prepared, "time", SimpleNamespace(monotonic=lambda: time[0]))
    run_and_see(2)
    assert after(10.1) == [again * 2]
    assert after(19.9) == [["EXECUTE", "EXECUTE"]]
    deallocate_all()
    assert after(0.2) == [again * 2]  # a session that does not have it is none the worse
    for _ in range(10):
        after(1000.0)
    assert after(590.0) == [["EXECUTE", "EXECUTE"]]
    assert after(20.0) == [again * 2]


def reads_of_the_whole_table():
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_stat_force_next_flush()")
        cursor.execute("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'testapp_task'")
        return cursor.fetchone()[0]


def test_claims_find_their_index_in_a_table_that_was_empty_when_they_were_planned(monkeypatch):
    monkeypatch.setattr(prepared, "_FIRST", 3600.0)  # however long the rows take
    run_and_see(3)
    Task.objects.all().delete()
    Task.objects.bulk_create([Task(status=Status.finished(number, 1)) for number in range(20_000)], 5000)
    before = reads_of_the_whole_table()
    assert run_and_see(2) == [["EXECUTE", "EXECUTE"]] * 2
    assert reads_of_the_whole_table() == before
    Task.objects.filter(data="").count()
    assert reads_of_the_whole_table() == before + 1


def test_filter_of_the_caller_is_not_prepared():
    seen = run_and_see(8, Task.objects.filter(data=""))
    assert {words[0] for words in seen} == {"WITH"}


def test_nothing_is_prepared_within_a_transaction_that_an_error_would_end():
    run_and_see(7)
    deallocate_all()
    with transaction.atomic():
        task = Task.objects.create()
        with CaptureQueriesContext(connection) as queries:
            run(Task.objects, "status", succeed)
    assert stored(task).state == State.finished
    assert not [query for query in queries if query["sql"].startswith(("PREPARE", "EXECUTE"))]


def test_other_errors_are_raised():
    for _ in range(7):
        Job.objects.create()
        run(Job.objects, "status", succeed)
    Job.objects.all().delete()
    with connection.cursor() as cursor:
        cursor.execute(
            "ALTER TABLE testapp_job ADD CONSTRAINT none_ends CHECK (status < 4000000000000000000) NOT VALID"
        )
    try:
        job = Job.objects.create(status=Status.waiting(0))
        with pytest.raises(IntegrityError):
            run(Job.objects, "status", succeed)
        assert stored(job).state == State.waiting
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE testapp_job DROP CONSTRAINT none_ends")


class Refusing:
    """A cursor whose every statement ends with an error that is not expected."""

    def execute(self, sql):
        raise OperationalError(sql)


@pytest.mark.parametrize(
    "call",
    [
        lambda: prepared._prepare(Refusing(), "name", "SELECT 1", []),
        lambda: prepared._forget(Refusing(), "name"),
    ],
    ids=["prepare", "forget"],
)
def test_other_errors_of_preparing_are_raised(call):
    with pytest.raises(OperationalError):
        call()
