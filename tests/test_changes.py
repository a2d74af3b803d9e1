"""What is written besides the status: what the action changed, as by save(), and nothing else."""

import contextlib
import copy
import decimal
from asyncio import CancelledError

import pytest
from django.core.files.base import ContentFile
from django.db import IntegrityError, OperationalError, connection, transaction
from django.db.models import F
from django.db.models.signals import post_save, pre_save
from django.test.utils import CaptureQueriesContext

from modelqueue import Abort, Cancel, Retry, State, Status, outcomes, run
from modelqueue.fields import WATCHER
from tests.actions import heard, raising, row, stored, succeed, unexpected
from tests.testapp.models import (
    Attachment,
    Paper,
    PickyPaper,
    PlainJob,
    PrintJob,
    Project,
    ReviewedTask,
    ShoutingPaper,
    StampedPaper,
    Task,
)

pytestmark = pytest.mark.django_db(transaction=True)

# The first is written by an UPDATE of its status where nothing else changed, the others by save().
MODELS = [Paper, StampedPaper, ShoutingPaper]


def edit(task, **values):
    """Somebody else changes the row."""
    type(task).objects.filter(pk=task.pk).update(**values)


# Changes of the action


@pytest.mark.parametrize("model", MODELS)
def test_changes_of_the_action_are_saved(model):
    paper = model.objects.create(title="a", pages=1)

    def change(paper):
        paper.title = "b"
        paper.facts = {"lines": 3}

    returned = run(model.objects, "status", change)
    for found in (returned, row(paper)):
        assert (found.title, found.pages, found.facts) == ("b", 1, {"lines": 3})
    assert stored(paper).state == State.finished


@pytest.mark.parametrize("error", [Retry(), Abort(), Cancel(), ValueError(), KeyboardInterrupt()])
@pytest.mark.parametrize("model", MODELS)
def test_changes_before_an_exception_are_saved(model, error):
    paper = model.objects.create()

    def change(paper):
        paper.pages = 7
        raise error

    with contextlib.suppress(ValueError, KeyboardInterrupt):
        run(model.objects, "status", change)
    assert row(paper).pages == 7


