"""`enqueue`: which tasks it makes waiting, which it leaves alone, and that a claim always wins."""

import datetime as dt
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.db import connection, connections, models, transaction
from django.db.models import Count

from modelqueue import State, Status, clock, enqueue, run, verbs
from modelqueue.source import Source
from tests.actions import LONG_AGO, MILLISECOND, SECOND, Clock, row, stored, succeed
from tests.processes import wait_until
from tests.testapp import models as testapp
from tests.testapp.models import (
    Attachment,
    ConcreteJob,
    Job,
    Paper,
    PlainJob,
    PrintJob,
    Project,
    ProxyJob,
    Task,
    TextTask,
    UuidTask,
)

pytestmark = pytest.mark.django_db(transaction=True)

NOW = Clock().moment
LATER = NOW + 60 * SECOND
FINISHED = Status.finished(LONG_AGO, 3)

#: What `at` and `priority` become, and what they are without being given.
TARGETS = {
    "now": ({}, Status.waiting(NOW)),
    "at": ({"at": LATER}, Status.waiting(LATER)),
    "naive": ({"at": LATER.replace(tzinfo=None)}, Status.waiting(LATER)),
    "zone": ({"at": LATER.astimezone(dt.timezone(dt.timedelta(hours=-9)))}, Status.waiting(LATER)),
    "past": ({"at": LONG_AGO}, Status.waiting(LONG_AGO)),
    "first": ({"priority": 0}, Status.waiting(0)),
    "last": ({"priority": 10**17 - 1}, Status.waiting(10**17 - 1)),
}
targets = pytest.mark.parametrize(("options", "expected"), TARGETS.values(), ids=TARGETS)


@pytest.fixture(autouse=True)
def _clock():
    with clock.use(Clock()):
        yield


# What becomes of a task


@targets
@pytest.mark.parametrize(
    "before", [Status.created(LONG_AGO, 2), None, FINISHED, Status.canceled(LATER, 9), Status.created(0)]
)
def test_task_that_does_not_wait_becomes_waiting_without_attempts(before, options, expected):
    job = Job.objects.create(review_status=before)
    assert enqueue(Job.objects.all(), "review_status", **options) == 1
    assert stored(job, "review_status") == expected


@targets
@pytest.mark.parametrize(
    "number",
    [Status.working(LONG_AGO, 3), Status.working(0), 0, -1, 10**18 - 1, 6 * 10**18, 2**63 - 1, -(2**63)],
)
def test_working_and_foreign_numbers_are_left_alone(number, options, expected):
    task = Task.objects.create(status=number)
    assert enqueue(Task.objects.all(), "status", **options) == 0
    assert enqueue(task, "status", **options) == 0
    assert stored(task) == task.status == number


@pytest.mark.parametrize("before", [Status.waiting(0), Status.waiting(LONG_AGO, 3), Status.waiting(NOW, 9)])
def test_task_that_is_due_keeps_its_place(before):
    task = Task.objects.create(status=before)
    assert enqueue(Task.objects.all(), "status") == 0
    assert stored(task) == before


@pytest.mark.parametrize("before", [Status.waiting(NOW + MILLISECOND), Status.waiting(10**17 - 1, 9)])
def test_task_that_is_due_later_becomes_due_now(before):
    task = Task.objects.create(status=before)
    assert enqueue(Task.objects.all(), "status") == 1
    assert stored(task) == Status.waiting(NOW)


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "now"])
@pytest.mark.parametrize("before", [Status.waiting(7, 3), Status.waiting(NOW), Status.waiting(LATER, 9)])
def test_waiting_task_is_moved_to_a_place_that_is_given(before, name):
    options, expected = TARGETS[name]
    task = Task.objects.create(status=before)
    assert enqueue(Task.objects.all(), "status", **options) == 1
    assert stored(task) == expected


def test_count_is_of_the_tasks_that_were_moved():
    numbers = [FINISHED, Status.working(), Status.waiting(0), Status.created(), 0, Status.waiting(LATER)]
    Task.objects.bulk_create([Task(status=number) for number in numbers])
    assert enqueue(Task.objects, "status") == 3
    assert enqueue(Task.objects, "status") == 0
    assert enqueue(Task.objects, "status", priority=5) == 4
    assert enqueue(Task.objects.none(), "status", priority=6) == 0


def test_enqueued_task_is_run_by_the_next_call():
    task = Task.objects.create(status=Status.canceled())
    enqueue(task, "status")
    assert run(Task.objects, "status", succeed) == task


def test_nothing_else_of_the_row_is_touched():
    job = Job.objects.create(title="as it was", status=FINISHED, review_status=FINISHED, error="last failure")
    Job.objects.filter(pk=job.pk).update(title="edited since")
    job.title = "not saved"
    assert enqueue(job, "status") == 1
    found = row(job)
    assert (found.title, found.review_status, found.error) == ("edited since", FINISHED, "last failure")
    assert job.title == "not saved"


