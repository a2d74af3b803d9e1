"""What is made of a caller's queryset. What is refused is in test_run_arguments.py."""

import datetime as dt

import pytest
from django.db.models import Count, F
from django.test import override_settings

from modelqueue import Status
from modelqueue.source import Source, owner_rows
from tests.testapp.models import ConcreteJob, Job, PrintJob, Project, ProxyJob, Task

pytestmark = pytest.mark.django_db(databases=["default", "other"])

NOW = dt.datetime(2027, 3, 26, 14, 43, 25, 759000, dt.timezone.utc)
MILLISECOND = dt.timedelta(milliseconds=1)


def due(rows):
    return [task.status for task in Source.of(rows, "status").due(NOW)]


# Order, locks, times


@pytest.mark.parametrize(
    "rows",
    [
        Task.objects,
        Task.objects.all(),
        Task.objects.order_by("-status"),
        Task.objects.order_by("-status").reverse(),
        Task.objects.reverse(),
        Task.objects.order_by("data", "?"),
    ],
    ids=["manager", "queryset", "ordered", "reversed order", "reversed", "random"],
)
def test_due_tasks_come_in_the_order_of_their_numbers(rows):
    numbers = [Status.waiting(priority, attempts) for priority in (5, 7) for attempts in (0, 9)]
    Task.objects.bulk_create([Task(status=number) for number in reversed(numbers)])
    assert due(rows) == numbers


def test_equal_numbers_come_in_the_order_of_their_keys():
    for _ in range(3):
        Task.objects.create(status=Status.waiting(5))
    keys = [task.pk for task in Source.of(Task.objects.order_by("-pk"), "status").due(NOW)]
    assert keys == sorted(keys)


def test_lock_of_the_caller_is_taken_off():
    rows = Source.of(Task.objects.select_for_update(), "status").queryset
    assert not rows.query.select_for_update


def test_order_of_the_caller_is_taken_off():
    rows = Source.of(Task.objects.order_by("data").reverse(), "status").queryset
    assert not rows.ordered
    assert rows.query.standard_ordering


def test_due_is_what_waits_until_this_millisecond():
    numbers = [Status.minimum("waiting"), Status.waiting(NOW - MILLISECOND, 9), Status.waiting(NOW, 9)]
    not_due = [Status.waiting(NOW + MILLISECOND), Status.maximum("created"), Status.minimum("working"), 0, -1]
    Task.objects.bulk_create([Task(status=number) for number in [*numbers, *not_due]])
    assert due(Task.objects) == numbers


def test_expired_is_what_was_claimed_until_this_millisecond():
    numbers = [Status.minimum("working"), Status.working(NOW - MILLISECOND, 9), Status.working(NOW, 9)]
    others = [Status.working(NOW + MILLISECOND), Status.maximum("waiting"), Status.minimum("finished"), 0, -1]
    Task.objects.bulk_create([Task(status=number) for number in [*numbers, *others]])
    source = Source.of(Task.objects, "status")
    assert [task.status for task in source.expired(NOW)] == numbers


# Where the status is


@pytest.mark.parametrize(
    ("model", "owner", "key"),
    [(Job, Job, "pk"), (ProxyJob, Job, "pk"), (PrintJob, Job, "id"), (ConcreteJob, ConcreteJob, "pk")],
)
def test_owner_is_the_model_whose_table_has_the_column(model, owner, key):
    source = Source.of(model.objects, "status")
    assert (source.model, source.owner, source.owner_key) == (model, owner, key)


class OtherRouter:
    def db_for_write(self, model, **hints):
        return "other"


def test_alias_of_the_queryset_wins_and_the_router_names_it_otherwise():
    assert Source.of(Task.objects, "status").using == "default"
    assert Source.of(Task.objects.using("other"), "status").using == "other"
    with override_settings(DATABASE_ROUTERS=[OtherRouter()]):
        assert Source.of(Task.objects, "status").using == "other"
        assert Source.of(Task.objects.using("default"), "status").using == "default"


# Rows as rows of the owner


@pytest.fixture
def jobs():
    project = Project.objects.create()
    for number in range(5):
        PrintJob.objects.create(project=project, title=str(number), status=Status.waiting(number))
    return list(Job.objects.order_by("pk").values_list("pk", flat=True))


ROWS = {
    "all": Job.objects.all,
    "proxy": lambda: ProxyJob.objects.filter(title__gte="0"),
    "ordered": lambda: Job.objects.order_by("project__name"),
    "joined": lambda: Job.objects.filter(project__name=""),
    "joined five times": lambda: Job.objects.filter(project__job__isnull=False),
    "inherited": PrintJob.objects.all,
    "inherited and joined": lambda: PrintJob.objects.filter(project__job__isnull=False),
    "sliced": lambda: Job.objects.order_by("pk")[:5],
    "union": lambda: Job.objects.filter(title__lt="3").union(Job.objects.filter(title__gte="3")),
    "distinct": Job.objects.distinct,
    "counted": lambda: Job.objects.annotate(jobs=Count("project__job")).filter(jobs=5),
    "grouped": lambda: Job.objects.annotate(rows=Count("pk")).filter(rows=1),
    "annotated": lambda: Job.objects.annotate(own=F("title")).filter(own__gte="0"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_any_queryset_are_each_updated_once(jobs, name, monkeypatch):
    monkeypatch.setattr("modelqueue.source._CHUNK", 2)
    parts = list(owner_rows(ROWS[name](), Job._meta.get_field("status")))
    assert {part.model._meta.concrete_model for part in parts} == {Job}
    assert sorted(pk for part in parts for pk in part.values_list("pk", flat=True)) == jobs
    assert sum(part.filter(status__state="waiting").update(status=Status.finished(0)) for part in parts) == 5


@pytest.mark.db_feature("can_distinct_on_fields")
def test_rows_that_are_distinct_on_a_field_are_updated(jobs):
    rows = Job.objects.order_by("project", "-title").distinct("project")
    parts = owner_rows(rows, Job._meta.get_field("status"))
    assert [part.update(status=Status.finished(0)) for part in parts] == [1]
    assert Job.objects.get(status__state="finished").title == "4"


@pytest.mark.parametrize("name", ["all", "proxy", "ordered", "annotated"])
def test_rows_of_one_table_are_updated_by_one_statement(jobs, name, django_assert_num_queries):
    with django_assert_num_queries(1):
        [part] = owner_rows(ROWS[name](), Job._meta.get_field("status"))
        part.update(status=Status.finished(0))


def test_rows_that_a_caller_changes_do_not_come_up_twice(jobs, monkeypatch):
    monkeypatch.setattr("modelqueue.source._CHUNK", 1)
    rows = PrintJob.objects.filter(status__state="waiting").order_by("status")
    changed = [
        part.update(status=F("status") + 100) for part in owner_rows(rows, Job._meta.get_field("status"))
    ]
    assert changed == [1, 1, 1, 1, 1]