@pytest.mark.parametrize(
    ("before", "change", "after"),
    [
        ({"a": 1}, lambda facts: facts.update(b=2), {"a": 1, "b": 2}),
        ({"a": [1]}, lambda facts: facts["a"].append(2), {"a": [1, 2]}),
        ({"a": {"b": {"c": 1}}}, lambda facts: facts["a"]["b"].clear(), {"a": {"b": {}}}),
        ([1, 2], lambda facts: facts.reverse(), [2, 1]),
        # Equal in Python, and two things in JSON:
        ({"a": 1}, lambda facts: facts.update(a=True), {"a": True}),
        ({"a": [0]}, lambda facts: facts.update(a=[False]), {"a": [False]}),
        ([{"a": True}], lambda facts: facts[0].update(a=1), [{"a": 1}]),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_change_within_a_json_value_is_saved(model, before, change, after):
    paper = model.objects.create(facts=before)
    run(model.objects, "status", lambda paper: change(paper.facts))
    assert repr(row(paper).facts) == repr(after)


@pytest.mark.parametrize("model", MODELS)
def test_expression_is_applied_once_to_the_newest_value(model):
    paper = model.objects.create(pages=1)

    def count(paper):
        paper.pages = F("pages") + 10
        edit(paper, pages=100)

    returned = run(model.objects, "status", count)
    assert returned.pages == row(paper).pages == 110
    returned.save()
    assert row(paper).pages == 110


def content(paper):
    with row(paper).scan.open() as file:
        return file.read()


def test_file_is_saved(tmp_path, settings):
    settings.MEDIA_ROOT = tmp_path
    paper = Paper.objects.create()
    run(Paper.objects, "status", lambda paper: paper.scan.save("a.txt", ContentFile("1"), save=False))
    assert content(paper) == b"1"

    def assign(paper):
        paper.scan = ContentFile("22", name="b.txt")

    edit(paper, status=Status.waiting())
    run(Paper.objects, "status", assign)
    assert content(paper) == b"22"

    edit(paper, status=Status.waiting())
    run(Paper.objects, "status", lambda paper: paper.scan.delete(save=False))
    assert not row(paper).scan


def test_file_that_was_only_read_is_no_change(tmp_path, settings):
    settings.MEDIA_ROOT = tmp_path
    paper = Paper.objects.create(scan=ContentFile("1", name="a.txt"))

    def read(paper):
        with paper.scan.open() as file:
            assert file.read() == b"1"
        edit(paper, scan="other.txt")

    run(Paper.objects, "status", read)
    assert row(paper).scan.name == "other.txt"


def test_value_that_can_not_be_copied_is_compared_by_identity():
    paper = PickyPaper.objects.create(title="single")
    run(PickyPaper.objects, "status", lambda paper: edit(paper, title="edited"))
    assert row(paper).title == "edited"

    edit(paper, title="single", status=Status.waiting())

    def change(paper):
        paper.title = "b"

    run(PickyPaper.objects, "status", change)
    assert row(paper).title == "b"


# Related objects


def test_related_object_is_assigned():
    paper = Paper.objects.create()

    def assign(paper):
        paper.project = Project.objects.create(name="new")

    assert run(Paper.objects, "status", assign).project.name == "new"
    assert row(paper).project.name == "new"


def test_related_object_may_be_saved_after_it_was_assigned():
    paper = Paper.objects.create()

    def assign(paper):
        paper.project = Project(name="later")
        paper.project.save()

    run(Paper.objects, "status", assign)
    assert row(paper).project.name == "later"


@pytest.mark.parametrize("model", MODELS)
def test_unsaved_related_object_is_a_failed_attempt(model):
    paper = model.objects.create()

    def assign(paper):
        paper.project = Project(name="never")

    with pytest.raises(ValueError, match="unsaved related object"):
        run(model.objects, "status", assign)
    assert (stored(paper).state, stored(paper).attempts) == (State.waiting, 1)


@pytest.mark.parametrize("model", MODELS)
def test_related_object_may_be_deleted(model):
    paper = model.objects.create(project=Project.objects.create())

    def delete(paper):
        paper.project.delete()
        paper.pages = 2

    assert run(model.objects, "status", delete).project is None
    assert (row(paper).project, row(paper).pages) == (None, 2)


# Edits of others


@pytest.mark.parametrize("model", MODELS)
def test_concurrent_edit_of_another_field_survives(model):
    paper = model.objects.create(title="a", pages=1, facts={"a": 1})

    def change(paper):
        edit(paper, title="edited", facts={"edited": True})
        paper.pages = 2

    returned = run(model.objects, "status", change)
    for found in (returned, row(paper)):
        assert (found.title, found.pages, found.facts) == ("edited", 2, {"edited": True})


@pytest.mark.parametrize("model", MODELS)
def test_concurrent_edit_survives_an_action_that_changes_nothing(model):
    paper = model.objects.create(title="a")
    run(model.objects, "status", lambda paper: edit(paper, title="edited"))
    assert row(paper).title == "edited"


def test_concurrent_edit_survives_where_the_column_of_the_status_is_a_parents():
    job = PrintJob.objects.create(title="a", pages=1)

    def change(job):
        PrintJob.objects.filter(pk=job.pk).update(title="edited")
        job.pages = 2

    run(PrintJob.objects, "status", change)
    assert (row(job).title, row(job).pages) == ("edited", 2)
    assert row(job).status.state == State.finished


def test_concurrent_edit_of_the_same_field_gives_way():
    paper = Paper.objects.create(title="a")

    def change(paper):
        paper.title = "action"
        edit(paper, title="edited")

    run(Paper.objects, "status", change)
    assert row(paper).title == "action"


@pytest.mark.vendor("postgresql")  # the others do not store it
def test_not_a_number_is_no_change():
    paper = Paper.objects.create(score=float("nan"))
    run(Paper.objects, "status", lambda paper: edit(paper, score=1.5))
    assert row(paper).score == 1.5


# Deferred columns


@pytest.mark.parametrize("model", MODELS)
def test_deferred_column_is_not_written_back(model):
    paper = model.objects.create(title="a", pages=1)

    def change(paper):
        assert "title" in paper.get_deferred_fields()
        edit(paper, title="edited")
        paper.pages = 2

    run(model.objects.only("pages"), "status", change)
    assert (row(paper).title, row(paper).pages) == ("edited", 2)


@pytest.mark.parametrize("model", [Paper, StampedPaper])
def test_deferred_column_that_was_read_is_not_written_back(model):
    paper = model.objects.create(title="a", facts={"a": 1})

    def change(paper):
        assert (paper.title, paper.facts) == ("a", {"a": 1})
        edit(paper, title="edited", facts={"edited": True})
        paper.pages = 2

    run(model.objects.defer("title", "facts"), "status", change)
    assert (row(paper).title, row(paper).pages, row(paper).facts) == ("edited", 2, {"edited": True})


@pytest.mark.parametrize("model", [Paper, StampedPaper])
def test_deferred_column_that_was_changed_is_written(model):
    paper = model.objects.create(title="a", facts={"a": 1})

    def change(paper):
        paper.title = "b"
        paper.facts["b"] = 2

    run(model.objects.only("pages"), "status", change)
    assert (row(paper).title, row(paper).facts) == ("b", {"a": 1, "b": 2})


def test_deferred_status_and_error_are_recorded():
    paper = Paper.objects.create(error="old")
    assert (
        run(Paper.objects.only("title"), "status", succeed, error_field="error").status.state
        == State.finished
    )
    assert row(paper).error == ""
    stamped = StampedPaper.objects.create(error="old")
    run(StampedPaper.objects.only("edited"), "status", raising(Abort()), error_field="error")
    assert row(stamped).error.startswith("modelqueue.exceptions.Abort")


# As by save()


def test_auto_now_is_set():
    paper = StampedPaper.objects.create()
    before = row(paper).edited
    returned = run(StampedPaper.objects, "status", succeed)
    assert row(paper).edited == returned.edited
    assert returned.edited > before


def test_own_save_is_called():
    paper = ShoutingPaper.objects.create(title="a")
    ShoutingPaper.objects.update(title="b", shout="")
    assert run(ShoutingPaper.objects, "status", succeed).shout == "B"
    assert row(paper).shout == "B"


@pytest.mark.parametrize("signal", [pre_save, post_save])
@pytest.mark.parametrize("sender", [Paper, None], ids=["of the model", "of all"])
def test_listeners_of_a_save_are_called(signal, sender):
    paper = Paper.objects.create()
    seen = []

    def receive(sender, instance, **arguments):
        seen.append(instance.status.state)

    signal.connect(receive, sender=sender)
    try:
        run(Paper.objects, "status", succeed)
    finally:
        signal.disconnect(receive, sender=sender)
    assert seen == [State.finished]
    assert stored(paper).state == State.finished


def test_listener_may_assign_the_status():
    paper = Paper.objects.create()

    def decide(sender, instance, **arguments):
        instance.status = Status.created(5)

    def change(paper):
        paper.title = "b"

    pre_save.connect(decide, sender=Paper)
    try:
        with heard("task_finished") as events:
            returned = run(Paper.objects, "status", change)
    finally:
        pre_save.disconnect(decide, sender=Paper)
    assert stored(paper) == returned.status == events[0][1]["status"] == Status.created(5)


def test_listener_of_another_model_is_not_called():
    Task.objects.create()
    pre_save.connect(raising_receiver, sender=Paper)
    try:
        assert run(Task.objects, "status", succeed) is not None
    finally:
        pre_save.disconnect(raising_receiver, sender=Paper)


def raising_receiver(sender, **arguments):
    raise AssertionError(sender)


def test_claim_and_recovery_do_not_save(monkeypatch):
    monkeypatch.setattr(ShoutingPaper, "save", raising(AssertionError("saved")))
    ShoutingPaper.objects.bulk_create([ShoutingPaper(status=Status.working(0)), ShoutingPaper()])
    pre_save.connect(raising_receiver, sender=ShoutingPaper)
    try:
        with pytest.raises(AssertionError):
            run(ShoutingPaper.objects, "status", succeed)
    finally:
        pre_save.disconnect(raising_receiver, sender=ShoutingPaper)
    # One was recovered and one claimed; only its outcome was to be saved, in vain.
    assert sorted(paper.status.attempts for paper in ShoutingPaper.objects.all()) == [1, 1]


def test_plain_update_where_nobody_can_tell(unprepared):
    Paper.objects.create()
    before = []
    with CaptureQueriesContext(connection) as queries:
        run(Paper.objects, "status", lambda paper: before.append(len(queries)))
    outcome = [query["sql"] for query in queries.captured_queries[before[0] :]]
    [update] = [statement for statement in outcome if statement.startswith("UPDATE")]
    assert "title" not in update


# An action that saves by itself


@pytest.mark.parametrize("model", MODELS)
def test_action_may_save_its_task(model):
    paper = model.objects.create(title="a", pages=1)

    def save(paper):
        paper.title = "b"
        paper.save()
        edit(paper, title="edited")
        paper.pages = 2

    returned = run(model.objects, "status", save)
    assert returned.status == stored(paper)
    assert stored(paper).state == State.finished
    assert (row(paper).title, row(paper).pages) == ("edited", 2)


def test_action_that_saves_its_progress_many_times_needs_no_more_memory_for_it():
    paper = Paper.objects.create()
    layers = []

    def count(paper):
        for number in range(20):
            paper.pages = number
            paper.save()
            layers.append(len(paper.__dict__[WATCHER]._layers))

    run(Paper.objects, "status", count)
    assert layers == [2] * 20
    assert row(paper).pages == 19


@pytest.mark.parametrize("model", MODELS)
def test_action_may_save_some_fields(model):
    paper = model.objects.create(title="a", pages=1)

    def save(paper):
        paper.title = "b"
        paper.pages = 2
        paper.save(update_fields=["title"])
        edit(paper, title="edited")

    run(model.objects, "status", save)
    assert (row(paper).title, row(paper).pages) == ("edited", 2)


@pytest.mark.parametrize("model", MODELS)
def test_expression_that_the_action_saved_is_applied_once(model):
    paper = model.objects.create(pages=1)

    def save(paper):
        paper.pages = F("pages") + 10
        paper.save()

    run(model.objects, "status", save)
    assert row(paper).pages == 11


@pytest.mark.parametrize("model", MODELS)
def test_action_may_refresh_its_task(model):
    paper = model.objects.create(title="a", pages=1)

    def refresh(paper):
        edit(paper, title="b")
        paper.refresh_from_db()
        assert paper.title == "b"
        edit(paper, title="c")
        paper.pages = 2

    run(model.objects, "status", refresh)
    assert (row(paper).title, row(paper).pages) == ("c", 2)
    assert stored(paper).state == State.finished


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "value", [Status.created(0, 4), Status.waiting(5), Status.finished(7), Status.canceled(8, 9)]
)
def test_action_may_save_its_own_status(model, value):
    paper = model.objects.create(title="a")

    def save(paper):
        paper.status = value
        paper.title = "b"
        paper.save()
        paper.pages = 2

    assert run(model.objects, "status", save).status == value
    assert (stored(paper), row(paper).title, row(paper).pages) == (value, "b", 2)


def test_action_may_save_its_own_status_and_then_another():
    paper = Paper.objects.create()

    def save(paper):
        paper.status = Status.waiting(5)
        paper.save()
        paper.status = Status.canceled(8, 9)

    assert run(Paper.objects, "status", save).status == Status.canceled(8, 9)
    assert stored(paper) == Status.canceled(8, 9)


@pytest.mark.parametrize("value", [Status.waiting(5), Status.working(5), Status.finished(7)])
def test_failure_after_the_action_saved_its_own_status_is_recorded(value):
    paper = Paper.objects.create()

    def save(paper):
        paper.status = value
        paper.save()
        raise Abort

    run(Paper.objects, "status", save)
    assert (stored(paper).state, stored(paper).attempts) == (State.waiting, 1)


def test_action_that_saves_the_status_working_has_failed():
    paper = Paper.objects.create()

    def save(paper):
        paper.status = Status.working(5)
        paper.save()

    with pytest.raises(ValueError, match="The action assigned"):
        run(Paper.objects, "status", save)
    assert (stored(paper).state, stored(paper).attempts) == (State.waiting, 1)


def test_action_may_refresh_after_it_saved_its_own_status():
    paper = Paper.objects.create()

    def save(paper):
        paper.status = Status.created(5)
        paper.save()
        paper.refresh_from_db()

    assert run(Paper.objects, "status", save).status == Status.created(5)
    assert stored(paper) == Status.created(5)


def test_action_may_refresh_after_it_saved_a_status_that_others_took():
    paper = Paper.objects.create()

    def save(paper):
        paper.status = Status.waiting(5)
        paper.save()
        run(Paper.objects, "status", succeed)
        paper.refresh_from_db()

    returned = run(Paper.objects, "status", save)
    assert (stored(paper).state, stored(paper).attempts) == (State.finished, 1)
    assert returned.status == stored(paper)


def test_lease_that_is_assigned_is_no_decision():
    paper = Paper.objects.create()

    def assign(paper):
        paper.status = int(paper.status)

    assert run(Paper.objects, "status", assign).status.state == State.finished
    assert stored(paper).state == State.finished


def test_copy_of_the_task_is_another_instance():
    paper = Paper.objects.create(title="a")

    def use_copies(paper):
        for other in (copy.copy(paper), copy.deepcopy(paper)):
            other.title = "copy"
            other.refresh_from_db()
            other.pages = 3
        paper.title = "b"

    run(Paper.objects, "status", use_copies)
    assert (row(paper).title, row(paper).pages) == ("b", 0)
    assert stored(paper).state == State.finished


def test_copy_of_the_task_may_be_saved():
    paper = Paper.objects.create(title="a")

    def save_copy(paper):
        other = copy.copy(paper)
        other.title = "copy"
        other.save()

    run(Paper.objects, "status", save_copy)
    assert row(paper).title == "copy"
    assert stored(paper).state == State.finished


def test_action_may_make_a_new_row_of_its_task():
    paper = Paper.objects.create(title="a")

    def clone(paper):
        other = copy.copy(paper)
        other.pk, other._state.adding, other.status = None, True, Status.created()
        other.save()

    run(Paper.objects, "status", clone)
    assert sorted(p.status.state for p in Paper.objects.all()) == [State.created, State.finished]
    assert stored(paper).state == State.finished


# What can not be saved


def test_row_whose_save_raises_is_a_failed_attempt():
    paper = ShoutingPaper.objects.create(title="a")

    def break_it(paper):
        paper.title = "unsavable"

    for attempts in (1, 2, 3, 4):
        with pytest.raises(RuntimeError, match="this row can not be saved"):
            run(ShoutingPaper.objects, "status", break_it, error_field="error")
        assert stored(paper).attempts == attempts
    assert stored(paper).state == State.canceled
    assert row(paper).title == "a"
    assert row(paper).error.splitlines()[0] == "builtins.RuntimeError: this row can not be saved"
    assert run(ShoutingPaper.objects, "status", unexpected) is None


@pytest.mark.parametrize("action", [succeed, raising(Abort()), raising(Retry()), raising(Cancel())])
def test_row_that_never_could_be_saved_does_not_come_up_for_ever(action):
    ShoutingPaper.objects.bulk_create([ShoutingPaper(title="unsavable")])
    for _ in range(4):
        with pytest.raises(RuntimeError, match="this row can not be saved"):
            run(ShoutingPaper.objects, "status", action)
    assert ShoutingPaper.objects.get().status.state == State.canceled


@pytest.mark.parametrize(
    ("error", "attempts"), [(ValueError("no"), 1), (KeyboardInterrupt(), 1), (CancelledError(), 0)], ids=repr
)
def test_error_of_the_action_goes_before_that_of_its_changes(error, attempts, caplog):
    paper = ShoutingPaper.objects.create(title="a")

    def action(paper):
        paper.title = "unsavable"
        raise error

    with pytest.raises(type(error)) as raised:
        run(ShoutingPaper.objects, "status", action, error_field="error")
    assert raised.value is error
    assert (stored(paper).state, stored(paper).attempts) == (State.waiting, attempts)
    first_line = row(paper).error.partition("\n")[0]
    assert first_line == ("" if attempts == 0 else outcomes.error_text(error).partition("\n")[0])
    assert "what the action changed can not be saved" in caplog.text


def test_interruption_goes_before_the_error_of_the_action():
    paper = Paper.objects.create(title="a")

    def interrupt(sender, **arguments):
        raise KeyboardInterrupt

    def action(paper):
        paper.title = "b"
        raise ValueError("no")

    pre_save.connect(interrupt, sender=Paper)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(Paper.objects, "status", action)
    finally:
        pre_save.disconnect(interrupt, sender=Paper)
    assert (stored(paper).state, stored(paper).attempts, row(paper).title) == (State.waiting, 1, "a")


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit()])
def test_listener_that_raises_is_a_failed_attempt(error):
    paper = Paper.objects.create(title="a")

    def receive(sender, **arguments):
        raise error

    def change(paper):
        paper.title = "b"

    pre_save.connect(receive, sender=Paper)
    try:
        with pytest.raises(type(error)):
            run(Paper.objects, "status", change)
    finally:
        pre_save.disconnect(receive, sender=Paper)
    assert (stored(paper).state, stored(paper).attempts, row(paper).title) == (State.waiting, 1, "a")