# Instances


@pytest.mark.parametrize("model", [Task, UuidTask, ConcreteJob, PrintJob, ProxyJob])
def test_instance_shows_its_new_status(model):
    task, other = (model.objects.create(status=FINISHED) for _ in range(2))
    assert enqueue(task, "status", priority=5) == 1
    assert isinstance(task.status, Status)
    assert stored(task) == task.status == Status.waiting(5)
    assert stored(other) == FINISHED


def test_save_of_an_enqueued_instance_writes_nothing_stale():
    paper = Paper.objects.create(status=FINISHED)
    enqueue(paper, "status")
    run(Paper.objects, "status", succeed)
    paper.title = "edited"
    paper.save()
    assert (row(paper).title, row(paper).status.state) == ("edited", State.finished)


def test_status_that_was_assigned_before_is_not_saved_after_enqueue():
    task = Task.objects.create(status=FINISHED)
    task.status = Status.canceled()
    enqueue(task, "status", priority=5)
    task.save()
    assert stored(task) == Status.waiting(5)


def test_instance_of_a_working_task_keeps_what_it_shows():
    task = Task.objects.create(status=FINISHED)
    Task.objects.update(status=Status.working())
    assert enqueue(task, "status") == 0
    assert task.status == FINISHED


def test_row_that_is_gone_is_not_counted():
    task = Task.objects.create(status=FINISHED)
    Task.objects.all().delete()
    assert enqueue(task, "status") == 0
    assert task.status == FINISHED


def test_plain_integer_field():
    job = PlainJob.objects.create(status=None)
    assert enqueue(job, "status", priority=5) == 1
    assert stored(job) == job.status == Status.waiting(5)


def test_instance_is_found_whatever_the_default_manager_hides(monkeypatch):
    task = Task.objects.create(status=FINISHED)
    monkeypatch.setattr(models.Manager, "get_queryset", lambda manager: models.QuerySet(manager.model).none())
    assert enqueue(task, "status") == 1


# Querysets


def pick(rows):
    """Rows for every kind of queryset: those with "yes" belong to it."""
    return rows.filter(title="yes")


QUERYSETS = {
    "filtered": pick,
    "ordered": lambda rows: pick(rows).order_by("-title", "pk").reverse(),
    "deferred": lambda rows: pick(rows).only("pk"),
    "select_related": lambda rows: pick(rows).select_related("project"),
    "for update": lambda rows: pick(rows).select_for_update(),
    "values": lambda rows: pick(rows).values("title"),
    "joined": lambda rows: pick(rows).filter(project__name="p"),
    "joined to many": lambda rows: pick(rows).filter(attachments__name="a"),
    "ordered by a join": lambda rows: pick(rows).order_by("project__name"),
    "excluded by a join": lambda rows: rows.exclude(attachments__name="b"),
    "distinct": lambda rows: pick(rows).distinct(),
    "distinct join": lambda rows: pick(rows).filter(attachments__name="a").distinct(),
    "aggregate": lambda rows: pick(rows).annotate(count=Count("attachments")).filter(count=2),
    "union": lambda rows: pick(rows).union(rows.filter(title="neither")),
    "slice": lambda rows: rows.order_by("-title")[:2],
    "slice of a join": lambda rows: rows.filter(project__name="p").order_by("-title")[:2],
    "subquery": lambda rows: rows.filter(project__in=Project.objects.filter(name="p"), title="yes"),
}


@pytest.mark.parametrize("select", QUERYSETS.values(), ids=QUERYSETS)
def test_queryset_of_any_kind(select):
    project = Project.objects.create(name="p")
    for title in ("yes", "no", "yes"):
        paper = Paper.objects.create(title=title, project=project, status=FINISHED)
        for name in "aa" if title == "yes" else "ab":
            Attachment.objects.create(paper=paper, name=name)
    assert enqueue(select(Paper.objects), "status", priority=5) == 2
    found = list(Paper.objects.order_by("pk").values_list("status", flat=True))
    assert found == [Status.waiting(5), FINISHED, Status.waiting(5)]


def test_slice_of_tasks_counts_those_that_were_moved():
    for status in (Status.working(), FINISHED, FINISHED):
        Task.objects.create(status=status)
    assert enqueue(Task.objects.order_by("pk")[:2], "status") == 1


def test_queryset_that_needs_many_updates():
    Task.objects.bulk_create([Task(status=FINISHED) for _ in range(1100)])
    assert enqueue(Task.objects.distinct(), "status", priority=5) == 1100
    assert set(Task.objects.values_list("status", flat=True)) == {Status.waiting(5)}


