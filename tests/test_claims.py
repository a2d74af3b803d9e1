"""Claims of unusual models and querysets: the fast ways take the same rows as the portable one."""

import contextlib
import random
from dataclasses import replace
from threading import Thread

import pytest
from django.db import DatabaseError, connection, models, transaction
from django.db.models import Exists, F, OuterRef
from django.test.utils import isolate_apps

import modelqueue
from modelqueue import State, Status, run, source, verbs
from modelqueue.engines.postgresql import PostgreSQLEngine, _in_order
from modelqueue.engines.statements import columns_of
from modelqueue.source import Source
from tests.actions import stored, succeed, unexpected
from tests.faults.points import fault
from tests.processes import wait_until
from tests.testapp.models import Attachment, Job, Paper, PrintJob, Project, Task

pytestmark = pytest.mark.django_db(transaction=True)


def claim(rows, limit=1):
    return verbs.claim(Source.of(rows, "status"), limit)


@pytest.fixture
def schema():
    with connection.cursor() as cursor:
        cursor.execute("CREATE SCHEMA IF NOT EXISTS elsewhere")  # another test may have left it
    yield
    with connection.cursor() as cursor:
        cursor.execute("DROP SCHEMA elsewhere CASCADE")


# Querysets


BY_STATUS = {
    "joined": (Job, Job.objects.select_related("project").filter(status__state="waiting")),
    "inherited": (PrintJob, PrintJob.objects.filter(status__lt=Status.minimum("working"))),
    "deferred": (Job, Job.objects.only("title").filter(status__state="waiting")),
}


@pytest.mark.parametrize("name", BY_STATUS)
def test_filter_on_the_status_itself_holds_until_the_lease_is_set(name):
    """Rows are loaded through the queryset while they are waiting: later it would not find them."""
    model, rows = BY_STATUS[name]
    for _ in range(3):
        model.objects.create()
    assert len(claim(rows, 2)) == 2
    assert run(rows, "status", succeed).status.state == State.finished


@pytest.mark.parametrize("engine", ["auto", "portable"])
def test_tasks_of_one_moment_are_claimed_in_the_order_of_their_keys(engine, settings):
    settings.MODELQUEUE = {"ENGINE": engine}
    keys = random.sample(range(1, 1000), 60)
    Task.objects.bulk_create([Task(pk=key, status=Status.waiting(0)) for key in keys])
    with without_nested_loops():
        assert [one.row.key for one in claim(Task.objects, 50)] == sorted(keys)[:50]


@contextlib.contextmanager
def without_nested_loops():
    """Let PostgreSQL update rows as they lie in a large table, not one by one as they are claimed."""
    if connection.vendor != "postgresql":
        yield
        return
    with connection.cursor() as cursor:
        cursor.execute("SET enable_nestloop = off")
        yield
        cursor.execute("RESET enable_nestloop")


def test_filter_for_groups_of_which_no_other_task_is_working():
    first, second = Project.objects.create(), Project.objects.create()
    for project in (first, first, second):
        Job.objects.create(project=project)
    busy = Job.objects.filter(project=OuterRef("project"), status__state="working")
    rows = Job.objects.select_related("project").filter(~Exists(busy))
    claims = [claim(rows), claim(rows), claim(rows)]
    assert [[one.task.project for one in each] for each in claims] == [[first], [second], []]


def test_task_that_its_queryset_does_not_load_is_passed_over(monkeypatch):
    """Whatever has changed between the pick and the load, a claim ends, and the next task is taken."""
    hidden, shown = Job.objects.create(), Job.objects.create()
    rows = Job.objects.select_related("project")
    load = type(rows).__iter__

    def without_hidden(self):
        return iter([job for job in load(self) if not (isinstance(job, Job) and job.pk == hidden.pk)])

    monkeypatch.setattr(type(rows), "__iter__", without_hidden)
    assert [one.task.pk for one in claim(rows)] == [shown.pk]
    monkeypatch.undo()
    assert stored(hidden) == hidden.status