@pytest.mark.parametrize("error", [RuntimeError("no"), IntegrityError("no"), OperationalError("no")])
def test_hook_of_the_commit_that_fails_is_no_failed_attempt(error, caplog):
    """The outcome is committed by then."""
    paper = Paper.objects.create(title="a")

    def fail():
        raise error

    def receive(sender, **arguments):
        transaction.on_commit(fail)

    def change(paper):
        paper.title = "b"

    post_save.connect(receive, sender=Paper)
    try:
        with heard("task_finished", "lease_lost") as events:
            assert run(Paper.objects, "status", change) == paper
    finally:
        post_save.disconnect(receive, sender=Paper)
    assert [(name, facts["outcome"]) for name, facts in events] == [("task_finished", "finish")]
    assert (stored(paper).state, stored(paper).attempts, row(paper).title) == (State.finished, 1, "b")
    assert "is recorded, but its commit ended with an error" in caplog.text


def test_value_that_the_database_refuses_is_a_failed_attempt():
    paper = Paper.objects.create(title="a")

    def break_it(paper):
        paper.pages = None

    with pytest.raises(IntegrityError):
        run(Paper.objects, "status", break_it)
    assert (stored(paper).state, stored(paper).attempts, row(paper).pages) == (State.waiting, 1, 0)


