"""`manage.py modelqueue doctor`: each finding, provoked on a real database where that can be done."""

import contextlib
import dataclasses
import io
import json
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import django
import pytest
from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.db import OperationalError, ProgrammingError, connection, connections, models
from django.db.migrations.state import ProjectState
from django.test.utils import CaptureQueriesContext, isolate_apps

import modelqueue
from modelqueue import Status, findings
from modelqueue.engines import engine_for
from modelqueue.engines.examinations import (
    Examination,
    OneWriter,
    Pin,
    Pooler,
    Silence,
    Vacuum,
    examination_for,
)
from modelqueue.engines.notify import Ear
from modelqueue.findings import DEAD, LARGE, MANY, OLD, Severity
from modelqueue.management import doctor
from modelqueue.operations import AddNotifyTrigger
from modelqueue.source import Source
from tests.actions import SECOND, succeed
from tests.processes import wait_until
from tests.testapp.models import Errand, Job, Task
from tests.testapp.queues import do_errand, review

pytestmark = pytest.mark.django_db(transaction=True)

NAME = "testapp.do_errand"
#: What is wrong with Django's own options for SQLite, under which the suite runs.
OF_SQLITE = {"journal-mode", "timeout", "transaction-mode"}


def call(*arguments):
    """Call the command; return its exit code and what it wrote."""
    out, code = io.StringIO(), 0
    try:
        call_command("modelqueue", "doctor", *arguments, stdout=out, stderr=io.StringIO(), no_color=True)
    except SystemExit as stop:
        code = stop.code
    return code, out.getvalue()


def found(*arguments):
    """The findings of the command, as it prints them with --json."""
    return json.loads(call(*arguments, "--json")[1])


def finding(check, *arguments):
    """The one finding of a check."""
    (one,) = [one for one in found(*arguments) if one["check"] == check]
    return one


def checks(*arguments):
    """The names of what is found, without what is wrong with SQLite in this suite."""
    return {one["check"] for one in found(*arguments)} - OF_SQLITE


def execute(sql, using="default"):
    with connections[using].cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture(autouse=True)
def _no_dead_rows_of_other_tests(transactional_db):
    """Sessions that have ended may count theirs after the table was emptied (PostgreSQL)."""
    if connection.vendor == "postgresql":
        execute(
            "SELECT pg_stat_reset_single_table_counters(oid) FROM pg_class "
            "WHERE relkind = 'r' AND relname LIKE 'testapp_%'"
        )


@pytest.fixture
def tasks(table):
    """Make a model with a table, and a status field that is or is not in an index."""
    with isolate_apps("tests.testapp"):

        def make(indexes=(), **options):
            meta = type("Meta", (), {"app_label": "testapp", "indexes": list(indexes)})
            fields = {"title": models.CharField(max_length=20), "status": modelqueue.StatusField(**options)}
            return table(type("Patient", (models.Model,), {"__module__": __name__, "Meta": meta, **fields}))

        yield make


def with_recommended_options():
    """Return the alias of an SQLite database with those; Django has most of them from 5.1 on."""
    execute("PRAGMA journal_mode=WAL", "other")
    execute("PRAGMA synchronous=NORMAL", "other")
    return "other"


def fill(model, count=LARGE):
    model.objects.bulk_create([model(title=f"{number:05}") for number in range(count)], 2500)


# The command


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_healthy_queue_is_told_to_be_so(vendor):
    using = "default"
    if vendor == "sqlite":
        using = with_recommended_options()
    assert doctor.of_one_database(using, []) == []
    assert found(NAME) == [] or vendor == "sqlite"
    assert doctor.summary([]) == "Nothing is wrong."


@pytest.mark.vendor("postgresql", "mysql")
def test_exit_code_is_zero_where_nothing_is_wrong():
    assert call() == (0, "Nothing is wrong.\n")


def test_finding_says_where_and_what_and_what_it_costs_and_what_to_do(declare):
    declare(Errand, "status", name="a.slow", lease=60 * SECOND)(succeed)
    code, text = call("a.slow")
    assert code == 1
    assert "warning (leases): a.slow in default\n" in text
    assert "  The queues on testapp.Errand.status have different leases" in text
    assert f"\n  Cost: The longest counts for all of them: after a crash also the tasks of {NAME} " in text
    assert "\n  Cure: Give them one lease.\n\n" in text
    assert text.splitlines()[-1].endswith("warning." if connection.vendor != "sqlite" else "warnings.")


def test_json_is_a_list_of_findings(declare):
    declare(Errand, "status", name="a.slow", lease=60 * SECOND)(succeed)
    one = finding("leases")
    assert list(one) == ["queue", "database", "check", "severity", "finding", "cost", "cure"]
    # Once, of the first queue on the field.
    assert (one["queue"], one["database"], one["severity"]) == ("a.slow", "default", "warning")
    assert "(testapp.do_errand: 3 s, a.slow: 60 s)" in one["finding"]


def test_worst_comes_first_and_an_info_is_no_failure(monkeypatch):
    infos = [findings.Finding("pooler", Severity.info, "1", "2", "3")]
    monkeypatch.setattr(doctor, "examined", lambda queues: list(infos))
    assert call()[0] == 0
    assert call()[1].endswith("\n1 info.\n")
    infos += [
        findings.Finding("clock", Severity.warning, "1", "2", "3", database="default"),
        findings.Finding("clock", Severity.warning, "1", "2", "3", database="other"),
        findings.unreadable("It", "why", "its tasks", "do"),
    ]
    code, text = call()
    assert code == 1
    assert text.startswith("error (unreadable): ")
    assert "\n\nwarning (clock): database default\n  1\n  Cost: 2\n  Cure: 3\n\nwarning " in text
    assert text.endswith("\n1 error, 2 warnings, 1 info.\n")