def test_condition_on_the_status_itself():
    Task.objects.bulk_create([Task(status=status) for status in (FINISHED, Status.canceled())])
    assert enqueue(Task.objects.filter(status__state="canceled"), "status") == 1
    assert Task.objects.filter(status=FINISHED).count() == 1


def test_manager_enqueues_the_rows_it_manages():
    project = Project.objects.create()
    jobs = [Job.objects.create(project=owner, status=FINISHED) for owner in (project, None)]
    assert enqueue(project.job_set, "status", priority=5) == 1
    assert [stored(job) for job in jobs] == [Status.waiting(5), FINISHED]


def test_inherited_field_is_selected_by_columns_of_both_tables():
    jobs = [
        PrintJob.objects.create(title=title, pages=pages, status=FINISHED)
        for title in "ab"
        for pages in (1, 2)
    ]
    assert enqueue(PrintJob.objects.filter(title="a", pages=2), "status", priority=5) == 1
    assert enqueue(PrintJob.objects.filter(title="b"), "status", priority=6) == 2
    assert [stored(job) for job in jobs] == [FINISHED, *map(Status.waiting, (5, 6, 6))]


def test_children_are_enqueued_without_other_rows_of_the_parent():
    job, child = Job.objects.create(status=FINISHED), PrintJob.objects.create(status=FINISHED)
    assert enqueue(PrintJob.objects, "status") == 1
    assert (stored(job), stored(child)) == (FINISHED, Status.waiting(NOW))


def test_text_key():
    tasks = [TextTask.objects.create(name=name, status=FINISHED) for name in ("a b", "%", "")]
    assert enqueue(TextTask.objects.distinct(), "status") == 3
    assert enqueue(tasks[1], "status", priority=5) == 1
    assert [stored(task) for task in tasks] == [Status.waiting(NOW), Status.waiting(5), Status.waiting(NOW)]


@pytest.mark.skipif(
    not hasattr(models, "CompositePrimaryKey"), reason="Django 5.2 has composite primary keys"
)
def test_composite_key():
    model = testapp.CompositeTask
    tasks = [model.objects.create(tenant=t, number=n, status=FINISHED) for t, n in ((1, 1), (1, 2), (2, 1))]
    assert enqueue(tasks[1], "status", priority=5) == 1
    assert tasks[1].status == Status.waiting(5)
    assert enqueue(model.objects.filter(tenant=2), "status", priority=6) == 1
    assert [stored(task) for task in tasks] == [FINISHED, Status.waiting(5), Status.waiting(6)]
    assert enqueue(model.objects.distinct(), "status", priority=7) == 3
    assert enqueue(model.objects.order_by("-tenant", "number")[:2], "status", priority=8) == 2
    assert [stored(task) for task in tasks] == [Status.waiting(8), Status.waiting(7), Status.waiting(8)]


# Databases


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_alias_of_the_queryset_and_of_the_instance():
    rows = [Task.objects.using(using).create(pk=1, status=FINISHED) for using in ("default", "other")]
    assert enqueue(Task.objects.using("other"), "status", priority=5) == 1
    assert [stored(task) for task in rows] == [FINISHED, Status.waiting(5)]
    assert enqueue(rows[1], "status", priority=6) == 1
    assert [stored(task) for task in rows] == [FINISHED, Status.waiting(6)]


class WritesToOther:
    def db_for_read(self, model, **hints):
        return "default"

    def db_for_write(self, model, **hints):
        return "other"


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize("select", [Task.objects.all, Task.objects.distinct], ids=["plain", "by keys"])
def test_rows_are_those_of_the_database_to_write_to(settings, select):
    rows = [Task.objects.using(using).create(status=FINISHED) for using in ("default", "other")]
    settings.DATABASE_ROUTERS = [WritesToOther()]
    assert enqueue(select(), "status", priority=5) == 1
    assert [stored(task, using=task._state.db) for task in rows] == [FINISHED, Status.waiting(5)]


@pytest.mark.parametrize("select", [Task.objects.all, Task.objects.distinct], ids=["plain", "by keys"])
def test_rollback_of_the_caller_undoes_it(select):
    task = Task.objects.create(status=FINISHED)
    with transaction.atomic():
        assert enqueue(select(), "status") == 1
        assert stored(task) == Status.waiting(NOW)
        transaction.set_rollback(True)
    assert stored(task) == FINISHED


def test_instance_is_saved_as_stored_after_a_rollback():
    task = Task.objects.create(status=FINISHED)
    with transaction.atomic():
        enqueue(task, "status")
        transaction.set_rollback(True)
    task.save()
    assert stored(task) == FINISHED


# Claimed meanwhile


def session():
    """The database's number for the connection of this thread."""
    query = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT CONNECTION_ID()"}[connection.vendor]
    with connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchone()[0]