def test_value_of_a_wrong_type_is_a_failed_attempt():
    paper = Paper.objects.create(title="a")

    def break_it(paper):
        paper.pages = "many"

    with pytest.raises(ValueError, match="expected a number"):
        run(Paper.objects, "status", break_it)
    assert (stored(paper).state, stored(paper).attempts) == (State.waiting, 1)


def test_changed_primary_key_is_a_failed_attempt():
    Paper.objects.create(title="a")

    def break_it(paper):
        paper.pk += 1000

    with pytest.raises(ValueError, match=r"changed the primary key of its task from .* Create another row"):
        run(Paper.objects, "status", break_it)
    assert (stored(Paper.objects.get()).state, stored(Paper.objects.get()).attempts) == (State.waiting, 1)
    assert Paper.objects.count() == 1


def save_as_another(paper):
    paper.pk = None
    paper._state.adding = True
    paper.save()


def save_a_copy(paper):
    other = copy.copy(paper)
    other.pk = None
    other.save()


def save_under_another_key(paper):
    paper.pk = Paper.objects.exclude(pk=paper.pk).get().pk
    paper.save()


@pytest.mark.parametrize("model", [Paper, PlainJob])
@pytest.mark.parametrize("make", [save_as_another, save_a_copy])
def test_copy_of_the_task_is_not_saved_under_its_lease(model, make):
    """It would be a working row without a worker, which makes another one when it is recovered."""
    task = model.objects.create(title="a", status=Status.waiting(0))
    with pytest.raises(
        ValueError, match=r"changed the primary key of its task .* status=Status\.waiting\(\)"
    ):
        run(model.objects, "status", make)
    assert [other.pk for other in model.objects.all()] == [task.pk]
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