def test_queue_whose_table_is_missing_is_a_finding_and_hides_no_other(declare):
    with isolate_apps("tests.testapp"):

        class Missing(models.Model):
            status = modelqueue.StatusField()

            class Meta:
                app_label = "testapp"

    declare(Missing, "status", name="a.missing")(succeed)
    declare(Errand, "status", name="b.slow", lease=60 * SECOND)(succeed)
    one = finding("unreadable")
    assert (one["queue"], one["database"], one["severity"]) == ("a.missing", "default", "error")
    assert "The queue a.missing can not be looked at: " in one["finding"]
    assert "testapp_missing" in one["finding"]
    assert "are all migrations applied (migrate)?" in one["cure"]
    assert finding("leases")["queue"] == "b.slow"
    assert call()[0] == 1


def test_queue_that_gives_no_queryset_is_a_finding(declare):
    rows = [Errand.objects.all()]
    declare(rows.pop, "status", name="a.broken")(succeed)
    one = finding("unreadable")
    assert (one["queue"], one["database"]) == ("a.broken", None)
    assert one["finding"] == "The queue a.broken can not be looked at: IndexError: pop from empty list"
    assert "has to give a queryset of its model" in one["cure"]
    assert "error (unreadable): a.broken in no database\n" in call()[1]


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_database_that_is_away_is_told_once_and_hides_no_other(declare, monkeypatch):
    tries = []

    def connect():
        tries.append(1)
        raise ImproperlyConfigured("no NAME")

    monkeypatch.setattr(connections["other"], "ensure_connection", connect)
    declare(Errand.objects.using("other"), "status", name="a.away", lease=60 * SECOND)(succeed)
    declare(Job.objects.using("other"), "status", name="b.away")(succeed)
    one = finding("unreadable")
    assert (one["queue"], one["database"], one["severity"]) == (None, "other", "error")
    assert one["finding"] == "The database other can not be looked at: ImproperlyConfigured: no NAME"
    assert one["cost"] == "No worker runs the tasks of a.away, b.away, and nothing else is known of them."
    assert "Is its server up" in one["cure"]
    assert len(tries) == 1  # each may take minutes
    assert finding("leases")["database"] == "default"


def test_question_that_can_not_be_answered_is_a_finding_and_hides_no_other(declare, monkeypatch):
    def fail(self, *arguments):
        raise OperationalError("not today")

    ask = type(examination_for("default"))
    monkeypatch.setattr(ask, "isolation", fail)
    monkeypatch.setattr(ask, "vacuum", fail)
    monkeypatch.setattr(ask, "hears", lambda self, source: False)
    monkeypatch.setattr(type(engine_for("default")), "clock_offset", lambda self: 5 * SECOND)
    of_database, of_queue = (one for one in found(NAME) if one["check"] == "unreadable")
    assert (of_database["queue"], of_queue["queue"], of_queue["severity"]) == (None, NAME, "warning")
    assert of_database["finding"] == (
        '"Are transactions READ COMMITTED?" can not be answered: OperationalError: not today'
    )
    assert of_queue["cost"] == 'What a finding "autovacuum" would tell is not known.'
    assert {"clock", "listen"} <= checks(NAME)


@pytest.mark.vendor("postgresql", "mysql")
def test_table_that_somebody_has_locked_is_not_waited_for(bystander, vendor, monkeypatch):
    patience, statement = {
        "postgresql": (0.1, "LOCK TABLE testapp_errand"),
        "mysql": (1, "LOCK TABLES testapp_errand WRITE"),
    }[vendor]
    monkeypatch.setattr(sys.modules[type(examination_for("default")).__module__], "PATIENCE", patience)
    with bystander.cursor() as cursor:
        cursor.execute(statement)
    ones = [one for one in found(NAME) if one["check"] == "unreadable"]
    bystander.close()
    assert (ones[0]["queue"], ones[0]["severity"]) == (NAME, "error")
    assert "Somebody holds a lock" in ones[0]["cure"]
    before = execute("SELECT @@global.lock_wait_timeout" if vendor == "mysql" else "SELECT '0'")
    assert execute("SELECT @@lock_wait_timeout" if vendor == "mysql" else "SHOW lock_timeout") == before


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_queues_are_chosen_by_name_and_by_database(declare):
    declare(Errand.objects.using("other"), "status", name="a.slow", lease=60 * SECOND)(succeed)
    assert {one["database"] for one in found("--database", "other")} == {"other"}
    assert {one["database"] for one in found(NAME)} <= {"default"}
    for arguments, text in (
        (["nobody"], "There is no queue 'nobody'"),
        (["--database", "x"], "There is no database 'x'"),
    ):
        with pytest.raises(CommandError, match=text) as error:
            call(*arguments)
        assert error.value.returncode == 2


def test_nothing_is_written_or_locked():
    with CaptureQueriesContext(connection) as queries:
        doctor.examined([do_errand, review])
    statements = [query["sql"].strip() for query in queries.captured_queries]
    firsts = {sql.split()[0] for sql in statements}
    assert firsts <= {"SELECT", "EXPLAIN", "PRAGMA", "SHOW", "SET", "BEGIN", "COMMIT"}
    assert not [sql for sql in statements if "FOR UPDATE" in sql or "ANALYZE" in sql]


def test_each_finding_is_of_a_check_that_is_listed():
    text = Path(findings.__file__).read_text()
    named = [check for check in findings.CHECKS if text.count(f'"{check}"') > 1]
    assert named == list(findings.CHECKS)


# The index


@pytest.fixture
def large(monkeypatch):
    """A table is large from few rows on."""
    monkeypatch.setattr(doctor, "LARGE", 3)


