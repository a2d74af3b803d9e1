"""A worker that lost its lease overwrites nothing; a view that saves an old instance undoes nothing."""

import logging
from contextlib import suppress

import pytest

from modelqueue import Abort, Cancel, Retry, State, Status, clock, enqueue, run
from modelqueue.engines import Candidate, engine_for
from modelqueue.source import Source
from tests.actions import SECOND, Clock, heard, raising, row, stored, succeed, unexpected
from tests.testapp.models import Attachment, Paper, PlainJob, PrintJob, ShoutingPaper, StampedPaper

pytestmark = pytest.mark.django_db(transaction=True)

# The outcome of the first is one UPDATE, those of the others are written by save().
MODELS = [Paper, StampedPaper, ShoutingPaper]


class Late(Exception):  # noqa: N818
    pass


def nothing(task):
    pass


def change(task):
    task.title = "late"
    if hasattr(task, "facts"):
        task.facts["late"] = True


def assign(task):
    task.status = Status.waiting(0)


def fail(error):
    def end(task):
        task.title = "late"
        raise error

    return end


ENDINGS = {
    "returns": nothing,
    "changes": change,
    "assigns": assign,
    "Retry": fail(Retry()),
    "Abort": fail(Abort()),
    "Cancel": fail(Cancel()),
    "fails": fail(Late()),
    "leaves": fail(SystemExit()),
}
CHANGING = [end for name, end in ENDINGS.items() if name != "returns"]
endings = pytest.mark.parametrize("end", ENDINGS.values(), ids=ENDINGS)
models = pytest.mark.parametrize("model", MODELS)


def lose(model, interfere, end):
    """Run an action during which somebody takes its task away; return what came back."""

    def action(task):
        interfere(task)
        end(task)

    with suppress(Late, SystemExit):
        return run(model.objects, "status", action, error_field="error" if hasattr(model, "error") else None)
    return None


# A worker that took too long


def is_recovered(now):
    def interfere(task):
        now.move(10 * SECOND)
        assert run(type(task).objects.exclude(pk=task.pk), "status", unexpected) is None
        assert run(type(task).objects, "status", raising(Retry(60 * SECOND)), timeout=5 * SECOND) == task

    return interfere


def is_finished_by_another(now):
    def interfere(task):
        now.move(10 * SECOND)
        assert run(type(task).objects, "status", succeed, timeout=5 * SECOND) == task

    return interfere


def is_canceled_by_recovery(now):
    def interfere(task):
        now.move(10 * SECOND)
        assert run(type(task).objects, "status", unexpected, retry=0, timeout=5 * SECOND) is None

    return interfere


def is_claimed_by_another(now):
    def interfere(task):
        now.move(10 * SECOND)

        def killed(task):
            raise SystemError("not recorded")

        # What a worker leaves behind that was killed.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("modelqueue.attempts.Attempt.record", raising_method)
            with pytest.raises(KeyError):
                run(type(task).objects, "status", killed, timeout=5 * SECOND)

    return interfere


def raising_method(self, outcome):
    raise KeyError


@endings
@models
@pytest.mark.parametrize(
    ("interfere", "state", "attempts"),
    [
        (is_recovered, State.waiting, 1),
        (is_claimed_by_another, State.working, 1),
        (is_finished_by_another, State.finished, 2),
        (is_canceled_by_recovery, State.canceled, 1),
    ],
)
def test_stale_worker_overwrites_nothing(model, interfere, state, attempts, end, caplog):
    now = Clock()
    after = []
    with clock.use(now):
        task = model.objects.create(title="a")

        def interfering(task):
            interfere(now)(task)
            now.move(SECOND)
            after.append(row(task))

        with heard("lease_lost") as events, caplog.at_level(logging.WARNING, "modelqueue"):
            returned = lose(model, interfering, end)
    assert (stored(task).state, stored(task).attempts) == (state, attempts)
    for field in model._meta.concrete_fields:
        assert getattr(row(task), field.attname) == getattr(after[0], field.attname), field.name
    assert [event["status"] for _, event in events] == [stored(task)]
    assert events[0][1]["lease"] != stored(task)
    assert caplog.messages[-1].startswith(f"{model._meta.label} {task.pk} status: lease lost")
    if returned is not None:
        assert returned.status == stored(task)