def test_task_is_not_saved_over_another_row():
    paper, other = Paper.objects.create(title="a"), Paper.objects.create(title="b", status=Status.created(1))
    with pytest.raises(ValueError, match="changed the primary key"):
        run(Paper.objects, "status", save_under_another_key)
    assert (row(other).title, stored(other)) == ("b", Status.created(1))
    assert stored(paper).attempts == 1


def test_task_itself_is_not_saved_as_another_row_whatever_its_status():
    """The returned task would be that other row."""
    paper = Paper.objects.create(title="a")

    def act(paper):
        paper.status = Status.created(5)
        save_as_another(paper)

    with pytest.raises(ValueError, match="changed the primary key"):
        run(Paper.objects, "status", act)
    assert (Paper.objects.get().pk, stored(paper).attempts) == (paper.pk, 1)


def test_copy_with_a_status_of_its_own_is_saved():
    paper = Paper.objects.create(title="a")

    def act(paper):
        other = copy.copy(paper)
        other.pk, other.status = None, Status.created(5)
        other.save()

    run(Paper.objects, "status", act)
    assert stored(paper).state == State.finished
    assert Paper.objects.get(status=Status.created(5)).title == "a"


def test_value_that_does_not_compare_is_written():
    paper = PickyPaper.objects.create(title="array")

    def change(paper):
        paper.title += "s"

    run(PickyPaper.objects, "status", change)
    assert row(paper).title == "arrays"