def test_large_table_without_an_index_is_a_warning(tasks, declare):
    patient = tasks(db_index=False)
    fill(patient)
    declare(patient, "status", name="a.patient")(succeed)
    one = finding("index", "a.patient")
    assert one["severity"] == "warning"
    assert "testapp.Patient.status is in no index, and its table has 10,000 rows or more." in one["finding"]
    execute(one["cure"].partition("all migrations are applied: ")[2])
    assert checks("a.patient") == set()


def test_small_table_without_an_index_is_good_to_know(tasks, declare):
    declare(tasks(db_index=False), "status", name="a.patient")(succeed)
    one = finding("index", "a.patient")
    assert one["severity"] == "info"
    assert one["finding"].endswith("its table has 0 rows.")


@pytest.mark.parametrize("indexes", [[], [modelqueue.QueueIndex("status", name="patients")]])
def test_large_table_whose_claim_uses_the_index_is_fine(tasks, declare, indexes):
    patient = tasks(indexes, db_index=not indexes)
    fill(patient)
    declare(patient, "status", name="a.patient")(succeed)
    assert checks("a.patient") == set()
    patient.objects.filter(title="00007").update(status=Status.working(modelqueue.now() + 60 * SECOND))
    assert checks("a.patient") == {"newest-lease"}


def test_index_that_begins_with_what_the_queryset_filters_is_fine(tasks, declare):
    patient = tasks([models.Index(fields=["title", "status"], name="patient_title")], db_index=False)
    fill(patient)
    declare(patient.objects.filter(title="00007"), "status", name="a.patient")(succeed)
    assert checks("a.patient") == set()


def test_index_that_a_claim_does_not_use_is_a_warning(tasks, declare, vendor):
    """The queue does not filter by what the index begins with."""
    patient = tasks([models.Index(fields=["title", "status"], name="patient_title")], db_index=False)
    fill(patient)
    declare(patient, "status", name="a.patient")(succeed)
    one = finding("plan", "a.patient")
    assert one["severity"] == "warning"
    assert "A claim does not seek testapp.Patient.status in an index (patient_title), and" in one["finding"]
    assert execute(re.search(r"count the rows: (ANALYZE .*?;)", one["cure"])[1]) is not None
    plan = one["finding"].partition("The plan: ")[2]
    assert re.match(
        {
            "sqlite": "SCAN testapp_patient, ",
            "postgresql": "Limit, Sort, Seq Scan testapp_patient$",
            "mysql": "testapp_patient index patient_title$",
        }[vendor],
        plan,
    )


def test_index_in_which_a_claim_does_not_reach_the_status_is_a_warning(tasks, declare, vendor):
    if vendor == "postgresql":
        index = models.Index(fields=["title"], include=["status"], name="patient_title")
    else:
        index = models.Index(fields=["title", "id", "status"], name="patient_title")
    patient = tasks([index], db_index=False)
    fill(patient)
    declare(patient.objects.filter(title="00007"), "status", name="a.patient")(succeed)
    assert finding("plan", "a.patient")["severity"] == "warning"


def test_small_table_whose_claim_does_not_use_an_index_is_fine(tasks, declare):
    patient = tasks([models.Index(fields=["title", "status"], name="patient_title")], db_index=False)
    fill(patient, 3)
    declare(patient, "status", name="a.patient")(succeed)
    assert checks("a.patient") == set()


def test_index_of_an_inherited_status_is_that_of_its_parent(declare, large):
    from tests.testapp.models import PrintJob

    for _ in range(3):
        PrintJob.objects.create()
    declare(PrintJob, "status", name="a.print")(succeed)
    declare(Job.objects.exclude(project__name="x"), "status", name="a.job")(succeed)
    assert "index" not in checks("a.print", "a.job")


def test_queue_of_no_rows_has_no_plan_and_is_fine(declare, large):
    Errand.objects.bulk_create([Errand() for _ in range(3)])
    declare(Errand.objects.filter(pk__in=[]), "status", name="a.none")(succeed)
    assert checks("a.none") == {"leases"}


def test_database_of_another_vendor_tells_what_any_can(declare, large):
    ask = Examination("default")
    Errand.objects.bulk_create([Errand(title=str(number)) for number in range(4)])
    source = do_errand.source()
    access = ask.access(source, modelqueue.now(), 3)
    assert (access.size, access.is_large, len(access.indexes), access.plan) == (3, True, 1, None)
    assert access.is_quick
    assert not list(findings.index("status", access))
    assert not dataclasses.replace(access, indexes=frozenset()).is_quick
    assert access.invalid == set()
    assert ask.hears(source) is None
    assert ask.refusal(source) is None
    assert [ask.vacuum(source), ask.isolation(), ask.one_writer(), ask.pins(), ask.pooler()] == [None] * 5
    assert ask.silence() is ask.versions() is None
    for judge in (
        findings.vacuum,
        findings.isolation,
        findings.one_writer,
        findings.pins,
        findings.pooler,
    ):
        assert list(judge(None)) == []


def test_newest_lease_is_not_looked_for_where_that_would_read_the_whole_table(tasks, declare, monkeypatch):
    monkeypatch.setattr(doctor, "LARGE", 3)
    patient = tasks(db_index=False)
    fill(patient, 3)
    patient.objects.update(status=Status.working(modelqueue.now() + 60 * SECOND))
    declare(patient, "status", name="a.patient")(succeed)
    assert checks("a.patient") == {"index"}


@pytest.mark.vendor("postgresql")
def test_index_of_a_table_in_a_schema_is_found(table, declare, large):
    execute("CREATE SCHEMA IF NOT EXISTS elsewhere")
    with isolate_apps("tests.testapp"):

        class Patient(models.Model):
            status = modelqueue.StatusField()

            class Meta:
                app_label = "testapp"
                db_table = 'elsewhere"."Patients'

    table(Patient).objects.bulk_create([Patient() for _ in range(2000)])
    execute('ANALYZE "elsewhere"."Patients"')
    declare(Patient, "status", name="a.patient")(succeed)
    assert checks("a.patient") == set()