def test_stale_worker_does_not_empty_the_text_of_a_failure():
    now = Clock()
    with clock.use(now):
        task = Paper.objects.create()

        def interfere(task):
            now.move(10 * SECOND)
            run(Paper.objects, "status", raising(Abort()), timeout=5 * SECOND, error_field="error")

        lose(Paper, interfere, nothing)
    assert row(task).error.startswith("modelqueue.exceptions.Abort")


# Somebody who decides otherwise


@endings
@models
@pytest.mark.parametrize(
    "decision", [Status.canceled(), Status.waiting(7), Status.created(), Status.finished(7, 3)]
)
def test_status_set_by_hand_during_the_action_stands(model, decision, end):
    task = model.objects.create(title="a")

    def interfere(task):
        other = model.objects.get(pk=task.pk)
        other.status = decision
        other.title = "by hand"
        other.save()

    with heard("lease_lost", "task_finished") as events:
        lose(model, interfere, end)
    assert (stored(task), row(task).title) == (decision, "by hand")
    assert [(name, event["status"]) for name, event in events] == [("lease_lost", decision)]


@endings
@models
def test_deleted_row_stays_deleted(model, end):
    task = model.objects.create()
    with heard("lease_lost", "task_finished") as events:
        returned = lose(model, lambda task: model.objects.filter(pk=task.pk).delete(), end)
    assert not model.objects.exists()
    if returned is not None:  # nothing was recorded
        assert returned.status == events[0][1]["lease"]
    assert [(name, event["status"], event["pk"]) for name, event in events] == [("lease_lost", None, task.pk)]


@endings
def test_deleted_row_of_a_child_table_stays_deleted(end):
    PrintJob.objects.create()
    lose(PrintJob, lambda job: PrintJob.objects.filter(pk=job.pk).delete(), end)
    assert not PrintJob.objects.exists()


@endings
@models
def test_action_may_delete_its_task(model, end, caplog):
    task = model.objects.create()
    with heard("lease_lost", "task_finished") as events:
        lose(model, lambda task: task.delete(), end)
    assert not model.objects.exists()
    assert [(name, event["pk"]) for name, event in events] == [("task_finished", task.pk)]
    assert "lease lost" not in caplog.text


@endings
def test_plain_column_is_fenced_too(end):
    job = PlainJob.objects.create(status=Status.waiting())

    lose(PlainJob, lambda job: PlainJob.objects.update(status=Status.canceled(5)), end)
    assert row(job).status == Status.canceled(5)


@pytest.mark.parametrize(
    ("end", "event"), [(nothing, "task_finished"), *((end, "lease_lost") for end in CHANGING)]
)
def test_status_set_by_hand_after_the_action_saved_its_own_stands(end, event):
    """The action had ended its task by then; what it wanted to write later is lost."""
    paper = Paper.objects.create(title="a")
    decision = Status.created(7)

    def save_and_lose(paper):
        paper.status = Status.canceled(5)
        paper.save()
        Paper.objects.filter(pk=paper.pk).update(status=decision, title="by hand")

    with heard("task_finished", "lease_lost") as events:
        lose(Paper, save_and_lose, end)
    assert [(name, facts["status"]) for name, facts in events] == [(event, decision)]
    assert (stored(paper), row(paper).title) == (decision, "by hand")


def test_plain_column_that_the_action_reads_again_is_its_lease():
    job = PlainJob.objects.create(status=Status.waiting())

    def refresh(job):
        job.refresh_from_db()
        job.title = "b"

    returned = run(PlainJob.objects, "status", refresh)
    assert (returned.status.state, row(job).title) == (State.finished, "b")
    assert stored(job) == returned.status


def test_plain_column_that_the_action_reads_again_shows_that_it_was_taken():
    job = PlainJob.objects.create(status=Status.waiting())

    def lose_and_refresh(job):
        PlainJob.objects.filter(pk=job.pk).update(status=Status.canceled(5))
        job.refresh_from_db()

    with heard("task_finished", "lease_lost") as events:
        run(PlainJob.objects, "status", lose_and_refresh)
    assert [name for name, _ in events] == ["lease_lost"]
    assert stored(job) == Status.canceled(5)


@pytest.mark.parametrize("engine", ["auto", "portable"])
def test_status_is_set_only_over_the_named_ones(engine, settings):
    settings.MODELQUEUE = {"ENGINE": engine}
    job = PlainJob.objects.create(status=None)
    source, candidate = Source.of(PlainJob.objects, "status"), Candidate(job.pk, job.pk, Status(5))

    def sets(old, new):
        return engine_for("default").compare_and_set(source, candidate, old, new)

    assert not sets([Status(5)], Status(6))
    assert sets([Status(5), None], Status(6))
    assert not sets([Status(5), None], Status(7))
    assert not sets([None], Status(7))
    assert sets([Status(5), Status(6)], None)
    assert not sets([Status(5)], Status(7))
    assert sets([None], Status(7))
    assert stored(job) == 7