def test_one_queryset_of_a_model_does_not_change_the_claims_of_another():
    """What is kept for the next claim of a model is that of all its rows, and of no join."""
    papers = [Paper.objects.create(), Paper.objects.create()]
    Attachment.objects.bulk_create([Attachment(paper=papers[0]) for _ in range(3)])
    claim(Paper.objects.annotate(name=F("attachments__name")))
    Paper.objects.update(status=Status.waiting(0))
    assert len(claim(Paper.objects, 2)) == 2

    Paper.objects.update(status=Status.waiting(0))
    assert claim(Paper.objects.extra(tables=["testapp_ledger"])) == []
    assert len(claim(Paper.objects, 2)) == 2


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_claim_of_few_locks_no_more_than_those():
    """MariaDB locks all that it sorts. Other workers would find nothing due meanwhile."""
    Job.objects.bulk_create([Job() for _ in range(500)])
    small = Project.objects.create()
    Job.objects.bulk_create([Job(project=small) for _ in range(5)])
    other = connection.copy()
    free = []

    def count_free(connection):
        with other.cursor() as cursor:
            cursor.execute("SELECT id FROM testapp_job FOR UPDATE SKIP LOCKED")
            free.append(len(cursor.fetchall()))

    rows = Job.objects.select_related("project")
    try:
        with fault("claim", "before the commit", count_free):
            assert len(claim(rows.filter(project=small))) == 1
        with fault("claim", "before the commit", count_free):
            assert len(claim(rows, 3)) == 3
    finally:
        other.close()
    assert free == [504, 502]


# Models


class HashedKey(models.Field):
    """A key that is another one in Python than in the database."""

    def db_type(self, connection):
        return "varchar(20)"

    def from_db_value(self, value, expression, connection):
        return f"key-{value}"

    def to_python(self, value):
        return value

    def get_prep_value(self, value):
        if value is not None and not value.startswith("key-"):
            raise TypeError(f"{value!r} is no key")
        return value and value.removeprefix("key-")


class Picky(models.TextField):
    def from_db_value(self, value, expression, connection):
        if value == "rotten":
            raise ValueError("rotten")
        return value


@isolate_apps("tests.testapp")
def test_key_that_is_another_in_python_also_where_the_row_can_not_be_loaded(table):
    class HashedTask(models.Model):
        id = HashedKey(primary_key=True)
        data = Picky()
        status = modelqueue.StatusField()

        class Meta:
            app_label = "testapp"

    table(HashedTask)
    HashedTask.objects.create(pk="key-a", data="good")
    HashedTask.objects.create(pk="key-b", data="rotten")
    tasks = HashedTask.objects.all()
    assert run(tasks, "status", succeed).pk == "key-a"
    with pytest.raises(ValueError, match="rotten"):
        run(tasks, "status", unexpected, retry=0)
    assert set(tasks.values_list("pk", "status__attempts")) == {("key-a", 1), ("key-b", 1)}
    assert not tasks.filter(status__state="working").exists()


@isolate_apps("tests.testapp")
def test_keys_without_an_order_are_claimed_together(table):
    class Key(str):
        def __lt__(self, other):
            raise TypeError("no order")

    class KeyField(models.CharField):
        def from_db_value(self, value, expression, connection):
            return Key(value)

    class OrderlessTask(models.Model):
        id = KeyField(primary_key=True, max_length=20)
        status = modelqueue.StatusField()

        class Meta:
            app_label = "testapp"

    table(OrderlessTask)
    for key in "abcd":
        OrderlessTask.objects.create(pk=key, status=Status.waiting(0))
    assert len(claim(OrderlessTask.objects, 3)) == 3
    assert Status.tally(OrderlessTask.objects, "status")["working"] == 3


@isolate_apps("tests.testapp")
def test_table_called_as_the_part_of_a_claim(table):
    class Picked(models.Model):
        status = modelqueue.StatusField()

        class Meta:
            app_label = "testapp"
            db_table = "picked"

    table(Picked)
    Picked.objects.create()
    assert run(Picked.objects, "status", succeed).status.state == State.finished


@pytest.mark.vendor("postgresql")
@isolate_apps("tests.testapp")
def test_table_of_another_schema_is_claimed_from_by_one_statement(schema, table, caplog):
    class Elsewhere(models.Model):
        status = modelqueue.StatusField()

        class Meta:
            app_label = "testapp"
            db_table = 'elsewhere"."tasks'

    table(Elsewhere)
    Elsewhere.objects.create()
    with caplog.at_level("DEBUG", "modelqueue"):
        assert run(Elsewhere.objects, "status", succeed).status.state == State.finished
    assert "step by step" not in caplog.text