@pytest.mark.vendor("postgresql")
def test_index_whose_making_has_failed_is_a_warning(tasks, declare):
    patient = tasks(db_index=False, indexes=[models.Index(fields=["status"], name="Half done")])
    fill(patient)
    declare(patient, "status", name="a.patient")(succeed)
    assert checks("a.patient") == set()
    execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = '\"Half done\"'::regclass")
    one = finding("index", "a.patient")
    assert one["severity"] == "warning"
    assert one["finding"].startswith('"Half done" on testapp.Patient.status is not valid: ')
    execute(one["cure"])
    assert checks("a.patient") == set()


# Who may write


@pytest.mark.vendor("postgresql")
def test_user_who_may_only_read_is_an_error(plain_user):
    assert "read-only" not in checks(NAME)
    execute("RESET ROLE")
    execute(f"REVOKE UPDATE ON testapp_errand FROM {plain_user}")
    execute(f"SET ROLE {plain_user}")
    one = finding("read-only", NAME)
    assert (one["queue"], one["severity"]) == (NAME, "error")
    assert one["finding"] == f'No task in "testapp_errand" can be written: the user {plain_user} may not.'
    execute("RESET ROLE")
    execute(one["cure"])
    execute(f"SET ROLE {plain_user}")
    assert "read-only" not in checks(NAME)


@pytest.mark.vendor("postgresql")
def test_server_on_which_nothing_can_be_written_is_an_error(monkeypatch):
    execute("SET default_transaction_read_only = on")
    try:
        one = finding("read-only", NAME)
    finally:
        execute("RESET default_transaction_read_only")
    assert "transactions are read-only, by a setting of the session." in one["finding"]
    ask = examination_for("default")
    monkeypatch.setattr(type(ask), "ask", lambda *arguments: [(True, True, "default", True, "u")])
    assert ask.refusal(do_errand.source()).why == "the server is a standby"


@pytest.mark.vendor("mysql")
def test_reasons_why_mysql_lets_nobody_write_are_errors(monkeypatch):
    execute("CREATE USER 'a reader'@localhost")
    execute(f"GRANT SELECT ON `{connection.settings_dict['NAME']}`.* TO 'a reader'@localhost")
    ask, source = examination_for("default"), do_errand.source()
    assert ask.refusal(source) is None
    monkeypatch.setattr(ask, "connection", connections["default"].copy())
    ask.connection.settings_dict["USER"] = "a reader"
    try:
        (one,) = findings.read_only(ask.refusal(source))
        assert (one.check, one.severity) == ("read-only", Severity.error)
        assert "can be written: UPDATE command denied to user 'a reader'@'localhost'" in one.finding
        execute(one.cure)
        assert ask.refusal(source) is None
        ask.ask("SELECT 1")
        with ask.connection.cursor() as cursor:
            cursor.execute("SET SESSION TRANSACTION READ ONLY")
        assert "SET GLOBAL TRANSACTION READ WRITE;" in ask.refusal(source).cure
        ask.connection.close()
        execute("SET GLOBAL read_only = ON")
        assert ask.refusal(source).cure.endswith("SET GLOBAL read_only = OFF;")
    finally:
        execute("SET GLOBAL read_only = OFF")
        ask.connection.close()
        execute("DROP USER 'a reader'@localhost")
    monkeypatch.undo()
    monkeypatch.setattr(source.owner._meta, "db_table", "nowhere")
    with pytest.raises(ProgrammingError):
        ask.refusal(source)


@pytest.mark.vendor("sqlite")
@pytest.mark.parametrize("is_folder", [False, True])
def test_file_that_can_not_be_written_is_an_error(is_folder, monkeypatch):
    file = Path(connection.settings_dict["NAME"])
    place = file.parent if is_folder else file
    assert "read-only" not in checks(NAME)
    monkeypatch.setattr(os, "access", lambda path, mode: path != place)  # root may write everywhere
    one = finding("read-only", NAME)
    assert one["severity"] == "error"
    assert one["finding"].endswith(f"can be written: this user may not write to {place}.")
    monkeypatch.setattr(type(connections["default"]), "is_in_memory_db", lambda self: True)
    assert examination_for("default").refusal(do_errand.source()) is None


# Leases and clocks


def test_queues_on_one_field_with_one_lease_are_fine(declare):
    declare(Errand, "status", name="a.same", lease=do_errand.lease)(succeed)
    assert "leases" not in checks()


@pytest.mark.parametrize("status", [None, Status.working(5), Status.working(modelqueue.now())])
def test_lease_of_now_or_none_is_fine(status):
    if status is not None:
        Errand.objects.create(status=status)
    assert "newest-lease" not in checks()


def test_lease_from_the_future_is_a_warning(declare):
    Errand.objects.create(status=Status.working())
    ahead = Errand.objects.create(status=Status.working(modelqueue.now() + 60 * SECOND))
    declare(Errand, "status", name="b.same", lease=do_errand.lease)(succeed)
    one = finding("newest-lease")
    assert (one["queue"], one["severity"]) == ("b.same", "warning")
    assert one["finding"].startswith(f"The lease of task {ahead.pk} is from ")
    assert " s in the future: working" in one["finding"]


@pytest.mark.parametrize(
    ("offset", "words"),
    [
        (-5 * SECOND, "The clock of this machine is 5.0 s ahead of that of the database."),
        (5 * SECOND, "The clock of this machine is 5.0 s behind that of the database."),
        (None, "The database takes too long to answer to compare its clock"),
    ],
)
def test_clock_that_differs_is_a_finding(offset, words, monkeypatch):
    monkeypatch.setattr(type(engine_for("default")), "clock_offset", lambda self: offset)
    one = finding("clock")
    assert words in one["finding"]
    assert (one["queue"], one["severity"]) == (None, "info" if offset is None else "warning")