def test_equal_value_of_another_type_is_written():
    paper = Paper.objects.create(pages=1)

    def change(paper):
        paper.pages = decimal.Decimal(1)
        edit(paper, pages=5)

    run(Paper.objects, "status", change)
    assert row(paper).pages == 1


# The text of a failure in another table than the status


@pytest.mark.parametrize("action", [succeed, raising(Abort()), raising(Cancel())])
def test_error_in_the_table_of_a_child(action):
    task = ReviewedTask.objects.create(verdict="a", error="old")

    def change(task):
        task.verdict = "b"
        action(task)

    run(ReviewedTask.objects, "status", change, error_field="error")
    assert row(task).verdict == "b"
    assert bool(row(task).error) == (action is not succeed)
    assert row(task).error != "old"


@pytest.mark.parametrize("action", [succeed, raising(Abort())])
def test_error_in_the_table_of_a_child_where_nothing_else_changed(action):
    task = ReviewedTask.objects.create(error="old")
    run(ReviewedTask.objects, "status", action, error_field="error")
    assert bool(row(task).error) == (action is not succeed)
    assert row(task).error != "old"


def test_error_in_the_table_of_a_child_is_written_under_the_fence_alone():
    task = ReviewedTask.objects.create(error="old")

    def lose(task):
        Task.objects.filter(pk=task.pk).update(status=Status.canceled(0))
        raise Abort

    run(ReviewedTask.objects, "status", lose, error_field="error")
    assert (stored(task), row(task).error) == (Status.canceled(0), "old")


def test_children_of_the_task_may_be_added():
    paper = Paper.objects.create()

    def attach(paper):
        Attachment.objects.create(paper=paper, name="x")
        paper.title = str(paper.attachments.count())

    run(Paper.objects.prefetch_related("attachments"), "status", attach)
    assert Attachment.objects.filter(paper=paper).exists()
    assert stored(paper).state == State.finished