def test_enqueue_leaves_a_working_task_to_its_worker():
    task = Paper.objects.create()
    seen = []
    lose(Paper, lambda task: seen.append(enqueue(Paper.objects, "status", priority=0)), change)
    assert seen == [0]
    assert (stored(task).state, row(task).title) == (State.finished, "late")


def test_action_that_takes_the_key_from_its_instance_has_failed():
    Paper.objects.create(title="a")

    def unset(task):
        task.pk = None
        task.title = "b"

    with pytest.raises(ValueError, match="changed the primary key of its task"):
        run(Paper.objects, "status", unset)
    assert [(paper.title, paper.status.attempts) for paper in Paper.objects.all()] == [("a", 1)]


# Instances that were loaded earlier


@models
def test_view_that_loaded_the_row_before_the_claim_saves_it_after_the_outcome(model):
    task = model.objects.create(title="a", pages=1)
    view = model.objects.get(pk=task.pk)

    def action(task):
        task.pages = 2

    run(model.objects, "status", action)
    finished = stored(task)
    view.title = "by the view"
    view.save()
    assert stored(task) == finished
    assert finished.state == State.finished
    assert row(task).title == "by the view"
    assert run(model.objects, "status", unexpected) is None


@models
def test_view_that_created_the_row_saves_it_again_after_the_outcome(model):
    view = model.objects.create(title="a")
    run(model.objects, "status", succeed)
    finished = stored(view)
    for title in ("b", "c"):
        view.title = title
        view.save()
        assert (stored(view), row(view).title) == (finished, title)
    assert finished.state == State.finished


@models
def test_view_that_saves_during_the_action_breaks_no_lease(model):
    view = model.objects.create(title="a")

    def action(task):
        view.title = "by the view"
        view.save()
        assert stored(task) == task.status
        task.pages = 2

    with heard("lease_lost") as events:
        run(model.objects, "status", action)
    assert not events
    assert (stored(view).state, row(view).title, row(view).pages) == (State.finished, "by the view", 2)


def test_view_of_a_child_model_saves_it_after_the_outcome():
    view = PrintJob.objects.create(title="a")
    run(PrintJob.objects, "status", succeed)
    view.title, view.pages = "b", 5
    view.save()
    assert (stored(view).state, row(view).title, row(view).pages) == (State.finished, "b", 5)


def test_view_that_saves_with_update_fields_or_in_bulk_names_the_status():
    task = Paper.objects.create()
    view = Paper.objects.get()
    run(Paper.objects, "status", succeed)
    view.save(update_fields=["title", "status"])
    assert stored(task).state == State.finished
    view.status = Status.waiting(5)
    view.save(update_fields=["title"])
    assert stored(task).state == State.finished
    view.save(update_fields=["status"])
    assert stored(task) == Status.waiting(5)


def test_returned_task_is_as_good_as_loaded():
    task = Paper.objects.create(title="a")
    returned = run(Paper.objects, "status", raising(Retry()))
    run(Paper.objects, "status", succeed)
    returned.title = "b"
    returned.save()
    assert (stored(task).state, row(task).title) == (State.finished, "b")


@pytest.mark.parametrize("model", MODELS)
def test_status_that_the_action_assigned_is_written_with_the_outcome_alone(model):
    model.objects.create()
    returned = run(model.objects, "status", lambda task: setattr(task, "status", Status.created(5)))
    assert stored(returned) == Status.created(5)
    model.objects.update(status=Status.finished(5))
    returned.save()
    assert stored(returned) == Status.finished(5)


def test_task_that_the_action_kept_is_as_good_as_loaded():
    kept = []

    def keep(task):
        kept.append(task)
        raise Retry

    task = Paper.objects.create(title="a")
    run(Paper.objects, "status", keep)
    run(Paper.objects, "status", succeed)
    kept[0].title = "b"
    kept[0].save()
    assert (stored(task).state, row(task).title) == (State.finished, "b")


def test_child_row_of_a_claimed_task_leaves_it_alone():
    paper = Paper.objects.create()
    run(Paper.objects, "status", lambda paper: Attachment.objects.create(paper_id=paper.pk))
    assert stored(paper).state == State.finished