# PostgreSQL and MySQL


@pytest.mark.vendor("postgresql", "mysql")
@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_stricter_isolation_is_a_warning(level, vendor):
    if vendor == "mysql":
        name, before = "SESSION TRANSACTION ISOLATION LEVEL", "READ COMMITTED"
        statement = f"SET {name} {level}"
    else:
        statement, before = f"SET default_transaction_isolation = '{level}'", None
    execute(statement)
    try:
        one = finding("isolation")
    finally:
        execute(f"SET {name} {before}" if before else "RESET default_transaction_isolation")
    assert (one["severity"], one["finding"]) == ("warning", f"Transactions are {level.upper()}.")
    assert ("keeps others from inserting" in one["cost"]) == (vendor == "mysql")


@pytest.mark.vendor("postgresql")
def test_stricter_isolation_of_transactions_alone_is_a_warning():
    """As OPTIONS of DATABASES say it to the driver."""
    session = connections["default"]
    session.ensure_connection()
    session.connection.isolation_level = 3
    try:
        assert finding("isolation")["finding"] == "Transactions are REPEATABLE READ."
    finally:
        session.connection.isolation_level = None


@pytest.mark.vendor("postgresql", "mysql")
def test_transaction_that_keeps_dead_rows_is_told(bystander, vendor, monkeypatch):
    assert "pinned" not in checks()
    monkeypatch.setattr(findings, "OLD", 0.0)
    with bystander.cursor() as cursor:
        if vendor == "mysql":
            cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            cursor.execute("START TRANSACTION WITH CONSISTENT SNAPSHOT")
            cursor.execute("SELECT CONNECTION_ID()")
            ((pid,),) = cursor.fetchall()
            cursor.execute("SELECT count(*) FROM testapp_errand")
        else:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            cursor.execute("SET application_name = 'the sleeper'")
            cursor.execute("SELECT pg_backend_pid() AS a_long_query")
            ((pid,),) = cursor.fetchall()

    def pinned():
        time.sleep(0.15)  # or MariaDB goes by what it has found the last time
        return [one for one in found() if f"transaction {pid} " in one["finding"]]

    (one,) = wait_until(pinned)
    assert (one["check"], one["severity"], one["queue"]) == ("pinned", "warning", None)
    assert re.search(r" keeps dead rows for \d+s\b", one["finding"])
    if vendor == "mysql":
        assert "(root@" in one["finding"]
        assert f" KILL {pid};" in one["cure"]
    else:
        assert "(the sleeper)" in one["finding"]
        assert "Its last statement: SELECT pg_backend_pid() AS a_long_query" in one["finding"]
        assert f"SELECT pg_terminate_backend({pid});" in one["cure"]


@pytest.mark.vendor("postgresql")
def test_prepared_transaction_that_keeps_dead_rows_is_told(bystander, monkeypatch):
    monkeypatch.setattr(findings, "OLD", 0.0)
    with bystander.cursor() as cursor:
        cursor.execute("INSERT INTO testapp_project (name) VALUES ('x')")
        cursor.execute("PREPARE TRANSACTION 'it''s left'")
    try:  # not those of the server's own processes, nor that of the doctor
        (one,) = [one for one in found() if "prepared transaction" in one["finding"]]
    finally:
        execute("ROLLBACK PREPARED 'it''s left'")
    assert re.match(
        r"The prepared transaction it's left \(postgres\) keeps dead rows "
        r"for \d+s and [\d,]+ transactions?\.$",
        one["finding"],
    )
    assert one["cure"] == "Have it committed, or end it: ROLLBACK PREPARED 'it''s left';"


@pytest.mark.vendor("postgresql")
def test_statement_that_several_processes_run_is_told_once(monkeypatch):
    monkeypatch.setattr(findings, "OLD", 0.0)
    other = connections["default"].copy()
    with other.cursor() as cursor:
        setting = "debug_parallel_query" if other.pg_version >= 160000 else "force_parallel_mode"
        cursor.execute(f"SET {setting} = on")
        cursor.execute("SELECT pg_backend_pid()")
        ((pid,),) = cursor.fetchall()

    def read():
        with contextlib.suppress(OperationalError), other.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(60)")

    other.inc_thread_sharing()
    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: execute("SELECT 1 FROM pg_stat_activity WHERE backend_type = 'parallel worker'"))
    ones = [one["finding"] for one in found() if "SELECT pg_sleep(60)" in one["finding"]]
    execute(f"SELECT pg_terminate_backend({pid})")
    thread.join()
    other.close()
    assert [one.split()[2] for one in ones] == [str(pid)]


@pytest.mark.vendor("mysql")
def test_long_statement_keeps_dead_rows_also_where_transactions_are_read_committed(monkeypatch):
    monkeypatch.setattr(findings, "OLD", 0.0)
    other = connections["default"].copy()
    with other.cursor() as cursor:
        cursor.execute("SELECT CONNECTION_ID()")
        ((pid,),) = cursor.fetchall()

    def read():
        with contextlib.suppress(OperationalError), other.cursor() as cursor:
            cursor.execute("SELECT SLEEP(60), count(*) FROM testapp_errand")

    other.inc_thread_sharing()
    thread = threading.Thread(target=read)
    thread.start()

    def pinned():
        time.sleep(0.15)
        return [one for one in found() if f"transaction {pid} " in one["finding"]]

    (one,) = wait_until(pinned)
    assert "Its last statement: SELECT SLEEP(60)" in one["finding"]
    execute(one["cure"].partition("or end it: ")[2])
    thread.join()
    with contextlib.suppress(OperationalError):
        other.close()


