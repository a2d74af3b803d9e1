"""Any queryset of rows is a queue: filters, joins, orders, other databases, all kinds of models and keys."""

import uuid

import pytest
from django.db import OperationalError, connection, connections, models
from django.db.models import Exists, F, FilteredRelation, OuterRef, Q, Value
from django.db.models.functions import Upper
from django.test.utils import CaptureQueriesContext

from modelqueue import Abort, Retry, State, Status, run, verbs
from modelqueue.engines import Candidate, Engine, engine_for
from modelqueue.engines.statements import is_plain
from modelqueue.outcomes import Policy
from modelqueue.source import Source
from tests.actions import MILLISECOND, SECOND, Clock, raising, stored, succeed, unexpected
from tests.testapp import models as testapp
from tests.testapp.models import (
    Attachment,
    ConcreteJob,
    Job,
    Milestone,
    NumberedJob,
    Paper,
    PickyPaper,
    PickyReference,
    PrintJob,
    Project,
    ProxyJob,
    StampedPaper,
    Task,
    TextTask,
    UuidTask,
)

pytestmark = pytest.mark.django_db(transaction=True)

CompositeTask = getattr(testapp, "CompositeTask", None)
composite = pytest.mark.skipif(CompositeTask is None, reason="Django has no composite keys before 5.2")


def drain(rows, field="status", **options):
    """Run all due tasks; return them in their order."""
    tasks = []
    while (task := run(rows, field, succeed, **options)) is not None:
        tasks.append(task)
    return tasks


def recover(rows, field="status", **policy):
    return verbs.recover(Source.of(rows, field), Policy(**policy), seconds=60)


# Which rows


@pytest.fixture
def papers():
    """Two papers of a project, one of another, one of none."""
    first, second = Project.objects.create(name="first"), Project.objects.create(name="second")
    return [
        Paper.objects.create(title="a", pages=1, project=first),
        Paper.objects.create(title="b", pages=2, project=first),
        Paper.objects.create(title="c", pages=3, project=second),
        Paper.objects.create(title="d", pages=4),
    ]


@pytest.mark.parametrize(
    ("select", "titles"),
    [
        (lambda rows: rows.all(), "abcd"),
        (lambda rows: rows.none(), ""),
        (lambda rows: rows.filter(title__in=["a", "d"]), "ad"),
        (lambda rows: rows.exclude(title="a"), "bcd"),
        (lambda rows: rows.filter(Q(title="a") | Q(pages__gt=3)), "ad"),
        (lambda rows: rows.filter(project__name="first"), "ab"),
        (lambda rows: rows.exclude(project__name="first"), "cd"),
        (lambda rows: rows.filter(project__isnull=True), "d"),
        (lambda rows: rows.filter(project__in=Project.objects.filter(name="second")), "c"),
        (
            lambda rows: rows.filter(Exists(Project.objects.filter(pk=OuterRef("project"), name="first"))),
            "ab",
        ),
        (lambda rows: rows.annotate(shout=Upper("title")).filter(shout="B"), "b"),
        (lambda rows: rows.alias(twice=F("pages") * 2).filter(twice__gt=5), "cd"),
        (lambda rows: rows.annotate(one=Value(1)), "abcd"),
        (
            lambda rows: rows.annotate(
                p=FilteredRelation("project", condition=Q(project__name="first"))
            ).filter(p__isnull=False),
            "ab",
        ),
        (lambda rows: rows.extra(where=["pages > 2"]), "cd"),
        (lambda rows: rows.select_related("project"), "abcd"),
        (lambda rows: rows.select_related("project").filter(project__name="second"), "c"),
        (lambda rows: rows.prefetch_related("attachments"), "abcd"),
        (lambda rows: rows.only("title"), "abcd"),
        (lambda rows: rows.defer("status"), "abcd"),
        (lambda rows: rows.select_related("project").only("title", "project__name"), "abcd"),
        (lambda rows: rows.order_by("-title"), "abcd"),
        (lambda rows: rows.order_by("project__name", "?"), "abcd"),
        (lambda rows: rows.order_by("title").reverse(), "abcd"),
        (lambda rows: rows.reverse(), "abcd"),
        (lambda rows: rows.extra(order_by=["-title"]), "abcd"),
        (lambda rows: rows.filter(status__state="waiting"), "abcd"),
        (lambda rows: rows.filter(status__lt=Status.waiting(0)), ""),
    ],
)
@pytest.mark.usefixtures("papers")
def test_rows_of_the_queryset_are_run_in_the_order_of_the_queue(select, titles):
    rows = select(Paper.objects.all())
    assert "".join(paper.title for paper in drain(rows)) == titles
    assert Paper.objects.filter(status__state="finished").count() == len(titles)