@isolate_apps("tests.testapp")
def test_error_field_that_puts_sql_around_its_value(table):
    """As one that the database encrypts."""

    class Shouted(modelqueue.ErrorField):
        def get_placeholder(self, value, compiler, connection):
            return "UPPER(%s)"

        def get_placeholder_sql(self, value, compiler, connection):  # from Django 6.1
            return "UPPER(%s)", [value]

    class ShoutedTask(models.Model):
        error = Shouted()
        status = modelqueue.StatusField()

        class Meta:
            app_label = "testapp"

    table(ShoutedTask)
    task = ShoutedTask.objects.create()

    def fail(task):
        raise ValueError("quiet")

    with pytest.raises(ValueError, match="quiet"):
        run(ShoutedTask.objects, "status", fail, error_field="error")
    task.refresh_from_db()
    assert task.error.startswith("BUILTINS.VALUEERROR: QUIET")


@pytest.mark.vendor("postgresql")
def test_parameters_that_the_driver_binds_on_the_server(settings):
    """They have no place in EXECUTE: what can not be prepared is sent as it is."""
    Task.objects.bulk_create([Task() for _ in range(20)])
    options = connection.settings_dict["OPTIONS"]
    connection.close()
    connection.settings_dict["OPTIONS"] = {**options, "server_side_binding": True}
    try:
        for _ in range(20):
            assert run(Task.objects, "status", succeed).status.state == State.finished
    finally:
        connection.close()
        connection.settings_dict["OPTIONS"] = options