@pytest.mark.vendor("mysql")
def test_prepared_transaction_of_mysql_is_no_session_that_could_be_killed(monkeypatch):
    monkeypatch.setattr(findings, "OLD", 0.0)
    other = connections["default"].copy()
    with other.cursor() as cursor:
        cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        for step in ("START", "END", "PREPARE"):
            cursor.execute(f"XA {step} 'left'")
            if step == "START":
                cursor.execute("INSERT INTO testapp_project (name) VALUES ('x')")
    other.close()

    def pinned():
        time.sleep(0.15)
        return [one for one in found() if one["finding"].startswith("The prepared transaction ")]

    try:
        (one,) = wait_until(pinned)
    finally:
        execute("XA ROLLBACK 'left'")
    assert re.match(r"The prepared transaction \d+ keeps dead rows for \d+s\.$", one["finding"])
    assert "XA RECOVER;" in one["cure"]
    assert "KILL" not in one["cure"]


@pytest.mark.vendor("mysql")
def test_short_transactions_of_mysql_keep_nothing(bystander, monkeypatch):
    monkeypatch.setattr(findings, "OLD", 0.0)
    with bystander.cursor() as cursor:
        cursor.execute("INSERT INTO testapp_project (name) VALUES ('x')")
        cursor.execute("SELECT CONNECTION_ID()")
        ((pid,),) = cursor.fetchall()

    def is_seen():
        time.sleep(0.15)
        known = "SELECT 1 FROM information_schema.innodb_trx WHERE trx_mysql_thread_id"
        return execute(f"{known} = {pid}")

    wait_until(is_seen)
    assert not [one for one in found() if f"transaction {pid} " in one["finding"]]


@pytest.mark.vendor("mysql")
def test_user_without_the_privilege_is_not_told_of_transactions(monkeypatch):
    def ask(self, sql, params=None):
        raise OperationalError(*error)

    ask_mysql = examination_for("default")
    monkeypatch.setattr(type(ask_mysql), "ask", ask)
    error = (1227, "Access denied; you need (at least one of) the PROCESS privilege(s)")
    assert ask_mysql.pins() is None
    error = (2006, "gone away")
    with pytest.raises(OperationalError):
        ask_mysql.pins()


@pytest.mark.vendor("postgresql")
def test_session_that_sends_to_a_standby_is_not_to_be_ended(monkeypatch):
    """It would come back. Without a slot it keeps what the standby needs."""
    pq, there = pytest.importorskip("psycopg").pq, connection.settings_dict
    sender = pq.PGconn.connect(
        f"host={there['HOST']} user={there['USER']} dbname={there['NAME']} replication=database".encode()
    )
    for statement in ("BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT pg_backend_pid()"):
        answer = sender.exec_(statement.encode())
    monkeypatch.setattr(findings, "MANY", 0)  # nobody knows since when
    ones = [one for one in found() if f" {answer.get_value(0, 0).decode()} " in one["finding"]]
    sender.finish()
    assert [one["finding"].partition(" keeps ")[0] for one in ones] == [
        f"The standby {answer.get_value(0, 0).decode()}"
    ]
    assert "hot_standby_feedback = off" in ones[0]["cure"]
    assert "terminate" not in ones[0]["cure"]


@pytest.fixture
def plain_user():
    """Be a user of PostgreSQL who may read and write the tables, and nothing else."""
    role = f"plain_{os.getpid()}"  # the server has others, of tests that run beside this one
    execute(f"CREATE ROLE {role}")
    execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    execute(f"SET ROLE {role}")
    yield role
    execute("RESET ROLE")
    execute(f"DROP OWNED BY {role}")
    execute(f"DROP ROLE {role}")


@pytest.mark.vendor("postgresql")
def test_plain_user_is_told_of_a_transaction_only_how_old_it_is(plain_user, bystander, monkeypatch):
    with bystander.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        cursor.execute("SELECT pg_backend_pid()")
        ((pid,),) = cursor.fetchall()
    assert checks() == set()
    monkeypatch.setattr(findings, "MANY", 0)
    (one,) = [one for one in found() if f"transaction {pid}" in one["finding"]]
    assert " keeps dead rows for " in one["finding"]
    assert re.search(r"\d transactions?\.$", one["finding"])
    assert "statement" not in one["finding"]


@pytest.mark.parametrize(
    ("seconds", "transactions", "is_old"),
    [
        (OLD, None, True),
        (OLD - 1, MANY, False),
        (None, MANY, True),
        (None, MANY - 1, False),
        (None, None, False),
    ],
)
def test_age_of_what_keeps_dead_rows_is_in_seconds_or_else_in_transactions(seconds, transactions, is_old):
    pin = Pin("replication slot", "standby", "", seconds, transactions, None, "SELECT 1")
    assert bool(list(findings.pins([pin]))) == is_old


def test_slot_is_told_with_its_age_and_a_long_statement_is_shortened():
    (one,) = findings.pins(
        [Pin("replication slot", "standby", "in use", None, 2_000_000, "SELECT\n1" + " + 1" * 50, "DROP it")]
    )
    assert one.finding.startswith(
        "The replication slot standby (in use) keeps dead rows for 2,000,000 transactions. Its last "
        "statement: SELECT 1 + 1"
    )
    statement = one.finding.partition("statement: ")[2]
    assert (len(statement), statement[-3:]) == (100, "...")
    assert one.cure == "DROP it"


@pytest.mark.vendor("postgresql")
@pytest.mark.parametrize("version", [160000, 170000])
def test_slots_and_prepared_transactions_are_asked_for_in_each_version(version, monkeypatch):
    if connection.pg_version < version:
        pytest.skip("PostgreSQL is older")
    monkeypatch.setattr(connection, "pg_version", version, raising=False)
    assert isinstance(examination_for("default").pins(), list)