@pytest.mark.usefixtures("papers")
def test_priority_goes_before_any_order_of_the_caller():
    Paper.objects.filter(title="c").update(status=Status.waiting(1))
    Paper.objects.filter(title="b").update(status=Status.waiting(2))
    for rows in (Paper.objects.order_by("title"), Paper.objects.order_by("title").reverse()):
        assert run(rows, "status", raising(Retry())).title == "c"
        Paper.objects.filter(title="c").update(status=Status.waiting(1))


def test_reversed_queryset_runs_and_recovers_the_oldest_first():
    tasks = [Task.objects.create(status=Status.waiting(number)) for number in (5, 6)]
    assert drain(Task.objects.order_by("pk").reverse()) == tasks
    Task.objects.update(status=Status.working(0))
    assert recover(Task.objects.order_by("pk").reverse()) == 2


def test_equal_priorities_run_in_the_order_of_their_keys():
    tasks = Task.objects.bulk_create([Task(status=Status.waiting(5)) for _ in range(30)])
    assert drain(Task.objects.order_by("-pk")) == tasks


def test_queryset_that_was_read_already_is_asked_anew():
    Task.objects.create(status=Status.waiting(5))
    rows = Task.objects.all()
    assert len(rows) == 1
    later = Task.objects.create(status=Status.waiting(1))
    assert run(rows, "status", succeed) == later
    assert len(rows) == 1  # and the caller's own result is left alone


def test_manager_and_related_manager():
    project = Project.objects.create()
    job = Job.objects.create(project=project)
    Job.objects.create()
    assert drain(project.job_set) == [job]
    assert len(drain(Job.objects)) == 1


@pytest.mark.usefixtures("papers")
def test_annotations_and_related_objects_are_those_of_the_queryset():
    rows = (
        Paper.objects.annotate(twice=F("pages") * 2).select_related("project").prefetch_related("attachments")
    )
    Attachment.objects.create(paper=Paper.objects.get(title="a"), name="x")

    def action(paper):
        with CaptureQueriesContext(connection) as queries:
            assert paper.twice == 2
            assert paper.project.name == "first"
            assert [attachment.name for attachment in paper.attachments.all()] == ["x"]
        assert len(queries) == 0

    assert run(rows, "status", action).title == "a"


def test_manager_that_hides_what_does_not_wait(monkeypatch):
    """Outcomes and recoveries find the row, whatever the manager shows."""

    class Waiting(models.Manager):
        def get_queryset(self):
            return super().get_queryset().filter(status__state="waiting")

    manager = Waiting()
    manager.model = Paper
    paper = Paper.objects.create(title="a")

    def change(paper):
        paper.title = "b"

    assert run(manager, "status", change) == paper
    assert Paper.objects.get().title == "b"
    assert stored(paper).state == State.finished


# Joins


def test_row_that_a_join_multiplies_is_claimed_once():
    papers = [Paper.objects.create() for _ in range(5)]
    for paper in papers:
        Attachment.objects.bulk_create([Attachment(paper=paper, name="x") for _ in range(7)])
    rows = Paper.objects.filter(attachments__name="x")
    assert rows.count() == 35
    assert drain(rows) == papers
    Paper.objects.update(status=Status.working(0))
    assert recover(rows) == 5
    assert {paper.status.attempts for paper in Paper.objects.all()} == {1}