@pytest.fixture
def refusing_trigger():
    """PostgreSQL leaves rows with the data "refused" as they are, and raises nothing."""
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF OLD.data = 'refused' THEN RETURN NULL; END IF; RETURN NEW; END $$"
        )
        cursor.execute(
            "CREATE TRIGGER refuse BEFORE UPDATE ON testapp_task FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
    yield
    with connection.cursor() as cursor:
        cursor.execute("DROP FUNCTION refuse CASCADE")


@pytest.mark.vendor("postgresql")
@pytest.mark.parametrize("limit", [1, 3, 30])
def test_rows_that_a_trigger_leaves_as_they_are_do_not_hold_up_those_behind(refusing_trigger, limit):
    Task.objects.bulk_create([Task(data="refused", status=Status.waiting(0)) for _ in range(25)])
    behind = [Task.objects.create(status=Status.waiting(1)) for _ in range(3)]
    claimed = []
    while claims := claim(Task.objects, limit):
        claimed += [one.task for one in claims]
    assert claimed == behind


# Values that Python does not have


NOT_IN_PYTHON = {
    "infinity": (models.DateTimeField, "'infinity'"),
    "before Christ": (models.DateField, "'0044-03-15 BC'"),
    "after the year 9999": (models.DateTimeField, "'12000-01-01'"),
    "too long": (models.DurationField, "interval '5000000 years'"),
}


@pytest.mark.vendor("postgresql")
@pytest.mark.parametrize("driver", ["psycopg", "psycopg 2"])
@pytest.mark.parametrize("place", ["autocommit", "transaction"])
@pytest.mark.parametrize("name", NOT_IN_PYTHON)
@isolate_apps("tests.testapp")
def test_row_that_the_driver_can_not_read_is_claimed_and_so_are_its_neighbours(
    name, place, driver, table, monkeypatch
):
    kind, value = NOT_IN_PYTHON[name]

    class DatedTask(models.Model):
        due = kind(null=True)
        data = models.JSONField(default=dict)
        status = modelqueue.StatusField()

        class Meta:
            app_label = "testapp"

    if driver == "psycopg 2":  # whose rows can not be read one by one
        monkeypatch.setattr(PostgreSQLEngine, "_is_psycopg_2", True)
    table(DatedTask)
    tasks = [DatedTask.objects.create(data={"number": number}) for number in range(4)]
    with connection.cursor() as cursor:
        cursor.execute(f"UPDATE testapp_datedtask SET due = {value} WHERE id = {tasks[1].pk}")
    with transaction.atomic() if place == "transaction" else contextlib.nullcontext():
        claims = claim(DatedTask.objects, 3)
    assert [one.row.pk for one in claims] == [task.pk for task in tasks[:3]]
    assert [one.row.status for one in claims] == [task.status for task in tasks[:3]]
    assert [one.task for one in claims] == [tasks[0], None, tasks[2]]
    assert claims[2].task.data == {"number": 2}
    assert isinstance(claims[1].error, DatabaseError | OverflowError)
    assert list(DatedTask.objects.order_by("pk").values_list("status", flat=True)) == [
        *(one.lease for one in claims),
        tasks[3].status,
    ]


@pytest.mark.vendor("postgresql")
@isolate_apps("tests.testapp")
def test_row_that_the_driver_can_not_read_fails_alone(table, declare, settings):
    settings.MODELQUEUE = {"ENGINE": "auto"}  # the portable one reads what stands there before it sets that

    class DatedTask(models.Model):
        due = models.DateTimeField(null=True)
        began = models.DateTimeField(null=True)
        status = modelqueue.StatusField()

        class Meta:
            app_label = "testapp"

    table(DatedTask)
    tasks = [DatedTask.objects.create() for _ in range(4)]
    with connection.cursor() as cursor:
        cursor.execute(f"UPDATE testapp_datedtask SET due = 'infinity' WHERE id = {tasks[0].pk}")
        cursor.execute(f"UPDATE testapp_datedtask SET began = 'infinity' WHERE id = {tasks[1].pk}")
    moment = modelqueue.now()
    queue = declare(DatedTask, "status", name="dated", retry=0, claim_values={"began": moment})(unexpected)
    claimed = queue.claim(3)
    assert claimed == tasks[1:3]
    assert [queue.release(task) for task in claimed] == [True, True]
    sound = DatedTask.objects.exclude(pk=tasks[0].pk).order_by("pk")
    assert list(sound.values_list("status", flat=True)) == [task.status for task in tasks[1:]]
    # What stood there could not be read, so it is not put back.
    assert list(sound.values_list("began", flat=True)) == [moment, None, None]
    failed = DatedTask.objects.values_list("status", flat=True).get(pk=tasks[0].pk)
    assert (failed.state, failed.attempts) == (State.canceled, 1)


@pytest.mark.vendor("postgresql")
def test_rows_whose_keys_have_no_order_are_in_that_of_their_status():
    assert _in_order([({"a": 1}, 7), ({"b": 2}, 5), ({"c": 3}, 7)]) == [
        ({"b": 2}, 5),
        ({"a": 1}, 7),
        ({"c": 3}, 7),
    ]


@isolate_apps("tests.testapp")
def test_key_that_python_can_not_read_is_kept_as_the_database_has_it(table):
    """The row is claimed already, and has to be given an outcome."""

    class Unreadable(models.CharField):
        def from_db_value(self, value, *arguments):
            raise LookupError(value)

    class KeyedTask(models.Model):
        code = Unreadable(max_length=10, primary_key=True)
        status = modelqueue.StatusField()

        class Meta:
            app_label = "testapp"

    table(KeyedTask)
    assert columns_of(Source.of(KeyedTask.objects, "status")).key("x") == "x"


# Those on their last attempt


@pytest.fixture
def by_attempts():
    """Tasks by the attempts that they have had, and a function that claims from a source of them."""
    tasks = {count: Task.objects.create(status=Status.waiting(count, count)) for count in (0, 3, 1, 9)}
    return tasks, lambda limit=10, **parts: [
        one.row.pk for one in verbs.claim(replace(Source.of(Task.objects, "status"), **parts), limit)
    ]


@pytest.mark.parametrize("engine", ["auto", "portable"])
def test_tasks_with_so_many_attempts_are_left_out(engine, by_attempts, settings):
    settings.MODELQUEUE = {"ENGINE": engine}
    tasks, take = by_attempts
    assert take(limit=1, below=3) == [tasks[0].pk]
    assert take(below=1) == []  # another statement
    assert take(below=3) == [tasks[1].pk]
    assert take(below=3) == []
    assert take(below=9) == [tasks[3].pk]


@pytest.mark.parametrize("engine", ["auto", "portable"])
def test_tasks_with_so_many_attempts_alone_are_taken(engine, by_attempts, settings):
    """Or with more, as `retry` may have been lowered since."""
    settings.MODELQUEUE = {"ENGINE": engine}
    tasks, take = by_attempts
    assert take(at_least=4) == [tasks[9].pk]
    assert take(limit=1, at_least=1) == [tasks[1].pk]
    assert take(at_least=1) == [tasks[3].pk]
    assert take(at_least=1) == []


@pytest.mark.parametrize("engine", ["auto", "portable"])
@pytest.mark.parametrize(("head", "found"), [(1, []), (2, [3]), (50, [3, 9])])
def test_tasks_on_their_last_attempt_are_looked_for_near_the_head_alone(
    head, found, engine, by_attempts, declare, settings, monkeypatch
):
    """Else each look would read a backlog of a million to its end."""
    monkeypatch.setattr(source, "_HEAD", head)
    settings.MODELQUEUE = {"ENGINE": engine}
    tasks, _ = by_attempts
    queue = declare(Task, "status", name="tasks", retry=3)(succeed)
    assert [one.row.pk for one in verbs.claim(queue.alone(), 10)] == [tasks[count].pk for count in found]


@pytest.mark.parametrize(("attempts", "is_found"), [(2, False), (3, True)])
def test_tasks_of_one_number_are_looked_for_if_they_are_on_their_last_attempt(
    attempts, is_found, declare, monkeypatch
):
    """All were enqueued at once, and their head ends in the midst of them."""
    monkeypatch.setattr(source, "_HEAD", 3)
    Task.objects.bulk_create([Task(status=Status.waiting(7, attempts)) for _ in range(9)])
    Task.objects.create(status=Status.waiting(7, 9))
    queue = declare(Task, "status", name="tasks", retry=3)(succeed)
    assert bool(verbs.claim(queue.alone(), 1)) == is_found


CHANGES = {
    "edited": ("UPDATE testapp_task SET data = 'new' WHERE id = %s", ("new", Status.waiting(4))),
    "tried": ("UPDATE testapp_task SET status = status + 3 WHERE id = %s", ("", Status.waiting(4, 3))),
    "canceled": ("UPDATE testapp_task SET status = 5000000000000000000 WHERE id = %s", None),
    "deleted": ("DELETE FROM testapp_task WHERE id = %s", None),
}


@pytest.mark.vendor("postgresql")
@pytest.mark.parametrize("change", CHANGES)
def test_row_that_is_changed_while_the_claim_reads_is_claimed_as_it_is_then_or_not_at_all(
    change, settings, monkeypatch
):
    """Its statement sees what was committed when it began, and meets what was committed since."""
    settings.MODELQUEUE = {"ENGINE": "auto"}  # the portable one has no statement of its own

    def execute_when_let(engine, cursor, sql, params):
        cursor.execute(
            sql.replace(" WHERE (", " WHERE pg_advisory_lock_shared(7) IS NOT NULL AND (", 1), params
        )

    sql, found = CHANGES[change]
    tasks = Task.objects.bulk_create([Task(status=Status.waiting(number)) for number in range(1, 5)])
    monkeypatch.setattr(PostgreSQLEngine, "_execute", execute_when_let)
    monkeypatch.setattr(PostgreSQLEngine, "_claim_step_by_step", unexpected)
    claims = []
    claiming = Thread(target=lambda: (claims.extend(claim(Task.objects, 4)), connection.close()), daemon=True)
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(7)")
        claiming.start()
        waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        wait_until(lambda: (cursor.execute(waits), cursor.fetchone())[1] == (1,))
        cursor.execute(sql, [tasks[3].pk])
        cursor.execute("SELECT pg_advisory_unlock(7)")
    claiming.join(30)
    assert [one.row.pk for one in claims[:3]] == [task.pk for task in tasks[:3]]
    assert [(one.task.data, one.row.status) for one in claims[3:]] == ([] if found is None else [found])
    assert [stored(one.task) for one in claims] == [one.lease for one in claims]