# Vacuum


@pytest.mark.vendor("postgresql")
def test_dead_rows_that_nothing_removes_are_warnings(tasks, declare):
    patient = tasks()
    execute("ALTER TABLE testapp_patient SET (autovacuum_enabled = off)")
    fill(patient)
    patient.objects.update(status=Status.finished())
    declare(patient, "status", name="a.patient")(succeed)
    declare(patient, "status", name="b.patient")(succeed)

    def dead():
        return [one for one in found("a.patient", "b.patient") if one["check"] == "dead-rows"]

    (one,) = wait_until(dead)  # once for the table; the statistics come a little later
    assert (one["queue"], one["finding"]) == ("a.patient", '"testapp_patient" has 10,000 dead rows.')
    assert 'VACUUM "testapp_patient"' in one["cure"]
    one = finding("autovacuum", "a.patient")
    assert one["finding"] == 'Autovacuum does not come to "testapp_patient": autovacuum_enabled is off.'
    execute(one["cure"])
    assert "autovacuum" not in checks("a.patient")
    execute("SET track_counts = off")
    one = finding("autovacuum", "a.patient")
    execute("RESET track_counts")
    assert one["finding"].endswith(": track_counts is off.")
    assert one["cure"] == "ALTER SYSTEM SET track_counts = on; SELECT pg_reload_conf();"


@pytest.mark.vendor("postgresql")
@pytest.mark.parametrize(
    ("settings", "comes_at"),
    [
        ("autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000", None),
        ("autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10001", "10,001"),
        ("autovacuum_vacuum_scale_factor = 50, autovacuum_vacuum_threshold = 1", "15,001"),
    ],
)
def test_autovacuum_that_comes_late_is_a_warning(settings, comes_at, tasks, declare):
    patient = tasks()
    fill(patient, 300)
    execute("SELECT pg_stat_force_next_flush()")  # or, some time after ANALYZE, they are counted once more
    execute(f"ALTER TABLE testapp_patient SET ({settings})")
    execute("ANALYZE testapp_patient")
    declare(patient, "status", name="a.patient")(succeed)
    if comes_at is None:
        assert checks("a.patient") == set()
        return
    one = finding("autovacuum", "a.patient")
    assert (one["severity"], one["finding"]) == (
        "warning",
        f'Autovacuum comes to "testapp_patient" only after {comes_at} dead rows.',
    )
    assert "autovacuum_vacuum_threshold = 5000" in one["cure"]
    execute(one["cure"])
    assert checks("a.patient") == set()


@pytest.mark.vendor("postgresql")
def test_most_dead_rows_of_postgresql_18_count(tasks, declare):
    patient = tasks()
    if connection.pg_version < 180000:
        pytest.skip("came with PostgreSQL 18")
    execute("ALTER TABLE testapp_patient SET (autovacuum_vacuum_threshold = 1000000)")
    execute("ALTER TABLE testapp_patient SET (autovacuum_vacuum_max_threshold = 4000)")
    declare(patient, "status", name="a.patient")(succeed)
    assert checks("a.patient") == set()


def test_dead_rows_cost_in_milliseconds():
    few, many = (list(findings.vacuum(Vacuum("t", None, 50, dead))) for dead in (DEAD - 1, 200_000))
    assert few == []
    assert "up to 9.0 ms each time" in many[0].cost


# Workers


@pytest.mark.vendor("postgresql")
def test_workers_of_two_versions_are_a_warning(bystander, plain_user):
    bystander.set_autocommit(True)
    with bystander.cursor() as cursor:
        cursor.execute("SET application_name = 'modelqueue worker 3.1.0'")
    execute("SET application_name = ''")  # some test has made a worker of this process, perhaps
    assert "versions" not in checks()
    execute("SET application_name = 'modelqueue worker 3.0.0'")
    one = finding("versions")
    execute("RESET application_name")
    assert one["severity"] == "warning"
    assert one["finding"] == "The workers that are connected are of modelqueue 3.0.0 and 3.1.0."
    assert execute(one["cure"].partition("older ones: ")[2])


# SQLite


@pytest.mark.vendor("sqlite")
def test_options_of_sqlite_that_hold_workers_up_are_warnings():
    execute("PRAGMA journal_mode=DELETE")
    journal, timeout = finding("journal-mode"), finding("timeout")
    assert journal["finding"] == "The journal_mode is delete."
    assert timeout["finding"] == "The timeout is 5 s."
    for one in (journal, timeout):
        assert (one["queue"], one["database"], one["severity"]) == (None, "default", "warning")


@pytest.mark.vendor("sqlite")
@pytest.mark.skipif(django.VERSION < (5, 1), reason="since Django 5.1")
@pytest.mark.parametrize(("mode", "is_fine"), [(None, False), ("DEFERRED", False), ("IMMEDIATE", True)])
def test_transactions_of_sqlite_that_begin_without_their_turn_are_a_warning(mode, is_fine, monkeypatch):
    execute("SELECT 1")  # Django sets it when it connects
    monkeypatch.setattr(connections["default"], "transaction_mode", mode)
    ones = [one["finding"] for one in found() if one["check"] == "transaction-mode"]
    assert ones == ([] if is_fine else ["The transaction_mode is DEFERRED."])


@pytest.mark.vendor("sqlite")
@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize(
    ("synchronous", "severity"), [("OFF", "warning"), ("NORMAL", None), ("FULL", "info"), ("EXTRA", "info")]
)
def test_commits_of_sqlite_that_wait_for_the_disk_too_often_or_never(synchronous, severity):
    execute(f"PRAGMA synchronous={synchronous}", with_recommended_options())
    try:
        ones = doctor.of_one_database("other", [])
    finally:
        execute("PRAGMA synchronous=NORMAL", "other")
    assert [(one.check, one.severity.name) for one in ones] == (
        [("synchronous", severity)] if severity else []
    )
    assert all(f"synchronous is {synchronous}." == one.finding for one in ones)