def test_many_at_once_are_claimed_once_each():
    papers = [Paper.objects.create() for _ in range(5)]
    Attachment.objects.bulk_create([Attachment(paper=paper) for paper in papers for _ in range(3)])
    claims = verbs.claim(Source.of(Paper.objects.filter(attachments__name=""), "status"), limit=10)
    assert [claim.task for claim in claims] == papers


@pytest.mark.usefixtures("step_by_step")
def test_condition_on_another_table_is_asked_again_under_the_lock(monkeypatch):
    """A row that was edited between pick and lock, and is no longer the caller's, is not claimed."""
    first, second = (Paper.objects.create(title="mine") for _ in range(2))
    engine = type(engine_for("default"))
    lock = engine._lock

    def edit_and_lock(self, *args, **kwargs):
        Paper.objects.filter(pk=first.pk).update(title="not mine")
        return lock(self, *args, **kwargs)

    monkeypatch.setattr(engine, "_lock", edit_and_lock)
    assert run(Paper.objects.filter(title="mine"), "status", succeed) == second
    assert stored(first) == first.status


@pytest.mark.usefixtures("step_by_step")
def test_condition_on_another_table_is_asked_again_beside_a_row_that_can_not_be_loaded(monkeypatch):
    papers = [PickyPaper.objects.create(title=title) for title in ("unreadable", "a", "b")]
    references = [PickyReference.objects.create(paper=paper) for paper in papers]
    engine = type(engine_for("default"))
    lock = engine._lock

    def lock_and_edit(*args, **options):
        PickyPaper.objects.filter(title="a").update(title="gone")
        return lock(*args, **options)

    monkeypatch.setattr(engine, "_lock", lock_and_edit)
    rows = PickyReference.objects.select_related("paper").exclude(paper__title="gone")
    claims = verbs.claim(Source.of(rows, "status"), 3)
    assert [claim.row.pk for claim in claims] == [references[0].pk, references[2].pk]
    assert [type(claim.error) for claim in claims] == [ValueError, type(None)]
    assert stored(references[1]).state == State.waiting


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.parametrize("change", [{"status": Status.canceled(5)}, {"status": Status.waiting(7)}])
def test_row_whose_status_changed_after_it_was_picked_is_not_claimed_from_it(change, monkeypatch):
    first, second = (Task.objects.create(status=Status.waiting(number)) for number in (1, 2))
    engine = type(engine_for("default"))
    lock = engine._lock

    def edit_and_lock(self, *args, **kwargs):
        Task.objects.filter(pk=first.pk).update(**change)
        return lock(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_lock", edit_and_lock)
        assert run(Task.objects, "status", succeed) == second
    assert stored(first) == change["status"]


@pytest.mark.usefixtures("step_by_step")
def test_row_that_is_deleted_after_it_was_picked(monkeypatch):
    first, second = Task.objects.create(), Task.objects.create()
    engine = type(engine_for("default"))
    lock = engine._lock

    def delete_and_lock(self, *args, **kwargs):
        Task.objects.filter(pk=first.pk).delete()
        return lock(self, *args, **kwargs)

    monkeypatch.setattr(engine, "_lock", delete_and_lock)
    assert run(Task.objects, "status", succeed) == second
    assert Task.objects.count() == 1


@pytest.mark.usefixtures("step_by_step")
def test_no_more_are_claimed_than_were_asked_for_where_some_are_taken(monkeypatch):
    tasks = Task.objects.bulk_create([Task(status=Status.waiting(number)) for number in range(12)])
    lock = Engine._lock

    def lock_all_but_the_first(self, source, candidates, **options):
        return [row for row in lock(self, source, candidates, **options) if row.pk != tasks[0].pk]

    monkeypatch.setattr(Engine, "_lock", lock_all_but_the_first)
    assert [claim.task for claim in verbs.claim(Source.of(Task.objects, "status"), 3)] == tasks[1:4]
    assert Task.objects.filter(status__gte=Status.minimum("working")).count() == 3


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.parametrize("is_away", [True, False])
def test_what_is_claimed_is_returned_also_when_more_candidates_can_not_be_read(is_away, monkeypatch, caplog):
    tasks = Task.objects.bulk_create([Task(status=Status.waiting(number)) for number in range(35)])
    read, pages, lock = Engine._read_page, [], Engine._lock

    def read_once(self, *arguments):
        pages.append(arguments)
        if len(pages) > 1:
            raise OperationalError("the disk is full")
        return read(self, *arguments)

    monkeypatch.setattr(Engine, "_read_page", read_once)
    monkeypatch.setattr(Engine, "_lock", lambda *arguments: lock(*arguments)[5:])  # others have the first
    monkeypatch.setattr(Engine, "is_of_the_database_itself", lambda self, error: is_away)
    assert [claim.task for claim in verbs.claim(Source.of(Task.objects, "status"), 25)] == tasks[5:25]
    assert "testapp.Task: fewer are claimed: the disk is full" in caplog.text
    assert ("Traceback" in caplog.text) != is_away


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.parametrize("is_something_claimed", [True, False])
def test_what_is_claimed_is_run_also_when_the_next_page_can_not_be_read(
    is_something_claimed, monkeypatch, caplog
):
    """It is committed, and nobody else would run it; where nothing is, the error is raised."""
    tasks = Task.objects.bulk_create([Task(status=Status.waiting(number)) for number in range(4)])
    lock, calls = Engine._lock, []

    def lock_once(self, source, candidates, **options):
        calls.append(candidates)
        if len(calls) > 1:
            raise OperationalError("the disk is full")
        return [row for row in lock(self, source, candidates, **options) if row.pk in able]

    able = {task.pk for task in tasks[1:3]} if is_something_claimed else set()
    monkeypatch.setattr(Engine, "_lock", lock_once)
    if is_something_claimed:
        assert [claim.task for claim in verbs.claim(Source.of(Task.objects, "status"), 3)] == tasks[1:3]
        assert "testapp.Task: fewer are claimed" in caplog.text
    else:
        with pytest.raises(OperationalError, match="the disk is full"):
            verbs.claim(Source.of(Task.objects, "status"), 3)
    assert {task.pk for task in tasks if stored(task).state == State.working} == able


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.parametrize("step", [1, -1])
def test_each_row_is_on_one_page(step):
    tasks = Task.objects.bulk_create(
        [Task(status=Status.waiting(50 + step * number)) for number in range(45)]
    )
    claims = verbs.claim(Source.of(Task.objects, "status"), 45)
    assert [claim.task for claim in claims] == tasks[::step]


@pytest.mark.usefixtures("step_by_step")
def test_long_queue_is_read_page_by_page(monkeypatch):
    """Rows of which none can be claimed, of two equal numbers, longer than two pages; the last is free."""
    tasks = Task.objects.bulk_create([Task(status=Status.waiting(number % 2)) for number in range(300)])
    last = max(tasks, key=lambda task: (task.status, task.pk))
    engine = type(engine_for("default"))
    lock = engine._lock

    def lock_the_last(self, *args, **kwargs):
        return [candidate for candidate in lock(self, *args, **kwargs) if candidate.pk == last.pk]

    monkeypatch.setattr(engine, "_lock", lock_the_last)
    assert run(Task.objects, "status", succeed) == last


# Locks


@pytest.mark.parametrize("options", [{}, {"nowait": True}, {"of": ("self",)}])
def test_lock_of_the_caller_is_replaced(options):
    if options and not connection.features.has_select_for_update:
        options = {}
    task = Task.objects.create()
    assert run(Task.objects.select_for_update(**options), "status", succeed) == task


def test_lock_of_the_caller_with_a_join_is_replaced():
    paper = Paper.objects.create()
    rows = Paper.objects.select_related("project").select_for_update()  # an outer join can not be locked
    assert run(rows, "status", succeed) == paper


# Databases


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize("model", [Task, Paper, PrintJob])
@pytest.mark.parametrize(
    "rows", [lambda model: model.objects.using("other"), lambda model: model.objects.db_manager("other")]
)
def test_queryset_of_another_database(model, rows):
    here = model.objects.create()
    there = model.objects.using("other").create()

    def action(task):
        assert task._state.db == "other"
        if hasattr(task, "title"):
            task.title = "b"
        raise Abort

    assert run(rows(model), "status", action) == there
    assert stored(there).attempts == 1
    assert stored(here) == here.status
    model.objects.using("other").update(
        status=Status.working(0)
    ) if model is not PrintJob else Job.objects.using("other").update(status=Status.working(0))
    assert run(rows(model), "status", succeed).status.state == State.finished
    assert stored(there).state == State.finished


class WritesElsewhere:
    def db_for_write(self, model, **hints):
        return "other"


class ReadsElsewhere:
    def db_for_read(self, model, **hints):
        return "other"


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_without_using_the_router_names_the_database_to_write_to(settings):
    here, there = Task.objects.create(), Task.objects.using("other").create()
    settings.DATABASE_ROUTERS = [WritesElsewhere()]
    assert run(Task.objects.all(), "status", succeed)._state.db == "other"
    assert run(Task.objects.using("default"), "status", succeed)._state.db == "default"
    assert stored(here).state == stored(there).state == State.finished


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_without_using_a_replica_is_not_asked(settings):
    task = Task.objects.create()
    Task.objects.using("other").create(status=Status.created())
    settings.DATABASE_ROUTERS = [ReadsElsewhere()]
    assert run(Task.objects.all(), "status", succeed)._state.db == "default"
    assert stored(task, using="default").state == State.finished


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_changes_are_saved_where_the_task_came_from(settings):
    paper = Paper.objects.create(title="a")
    settings.DATABASE_ROUTERS = [WritesElsewhere()]

    def change(paper):
        paper.title = "b"

    run(Paper.objects.using("default"), "status", change)
    assert (Paper.objects.using("default").get().title, stored(paper).state) == ("b", State.finished)
    assert not Paper.objects.using("other").exists()


# Kinds of models


@pytest.mark.parametrize("model", [Job, ProxyJob, PrintJob, ConcreteJob])
def test_models_that_inherit(model):
    job = model.objects.create(title="a", status=Status.waiting())

    def change(job):
        assert type(job) is model
        job.title = "b"

    returned = run(model.objects, "status", change)
    assert returned == job
    assert (stored(job).state, model.objects.get().title) == (State.finished, "b")
    model.objects.update(status=Status.working(0))
    assert recover(model.objects) == 1
    assert drain(model.objects) == [job]


def test_row_that_is_not_the_callers_any_more_is_left_waiting(papers, monkeypatch, settings):
    settings.MODELQUEUE = {"ENGINE": "auto"}
    first, second, third, _ = papers
    load = Engine._load

    def load_without_the_first(self, source, rows):
        return {pk: task for pk, task in load(self, source, rows).items() if pk != first.pk}

    monkeypatch.setattr(Engine, "_load", load_without_the_first)
    claims = verbs.claim(Source.of(Paper.objects.select_related("project"), "status"), 2)
    assert [claim.task for claim in claims] == [second, third]
    assert [claim.task.status for claim in claims] == [stored(second), stored(third)]
    assert stored(first) == first.status


@pytest.mark.vendor("sqlite", "postgresql")  # where there is such a way
@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize(
    "rows",
    [
        Task.objects.all(),
        Task.objects.using("other"),
        Job.objects.filter(title__startswith="title"),
        ProxyJob.objects.exclude(title="other").order_by("-title"),
        ConcreteJob.objects.all(),
        StampedPaper.objects.filter(facts__isnull=False),
        PickyPaper.objects.all(),
        UuidTask.objects.all(),
        TextTask.objects.all(),
    ],
    ids=lambda rows: f"{rows.model.__name__} {rows.query.where}",
)
def test_rows_of_one_table_are_claimed_at_once(rows, monkeypatch, settings):
    """A claim at once that fails is repeated step by step: no other test would show it."""
    settings.MODELQUEUE = {"ENGINE": "auto"}
    monkeypatch.setattr(Engine, "_claim_step_by_step", lambda *arguments: pytest.fail("step by step"))
    clock = Clock()
    source = Source.of(rows, "status")

    def values(task):
        return {field.attname: getattr(task, field.attname) for field in task._meta.concrete_fields}

    def create(number):
        text = next((name for name in ("title", "data", "name") if hasattr(rows.model, name)), None)
        status = Status.waiting(clock() + number * SECOND, number + 4)
        return rows.create(status=status, **({text: f"title {number}"} if text else {}))

    def check(limit, *expected):
        claims = engine_for(source.using).claim(source, clock, limit)
        assert [claim.task for claim in claims] == list(expected)
        for claim, task in zip(claims, expected, strict=True):
            lease = Status.working(clock() + MILLISECOND, task.status.attempts)
            assert claim.row == Candidate(task.pk, task.pk, task.status)
            assert claim.lease == lease
            assert values(claim.task) == values(rows.get(pk=task.pk)) == {**values(task), "status": lease}
            assert claim.task._state.db == source.using

    third, first, second, later = (create(number) for number in (-1, -3, -2, 1))
    check(1, first)
    check(3, second, third)
    check(3)
    clock.move(SECOND)
    check(1, later)


def test_status_in_the_table_of_a_child():
    Project.objects.create(name="other")
    milestone = Milestone.objects.create(name="a")

    def change(milestone):
        milestone.name += "b"

    assert run(Milestone.objects, "status", change) == milestone
    assert (stored(milestone).state, Milestone.objects.get().name) == (State.finished, "ab")


@pytest.mark.parametrize(
    ("rows", "plain"),
    [
        (Job.objects.filter(title="a").exclude(project=1).order_by("title"), True),
        (ProxyJob.objects.all(), True),
        (PrintJob.objects.all(), False),
        (Milestone.objects.all(), False),
        (Job.objects.annotate(one=Value(1)), False),
        (Job.objects.extra(select={"one": "1"}), False),
        (Job.objects.extra(tables=["testapp_project"]), False),
        (Job.objects.select_related("project"), False),
        (Job.objects.prefetch_related("project"), False),
        (Job.objects.only("title"), False),
        (Job.objects.defer("title"), False),
        (Job.objects.filter(Q(project=None) | Q(project__name="a")), False),
        (Project(pk=1).job_set.all(), False),
    ],
)
def test_task_that_is_more_than_its_row_is_not_taken_for_it(rows, plain):
    assert is_plain(Source.of(rows, "status")) == plain


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.usefixtures("step_by_step")
def test_transactions_are_those_of_the_database_of_the_task():
    connection = connections["other"]
    inside = []

    def note(execute, sql, params, many, context):
        if sql.startswith("UPDATE"):
            inside.append(connection.in_atomic_block)
        return execute(sql, params, many, context)

    StampedPaper.objects.using("other").create(status=Status.working(0))
    with connection.execute_wrapper(note):
        run(StampedPaper.objects.using("other"), "status", lambda paper: setattr(paper, "title", "a"))
    assert inside
    assert all(inside)


def test_two_queues_of_one_model_are_apart():
    first = Job.objects.create(status=Status.waiting(5), review_status=None)
    second = Job.objects.create(status=Status.created(5), review_status=Status.waiting(5))
    assert drain(Job.objects, "status") == [first]
    assert drain(Job.objects, "review_status") == [second]
    assert (stored(second), stored(first, "review_status")) == (Status.created(5), None)
    Job.objects.update(status=Status.working(5), review_status=Status.working(5))
    assert (recover(Job.objects, "review_status"), recover(Job.objects, "review_status")) == (2, 0)
    assert {stored(job) for job in (first, second)} == {Status.working(5)}


def test_parents_and_children_share_their_queue():
    child = PrintJob.objects.create()
    parent = Job.objects.create()
    assert [type(job) for job in drain(Job.objects)] == [Job, Job]
    Job.objects.update(status=Status.waiting(1))
    assert drain(PrintJob.objects) == [child]
    assert drain(Job.objects) == [parent]


@pytest.mark.parametrize("engine", ["auto", "portable"])
@pytest.mark.parametrize("error_field", ["error", "remark"])
def test_child_with_a_key_of_its_own(engine, error_field, settings):
    """The status is in the row of the parent, found by the key of that."""
    settings.MODELQUEUE = {"ENGINE": engine}
    untouched = Job.objects.bulk_create([Job(status=Status.created(5)) for _ in range(3)])
    jobs = [NumberedJob.objects.create(status=Status.waiting(number)) for number in range(3)]
    assert not {job.number for job in jobs} & {job.job_id for job in jobs}
    with pytest.raises(ValueError, match="no"):
        run(NumberedJob.objects, "status", raising(ValueError("no")), retry=0, error_field=error_field)
    assert stored(jobs[0]).state == State.canceled
    assert [bool(getattr(job, error_field)) for job in NumberedJob.objects.order_by("pk")] == [
        True,
        False,
        False,
    ]
    assert drain(NumberedJob.objects, error_field=error_field) == jobs[1:]
    NumberedJob.objects.update(status=Status.working(0))
    assert verbs.recover(Source.of(NumberedJob.objects, "status", error_field), Policy()) == 3
    assert all(getattr(job, error_field) for job in NumberedJob.objects.all())
    assert drain(NumberedJob.objects) == jobs
    assert {stored(job) for job in untouched} == {Status.created(5)}


def test_filters_on_both_tables_of_a_child():
    PrintJob.objects.create(title="a", pages=1)
    job = PrintJob.objects.create(title="a", pages=2)
    PrintJob.objects.create(title="b", pages=2)
    assert drain(PrintJob.objects.filter(title="a", pages=2)) == [job]


# Kinds of primary keys


def test_uuid_as_key():
    tasks = [
        UuidTask.objects.create(id=uuid.UUID(int=number), status=Status.waiting(0)) for number in (3, 1, 2)
    ]
    assert sorted(drain(UuidTask.objects), key=str) == sorted(tasks, key=str)
    UuidTask.objects.update(status=Status.working(0))
    assert recover(UuidTask.objects) == 3


def test_text_as_key():
    names = ["b", "a/ü'\"%s", "", "Z"]
    tasks = [TextTask.objects.create(name=name, status=Status.waiting(0)) for name in names]
    assert {task.name for task in drain(TextTask.objects)} == set(names)
    assert all(stored(task).state == State.finished for task in tasks)


def test_many_rows_with_text_as_key():
    TextTask.objects.bulk_create(
        [TextTask(name=f"{number:x}", status=Status.waiting(0)) for number in range(150)]
    )
    assert len(verbs.claim(Source.of(TextTask.objects, "status"), limit=200)) == 150
    TextTask.objects.update(status=Status.working(0))
    assert recover(TextTask.objects) == 150


@composite
def test_composite_key():
    tasks = [
        CompositeTask.objects.create(tenant=1, number=number, status=Status.waiting(0)) for number in (2, 1)
    ]

    def change(task):
        task.title = "b"

    assert run(CompositeTask.objects, "status", change) == tasks[1]
    assert CompositeTask.objects.get(pk=(1, 1)).title == "b"
    assert run(CompositeTask.objects, "status", raising(Abort()), delay=Policy().timeout) == tasks[0]
    assert run(CompositeTask.objects, "status", unexpected) is None
    CompositeTask.objects.update(status=Status.working(0))
    assert recover(CompositeTask.objects) == 2


@composite
def test_many_rows_with_a_composite_key():
    CompositeTask.objects.bulk_create(
        [CompositeTask(tenant=number % 7, number=number, status=Status.working(0)) for number in range(1200)]
    )
    while recover(CompositeTask.objects):
        pass
    assert set(CompositeTask.objects.values_list("status__state", flat=True)) == {State.waiting}


@composite
def test_changed_part_of_a_composite_key_is_a_failed_attempt():
    CompositeTask.objects.create(tenant=1, number=1)

    def change(task):
        task.number = 2

    with pytest.raises(ValueError, match="changed the primary key"):
        run(CompositeTask.objects, "status", change)
    assert CompositeTask.objects.get().pk == (1, 1)
    assert CompositeTask.objects.get().status.attempts == 1