def is_blocked(number):
    """Whether a session waits for a row that another one has locked."""
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("SELECT cardinality(pg_blocking_pids(%s)) > 0", [number])
            return cursor.fetchone()[0]
        # Not INNODB_TRX: it is a copy, which who asks often never sees renewed.
        cursor.execute("SHOW ENGINE INNODB STATUS")
        _, _, transactions = cursor.fetchone()[2].partition("LIST OF TRANSACTIONS")
        return any(
            "\nLOCK WAIT" in each and f"thread id {number}," in each
            for each in transactions.split("---TRANSACTION")
        )


@pytest.fixture
def thread():
    """A thread with a connection of its own."""
    with ThreadPoolExecutor(1) as pool:
        yield pool
        pool.submit(connections.close_all).result()


@pytest.mark.db_feature("has_select_for_update")
@pytest.mark.parametrize("options", [{"priority": 5}, {"at": LATER}, {}], ids=["priority", "at", "now"])
@pytest.mark.parametrize(
    "select",
    [
        PrintJob.objects.all,
        PrintJob.objects.get,
        Job.objects.all,
        Job.objects.get,
        lambda: Job.objects.filter(project__name="p"),
        Job.objects.distinct,
        lambda: Job.objects.order_by("pk")[:1],
    ],
    ids=["inherited", "instance of a child", "plain", "instance", "joined", "distinct", "slice"],
)
def test_task_that_is_claimed_while_enqueue_waits_is_left_alone(thread, select, options):
    # Seen from outside of the transaction the task waits; that it is due later is what enqueue() without
    # a time needs to want it.
    job = PrintJob.objects.create(project=Project.objects.create(name="p"), status=Status.waiting(LATER))
    given = select()
    number = thread.submit(session).result()
    with transaction.atomic():
        with clock.use(Clock(LATER)):
            [claim] = verbs.claim(Source.of(Job.objects, "status"))
        enqueued = thread.submit(enqueue, given, "status", **options)
        wait_until(lambda: is_blocked(number))
    assert enqueued.result(60) == 0
    assert stored(job) == claim.lease
    if isinstance(given, Job):
        assert given.status == Status.waiting(LATER)


# Wrong arguments


def assert_refused(error, message, *arguments, **options):
    task = Task.objects.create(status=FINISHED)
    with pytest.raises(error, match=message):
        enqueue(*arguments, **options)
    assert stored(task) == FINISHED


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"at": NOW, "priority": 5}, ValueError, r"at=datetime.* or priority=5, not both"),
        ({"at": 5}, TypeError, r"at is a datetime\.datetime, not 5"),
        ({"at": NOW.date()}, TypeError, r"at is a datetime\.datetime, not datetime\.date"),
        ({"at": "now"}, TypeError, r"at is a datetime\.datetime, not 'now'"),
        ({"at": dt.timedelta(0)}, TypeError, r"at is a datetime\.datetime, not datetime\.timedelta"),
        ({"priority": NOW}, TypeError, r"priority is an int, not datetime\..* use at"),
        ({"priority": True}, TypeError, "True"),
        ({"priority": 2.5}, TypeError, r"2\.5"),
        ({"priority": "5"}, TypeError, "'5'"),
        ({"priority": -1}, ValueError, "-1"),
        ({"priority": 10**17}, ValueError, str(10**17)),
    ],
)
def test_wrong_time_or_priority(options, error, message):
    assert_refused(error, message, Task.objects.all(), "status", **options)


@pytest.mark.parametrize("given", [None, "task", 5, Task, [], (), Task.objects.raw("")], ids=repr)
def test_neither_queryset_nor_instance(given):
    assert_refused(TypeError, "a QuerySet, a Manager or an instance, not", given, "status")


@pytest.mark.parametrize("task", [Task(), Task(pk=1), TextTask(name="a")], ids=["no key", "key", "own key"])
def test_unsaved_instance(task):
    before = task.status
    assert_refused(ValueError, "is not saved, so there is no row to enqueue. Save it first", task, "status")
    assert task.status == before


def test_deleted_instance():
    task = Task.objects.create(status=FINISHED)
    task.delete()
    assert_refused(ValueError, "is not saved", task, "status")


@pytest.mark.parametrize(
    ("field", "error", "message"),
    [
        ("nonsense", ValueError, "Task has no field 'nonsense'.* has the fields status"),
        ("status__state", ValueError, "Task has no field 'status__state'"),
        ("data", TypeError, r"Task\.data is a TextField, not a modelqueue\.StatusField"),
        ("id", TypeError, r"Task\.id is a BigAutoField, not"),
        (None, TypeError, "by its name, a str, not by None"),
        (Task._meta.get_field("status"), TypeError, "by its name, a str, not by <modelqueue"),
    ],
    ids=str,
)
def test_wrong_field(field, error, message):
    assert_refused(error, message, Task.objects.all(), field)