def test_django_that_can_not_be_told_how_transactions_begin_is_not_blamed():
    assert list(findings.one_writer(OneWriter("wal", 1, 20.0, None))) == []


@pytest.mark.vendor("sqlite")
def test_database_in_memory_has_no_others(monkeypatch):
    monkeypatch.setattr(type(connections["default"]), "is_in_memory_db", lambda self: True)
    assert examination_for("default").one_writer() is None


# Triggers that tell of new tasks


@pytest.mark.vendor("postgresql")
def test_trigger_that_is_heard_is_nothing_wrong_and_one_that_is_not_costs_more_than_it_gives(monkeypatch):
    ask, source = examination_for("default"), Source.of(Task.objects, "status")
    monkeypatch.setattr(Ear, "__init__", None)  # no session more, where there is no trigger
    assert ask.hears(source) is None
    monkeypatch.undo()
    operation, state = AddNotifyTrigger("Task", "status"), ProjectState.from_apps(apps)
    with connection.schema_editor() as editor:
        operation.database_forwards("testapp", editor, state, state)
    try:
        assert ask.hears(source) is True
        monkeypatch.setattr(Ear, "hears", lambda self, seconds: False)
        assert ask.hears(source) is False
    finally:
        with connection.schema_editor() as editor:
            operation.database_backwards("testapp", editor, state, state)
    assert list(findings.listen("tasks", None)) == list(findings.listen("tasks", True)) == []
    (one,) = findings.listen("tasks", False)
    assert (one.check, one.severity) == ("listen", Severity.warning)
    assert one.finding.startswith("A trigger on tasks tells of new tasks, and nobody hears it.")


# A server that falls silent

_LAST_TWO = "tcp_user_timeout", "keepalives_idle"


@pytest.mark.vendor("postgresql")
@pytest.mark.parametrize(
    ("host", "known", "missing"),
    [
        ("/run/postgresql", {}, None),
        ("localhost", {}, None),
        ("db.example", {"connect_timeout": "5"}, _LAST_TWO),
        ("db.example", {"connect_timeout": "5", "tcp_user_timeout": "0"}, _LAST_TWO),
        ("db.example", {"connect_timeout": "5", "tcp_user_timeout": "9000", "keepalives_idle": "5"}, ()),
    ],
)
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_server_over_the_network_has_to_be_given_up_when_it_is_silent(driver, host, known, missing):
    told = {"dsn_parameters": known} if driver == "psycopg2" else {"get_parameters": lambda: known}
    ask = examination_for("default")
    ask.connection = SimpleNamespace(connection=SimpleNamespace(info=SimpleNamespace(host=host, **told)))
    facts = ask.silence()
    assert facts == (None if missing is None else Silence(host, missing))
    found = list(findings.silence(facts))
    assert [one.check for one in found] == (["silence"] if missing else [])
    assert not found or found[0].finding.endswith("to db.example has no tcp_user_timeout, keepalives_idle.")


@pytest.mark.vendor("postgresql")
def test_limits_of_the_environment_count_as_those_of_the_options(monkeypatch):
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "5")
    ask = examination_for("default")
    ask.connection = connections["default"].copy()
    ask.ask("SELECT 1")
    session = ask.connection.connection.info
    monkeypatch.setattr(type(session), "host", "db.example")
    try:
        assert ask.silence() == Silence("db.example", _LAST_TWO)
    finally:
        ask.connection.close()


# Poolers


@pytest.mark.vendor("postgresql", "mysql")
def test_direct_connection_has_no_pooler():
    assert examination_for("default").pooler() is None


@pytest.mark.vendor("postgresql")
def test_pooler_is_known_by_another_pid_than_the_server_has(tmp_path):
    with relay(f"{connection.settings_dict['HOST']}/.s.PGSQL.5432", tmp_path / ".s.PGSQL.5432"):
        behind = connections["default"].copy()
        behind.settings_dict = {**behind.settings_dict, "HOST": str(tmp_path)}
        ask = examination_for("default")
        ask.connection = behind
        try:
            facts = ask.pooler()
        finally:
            behind.close()
    assert facts.told == 7
    (one,) = findings.pooler(facts)
    assert (one.check, one.severity) == ("pooler", Severity.info)
    assert f"this session is 7 to its user, and the database calls it {facts.found[0]}." in one.finding


@contextlib.contextmanager
def relay(server, path):
    """Stand between one client and a server, as a pooler: the number of the session is one of its own."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve():
            client, upstream = listener.accept()[0], socket.socket(socket.AF_UNIX)
            upstream.connect(server)
            back = threading.Thread(target=pump, args=[upstream, client, True])
            back.start()
            pump(client, upstream)
            back.join()
            client.close()
            upstream.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def pump(source, target, renumber=False):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            key = data.find(b"K\0\0\0\x0c")  # BackendKeyData: the pid and a secret
            if renumber and key >= 0:
                data = data[: key + 5] + (7).to_bytes(4, "big") + data[key + 9 :]
                renumber = False
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def test_session_that_changes_between_transactions_is_told():
    (one,) = findings.pooler(Pooler(7, (12, 11, 12)))
    assert "it changes between transactions (11, 12)." in one.finding


@pytest.mark.vendor("mysql")
def test_pooler_of_mysql_is_known_by_another_number(monkeypatch):
    ask = examination_for("default")
    ask.ask("SELECT 1")
    monkeypatch.setattr(type(ask), "ask", lambda self, sql: [(2**32 + 5,)])
    told = connection.connection.thread_id()
    assert ask.pooler() == Pooler(told, (5, 5, 5))
