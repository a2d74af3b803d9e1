"""`atomic=True`: what an action does to the database is committed with its outcome, or not at all."""

import contextlib
import logging
import threading

import pytest
from django.db import DatabaseError, IntegrityError, OperationalError, connection, connections, transaction
from django.db.models import F
from django.db.models.signals import post_save, pre_save
from django.db.transaction import TransactionManagementError
from django.test.utils import CaptureQueriesContext

from modelqueue import Abort, Cancel, Retry, State, Status, attempts, enqueue, run, verbs
from modelqueue.attempts import Attempt
from modelqueue.engines import base, engine_for
from modelqueue.outcomes import Policy
from modelqueue.source import Source
from tests.actions import heard, raising, row, stored, succeed, unexpected, write_down
from tests.processes import wait_until
from tests.testapp.models import (
    Attachment,
    Job,
    Ledger,
    Paper,
    PickyPaper,
    PlainJob,
    PrintJob,
    Project,
    ShoutingPaper,
    StampedPaper,
    Task,
)

pytestmark = pytest.mark.django_db(transaction=True)

# The outcome of the first is one UPDATE, those of the others are written by save().
MODELS = [Paper, StampedPaper, ShoutingPaper]
models = pytest.mark.parametrize("model", MODELS)

ENDINGS = [
    (Retry(), State.waiting, 0, False),
    (Abort(), State.waiting, 1, False),
    (Cancel(), State.canceled, 1, False),
    (ValueError("no"), State.waiting, 1, True),
    (SystemExit(), State.waiting, 1, True),
]


@pytest.fixture
def bystander():
    """Another session, in autocommit."""
    other = connection.copy()
    yield other
    other.close()


def run_atomic(rows, action, **options):
    return run(rows, "status", action, atomic=True, **options)


# What is committed


@models
def test_effects_and_changes_are_committed_with_the_success(model):
    paper = model.objects.create(title="a", pages=1)

    def act(paper):
        write_down(paper)
        paper.title, paper.pages = "b", F("pages") + 1

    with heard("task_claimed", "task_finished") as events:
        returned = run_atomic(model.objects, act)
    assert [(name, facts["status"].state.name) for name, facts in events] == [
        ("task_claimed", "working"),
        ("task_finished", "finished"),
    ]
    assert returned.status == stored(paper)
    assert (stored(paper).state, stored(paper).attempts) == (State.finished, 1)
    assert (row(paper).title, row(paper).pages, returned.pages) == ("b", 2, 2)
    assert Ledger.objects.count() == 1


@models
@pytest.mark.parametrize(("error", "state", "attempts", "is_raised"), ENDINGS)
def test_whatever_is_raised_undoes_everything(model, error, state, attempts, is_raised):
    paper = model.objects.create(title="a", facts={"a": 1})
    returned = []

    def act(paper):
        returned.append(paper)
        write_down(paper)
        paper.title = "b"
        paper.facts["b"] = 2
        paper.save()
        paper.pages = 7
        raise error

    with pytest.raises(type(error)) if is_raised else contextlib.nullcontext():
        run_atomic(model.objects, act, error_field="error")
    assert (stored(paper).state, stored(paper).attempts) == (state, attempts)
    for instance in (row(paper), *returned):
        assert (instance.title, instance.pages, instance.facts) == ("a", 0, {"a": 1})
        assert instance.status == stored(paper)
    assert bool(row(paper).error) == (not isinstance(error, Retry))
    assert not Ledger.objects.exists()
    returned[0].save()
    assert row(paper).title == "a"


@pytest.mark.parametrize("value", [Status.waiting(5), Status.created(), Status.canceled(5, 3)])
@models
def test_assigned_status_is_committed_with_the_effects(model, value):
    paper = model.objects.create()

    def act(paper):
        write_down(paper)
        paper.status = value

    assert run_atomic(model.objects, act).status == value == stored(paper)
    assert Ledger.objects.count() == 1


def test_assigned_nonsense_undoes_everything():
    paper = Paper.objects.create()

    def act(paper):
        write_down(paper)
        paper.status = Status.working(5)

    with pytest.raises(ValueError, match="working"):
        run_atomic(Paper.objects, act)
    assert (stored(paper).state, stored(paper).attempts) == (State.waiting, 1)
    assert not Ledger.objects.exists()


def test_status_that_the_action_saved_is_its_outcome():
    paper = Paper.objects.create()

    def act(paper):
        write_down(paper)
        paper.status = Status.created(7)
        paper.save()

    assert run_atomic(Paper.objects, act).status == stored(paper) == Status.created(7)
    assert Ledger.objects.count() == 1


def test_action_may_delete_its_task():
    Paper.objects.create()

    def act(paper):
        write_down(paper)
        paper.delete()

    with heard("task_finished", "lease_lost") as events:
        run_atomic(Paper.objects, act)
    assert [name for name, _ in events] == ["task_finished"]
    assert (Paper.objects.count(), Ledger.objects.count()) == (0, 1)


def test_task_that_was_deleted_in_vain_comes_back():
    paper = Paper.objects.create(title="a")

    def act(paper):
        paper.delete()
        raise Abort

    returned = run_atomic(Paper.objects, act)
    assert returned == paper
    assert (stored(paper).state, stored(paper).attempts) == (State.waiting, 1)


def test_related_object_that_was_assigned_in_vain_is_forgotten():
    job = Job.objects.create()

    def act(job):
        job.project = job._meta.get_field("project").related_model.objects.create(name="new")
        raise Abort

    assert run_atomic(Job.objects, act).project is None
    assert row(job).project is None


@pytest.mark.parametrize("model", [PrintJob, PlainJob])
def test_inherited_models_and_plain_columns(model):
    job = model.objects.create(status=Status.waiting())

    def act(job):
        job.title = "b"
        write_down(job)

    run_atomic(model.objects, act)
    assert (stored(job).state, row(job).title) == (State.finished, "b")

    model.objects.update(status=Status.waiting())
    Ledger.objects.all().delete()

    def fail(job):
        job.title = "c"
        write_down(job)
        raise Abort

    run_atomic(model.objects, fail)
    assert (stored(job).state, row(job).title, Ledger.objects.count()) == (State.waiting, "b", 0)


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_database_of_the_task_is_that_of_the_transaction():
    task = Task.objects.using("other").create()

    def act(task):
        assert connections["other"].in_atomic_block
        assert not connections["default"].in_atomic_block
        write_down(task)
        raise Abort

    run_atomic(Task.objects.using("other"), act)
    assert stored(task).attempts == 1
    assert not Ledger.objects.using("other").exists()


def test_row_that_can_not_be_loaded_is_a_failed_attempt():
    paper = PickyPaper.objects.create(title="unreadable")
    with pytest.raises(ValueError, match="can not be read"):
        run_atomic(PickyPaper.objects, unexpected)
    assert (stored(paper).state, stored(paper).attempts) == (State.waiting, 1)


@pytest.mark.parametrize("atomic", [None, 1, "yes"])
def test_wrong_kind_of_atomic_is_refused(atomic):
    task = Task.objects.create()
    with pytest.raises(TypeError, match="atomic is True or False, not"):
        run(Task.objects, "status", unexpected, atomic=atomic)
    assert stored(task) == task.status


# Errors of the database


def test_error_of_the_database_that_the_action_swallowed_undoes_everything():
    Task.objects.create()

    def act(task):
        write_down(task)
        with contextlib.suppress(DatabaseError), transaction.atomic(durable=False, savepoint=False):
            Task.objects.create(pk=task.pk)

    with pytest.raises(DatabaseError):
        run_atomic(Task.objects, act)
    assert Task.objects.get().status.attempts == 1
    assert not Ledger.objects.exists()


@pytest.mark.db_feature("can_defer_constraint_checks")
def test_commit_that_fails_is_a_failed_attempt():
    paper = Paper.objects.create(title="a")

    def act(paper):
        write_down(paper)
        paper.title = "b"
        Attachment.objects.create(paper_id=12345)  # checked at the commit

    with pytest.raises(IntegrityError), heard("task_finished", "lease_lost") as events:
        run_atomic(Paper.objects, act)
    assert [(name, facts["outcome"]) for name, facts in events] == [("task_finished", "fail")]
    assert (stored(paper).state, stored(paper).attempts, row(paper).title) == (State.waiting, 1, "a")
    assert not Ledger.objects.exists()


def lose_answer_of_commit(monkeypatch, is_done):
    """Let the connection break while the success is committed, before or after that is done."""
    wrapper = connections["default"]
    commit = wrapper._commit

    def commit_and_lose():
        monkeypatch.setattr(wrapper, "_commit", commit)
        if is_done:
            commit()
        wrapper.connection.close()
        raise OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(wrapper, "_commit", commit_and_lose)


@models
def test_commit_whose_answer_was_lost_counts(model, monkeypatch, caplog):
    paper = model.objects.create(title="a")

    def act(paper):
        write_down(paper)
        paper.title = "b"
        lose_answer_of_commit(monkeypatch, is_done=True)

    with heard("task_finished", "lease_lost") as events:
        returned = run_atomic(model.objects, act)
    assert [(name, facts["outcome"]) for name, facts in events] == [("task_finished", "finish")]
    assert returned.status == stored(paper)
    assert (stored(paper).state, stored(paper).attempts, row(paper).title) == (State.finished, 1, "b")
    assert Ledger.objects.count() == 1
    assert returned.title == row(paper).title
    assert "its commit ended with an error" in caplog.text


@pytest.mark.parametrize("status", [Status.created(7), Status.waiting(0, 1), Status.finished(0)])
def test_commit_whose_answer_was_lost_counts_with_a_status_that_the_action_wrote_by_its_queryset(
    status, monkeypatch
):
    paper = Paper.objects.create()

    def act(paper):
        write_down(paper)
        Paper.objects.filter(pk=paper.pk).update(status=status)
        lose_answer_of_commit(monkeypatch, is_done=True)

    with heard("task_finished", "lease_lost") as events:
        assert run_atomic(Paper.objects, act).status == status
    assert [(name, facts["outcome"]) for name, facts in events] == [("task_finished", "assign")]
    assert stored(paper) == status
    assert Ledger.objects.count() == 1


def test_status_written_by_a_queryset_whose_commit_was_lost_is_gone_with_it(monkeypatch):
    paper = Paper.objects.create()

    def act(paper):
        Paper.objects.filter(pk=paper.pk).update(status=Status.created(7))
        lose_answer_of_commit(monkeypatch, is_done=False)

    with pytest.raises(OperationalError):
        run_atomic(Paper.objects, act)
    assert (stored(paper).state, stored(paper).attempts) == (State.waiting, 1)


@models
def test_commit_that_was_lost_with_its_connection_is_a_failed_attempt(model, monkeypatch):
    paper = model.objects.create(title="a")

    def act(paper):
        write_down(paper)
        paper.title = "b"
        lose_answer_of_commit(monkeypatch, is_done=False)

    with pytest.raises(OperationalError):
        run_atomic(model.objects, act)
    assert (stored(paper).state, stored(paper).attempts, row(paper).title) == (State.waiting, 1, "a")
    assert not Ledger.objects.exists()


@pytest.mark.vendor("postgresql", "mysql")
@models
def test_session_that_ends_during_the_action_is_a_failed_attempt(model, bystander):
    paper = model.objects.create(title="a")

    def act(paper):
        write_down(paper)
        paper.title = "b"
        with connection.cursor() as cursor:
            is_mysql = connection.vendor == "mysql"
            cursor.execute("SELECT connection_id()" if is_mysql else "SELECT pg_backend_pid()")
            [number] = cursor.fetchone()
        with bystander.cursor() as cursor:
            cursor.execute(f"KILL {number}" if is_mysql else f"SELECT pg_terminate_backend({number})")

    with pytest.raises(DatabaseError):
        run_atomic(model.objects, act)
    assert (stored(paper).state, stored(paper).attempts, row(paper).title) == (State.waiting, 1, "a")
    assert not Ledger.objects.exists()


def test_error_of_the_database_that_the_action_swallowed_is_told_in_plain_words():
    task = Task.objects.create()

    def break_by_hand(task):
        write_down(task)
        with contextlib.suppress(DatabaseError), connection.cursor() as cursor:
            cursor.execute("SELECT nonsense FROM nowhere")

    def set_rollback(task):
        write_down(task)
        transaction.set_rollback(True)

    actions = [set_rollback]
    if connection.vendor == "postgresql":  # to the others only the statement has failed
        actions.append(break_by_hand)
    for attempt, act in enumerate(actions, 1):
        with pytest.raises(TransactionManagementError, match="went on after an error of the database, or"):
            run_atomic(Task.objects, act)
        assert (stored(task).state, stored(task).attempts) == (State.waiting, attempt)
    assert not Ledger.objects.exists()


@pytest.mark.parametrize("atomic", [False, True])
def test_error_of_the_database_that_a_save_swallowed_is_no_success(atomic):
    """Django rolls back without a word then, and the row would stay working."""
    paper = Paper.objects.create(title="a")

    def go_on(instance, **options):
        if instance.title == "b":
            with contextlib.suppress(IntegrityError):
                Task.objects.create(pk=taken.pk)

    def act(paper):
        paper.title = "b"

    taken = Task.objects.create()
    post_save.connect(go_on, sender=Paper)
    try:
        with (
            heard("task_finished", "lease_lost") as events,
            pytest.raises(TransactionManagementError, match="went on after an error of the database, or"),
        ):
            run(Paper.objects, "status", act, atomic=atomic)
    finally:
        post_save.disconnect(go_on, sender=Paper)
    assert [(name, facts["outcome"]) for name, facts in events] == [("task_finished", "fail")]
    assert (stored(paper).state, stored(paper).attempts, row(paper).title) == (State.waiting, 1, "a")


# What an action does to its transaction


def enter_atomic():
    transaction.atomic().__enter__()


def enter_atomic_twice():
    enter_atomic()
    transaction.atomic(savepoint=False).__enter__()


def enter_and_break():
    enter_atomic()
    transaction.set_rollback(True)


def enter_and_close():
    enter_atomic()
    connection.close()


def reconnect():
    connection.close()
    connection.connect()


def leave_atomic():
    connection.atomic_blocks[-1].__exit__(None, None, None)


def leave_and_enter():
    leave_atomic()
    enter_atomic()


def others_see(task):
    """The status that is committed."""
    seen = []

    def look():
        try:
            seen.append(stored(task))
        finally:
            connection.close()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(60)
    return seen[0]


@models
@pytest.mark.parametrize("begin", [enter_atomic, enter_atomic_twice, enter_and_break])
def test_atomic_that_is_never_left_is_a_failed_attempt(model, begin):
    paper = model.objects.create(title="a")

    def act(paper):
        begin()
        if begin is not enter_and_break:
            write_down(paper)
        paper.title = "b"

    with (
        heard("task_finished", "lease_lost") as events,
        pytest.raises(TransactionManagementError, match="returned in the middle of a transaction, which was"),
    ):
        run_atomic(model.objects, act)
    assert [(name, facts["outcome"]) for name, facts in events] == [("task_finished", "fail")]
    assert not connection.in_atomic_block
    assert connection.get_autocommit()
    assert (others_see(paper).state, others_see(paper).attempts) == (State.waiting, 1)
    assert (row(paper).title, Ledger.objects.count()) == ("a", 0)
    run_atomic(model.objects, write_down)
    assert others_see(paper).state == State.finished
    assert Ledger.objects.count() == 1


def test_atomic_that_a_save_never_left_is_a_failed_attempt(monkeypatch):
    paper = ShoutingPaper.objects.create(title="a")
    save = ShoutingPaper.save

    def save_and_enter(self, *args, **options):
        monkeypatch.undo()
        enter_atomic()
        save(self, *args, **options)

    def act(paper):
        write_down(paper)
        paper.title = "b"
        monkeypatch.setattr(ShoutingPaper, "save", save_and_enter)

    with pytest.raises(
        TransactionManagementError, match="The action returned in the middle of a transaction"
    ):
        run_atomic(ShoutingPaper.objects, act)
    assert not connection.in_atomic_block
    assert (others_see(paper).state, others_see(paper).attempts) == (State.waiting, 1)
    assert (row(paper).title, Ledger.objects.count()) == ("a", 0)


def test_error_within_an_atomic_that_is_never_left_is_the_error_that_is_raised():
    task = Task.objects.create()

    def act(task):
        enter_atomic()
        write_down(task)
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_atomic(Task.objects, act)
    assert not connection.in_atomic_block
    assert (others_see(task).state, others_see(task).attempts) == (State.waiting, 1)
    assert not Ledger.objects.exists()


ENDED = [connection.close, enter_and_close, reconnect, leave_atomic, leave_and_enter]


@pytest.mark.parametrize(
    "end", ENDED, ids=["close", "enter and close", "reconnect", "leave", "leave and enter"]
)
def test_transaction_that_the_action_ended_is_a_failed_attempt(end):
    paper = Paper.objects.create(title="a")

    def act(paper):
        write_down(paper)
        end()
        paper.title = "b"

    with pytest.raises(TransactionManagementError, match="closed its connection, or left the transaction"):
        run_atomic(Paper.objects, act)
    assert not connection.in_atomic_block
    assert connection.get_autocommit()
    assert (others_see(paper).state, others_see(paper).attempts) == (State.waiting, 1)
    assert row(paper).title == "a"
    run_atomic(Paper.objects, write_down)
    assert others_see(paper).state == State.finished


@pytest.mark.django_db
@pytest.mark.parametrize("begin", [enter_atomic, enter_atomic_twice, enter_and_break])
def test_atomic_that_is_never_left_spoils_no_transaction_of_the_caller(begin):
    paper = Paper.objects.create(title="a")

    def act(paper):
        write_down(paper)
        begin()

    with transaction.atomic():
        depth = len(connection.savepoint_ids)
        with pytest.raises(TransactionManagementError, match="returned in the middle of a transaction"):
            run_atomic(Paper.objects, act)
        assert len(connection.savepoint_ids) == depth
        assert (stored(paper).state, stored(paper).attempts) == (State.waiting, 1)
        run_atomic(Paper.objects, succeed)
    assert (stored(paper).state, stored(paper).attempts) == (State.finished, 2)
    assert not Ledger.objects.exists()


def test_action_that_ends_the_transaction_can_not_finish_what_is_not_its_own(vendor):
    """After its ROLLBACK somebody else takes the row, if each statement is a transaction of its own then."""
    task = Task.objects.create()

    def act(task):
        with connection.cursor() as cursor:
            cursor.execute("ROLLBACK")
        Task.objects.update(status=Status.created(5))

    with heard("task_finished", "lease_lost") as events, contextlib.suppress(DatabaseError):
        run_atomic(Task.objects, act)
    told = [(name, facts["outcome"]) for name, facts in events]
    # The drivers of the servers begin another transaction, in which the row is only this action's.
    expected = {
        "sqlite": [("lease_lost", "fail")],
        "postgresql": [("task_finished", "assign")],
        "mysql": [("task_finished", "fail")],
    }
    assert told == expected[vendor]
    assert (stored(task) == Status.created(5)) == (vendor != "mysql")
    assert stored(task).state != State.finished


# Hooks of the commit


@pytest.mark.parametrize("error", [RuntimeError("no"), OperationalError("no")])
def test_hook_that_fails_is_logged_and_no_attempt(error, caplog):
    paper = Paper.objects.create()
    ran = []

    def fail():
        ran.append(stored(paper).state)
        raise error

    def act(paper):
        write_down(paper)
        transaction.on_commit(fail)

    with heard("task_finished", "lease_lost") as events:
        assert run_atomic(Paper.objects, act).status == stored(paper)
    assert [(name, facts["outcome"]) for name, facts in events] == [("task_finished", "finish")]
    assert ran == [State.finished]
    assert (stored(paper).attempts, Ledger.objects.count()) == (1, 1)
    assert "its commit ended with an error" in caplog.text


def test_interruption_in_a_hook_goes_on_after_the_outcome_is_told():
    paper = Paper.objects.create()

    def leave():
        raise KeyboardInterrupt

    with heard("task_finished") as events, pytest.raises(KeyboardInterrupt):
        run_atomic(Paper.objects, lambda paper: transaction.on_commit(leave))
    assert [facts["outcome"] for _, facts in events] == ["finish"]
    assert stored(paper).state == State.finished


def raise_runtime_error():
    raise RuntimeError("no")


@models
def test_task_keeps_what_was_committed_although_a_hook_failed(model):
    paper = model.objects.create(title="a", facts={"a": 1})

    def act(paper):
        paper.title = "b"
        paper.facts["b"] = 2
        transaction.on_commit(raise_runtime_error)

    returned = run_atomic(model.objects, act)
    assert (returned.title, returned.facts) == (row(paper).title, row(paper).facts) == ("b", {"a": 1, "b": 2})
    returned.pages = 5
    returned.save()
    assert (row(paper).title, row(paper).facts, row(paper).pages) == ("b", {"a": 1, "b": 2}, 5)
    assert stored(paper).state == State.finished


def test_what_was_saved_before_a_hook_failed_is_not_to_be_saved_again():
    job = Job.objects.create()

    def act(job):
        transaction.on_commit(raise_runtime_error)
        job.review_status = Status.waiting(5)
        job.save()

    returned = run_atomic(Job.objects, act)
    Job.objects.update(review_status=Status.finished(6), status=Status.created(7))
    returned.save()
    assert (row(job).review_status, stored(job)) == (Status.finished(6), Status.created(7))


def test_hook_may_enqueue_the_task_before_it_fails():
    task = Task.objects.create()

    def act(task):
        def enqueue_and_fail():
            enqueue(Task.objects.filter(pk=task.pk), "status")
            raise_runtime_error()

        transaction.on_commit(enqueue_and_fail)

    with heard("task_finished", "lease_lost") as events:
        run_atomic(Task.objects, act)
    assert [(name, facts["outcome"]) for name, facts in events] == [("task_finished", "finish")]
    assert stored(task).state == State.waiting


@pytest.fixture
def status_of_new():
    """What a receiver of pre_save makes the status of a paper with the title "new"."""
    status = Status.waiting(7)

    def assign(instance, **options):
        if instance.title == "new":
            instance.status = status

    pre_save.connect(assign, sender=Paper)
    yield status
    pre_save.disconnect(assign, sender=Paper)


@pytest.mark.parametrize("ending", ["hook", "answer"])
def test_status_of_a_pre_save_was_committed_although_the_commit_ended_with_an_error(
    ending, status_of_new, monkeypatch
):
    paper = Paper.objects.create(title="old")

    def act(paper):
        paper.title = "new"
        if ending == "hook":
            transaction.on_commit(raise_runtime_error)
        else:
            lose_answer_of_commit(monkeypatch, is_done=True)

    with heard("task_finished", "lease_lost") as events:
        returned = run_atomic(Paper.objects, act)
    assert [(name, facts["status"]) for name, facts in events] == [("task_finished", status_of_new)]
    assert returned.status == stored(paper) == status_of_new
    assert returned.title == row(paper).title == "new"


@pytest.mark.parametrize("ending", ["hook", "answer"])
def test_task_that_was_deleted_is_finished_although_the_commit_ended_with_an_error(ending, monkeypatch):
    Paper.objects.create()

    def act(paper):
        paper.delete()
        if ending == "hook":
            transaction.on_commit(raise_runtime_error)
        else:
            lose_answer_of_commit(monkeypatch, is_done=True)

    with heard("task_finished", "lease_lost") as events:
        assert run_atomic(Paper.objects, act).pk is None
    assert [(name, facts["outcome"]) for name, facts in events] == [("task_finished", "finish")]
    assert not Paper.objects.exists()


def test_related_object_is_kept_when_the_answer_of_the_commit_was_lost(monkeypatch):
    job = Job.objects.create()
    related = []

    def act(job):
        related.append(Job._meta.get_field("project").related_model.objects.create(name="new"))
        job.project = related[0]
        lose_answer_of_commit(monkeypatch, is_done=True)

    returned = run_atomic(Job.objects, act)
    assert returned.project is related[0]
    assert row(job).project == related[0]


@pytest.mark.parametrize(
    "begin", [enter_atomic, lambda: transaction.set_autocommit(False)], ids=["atomic", "off"]
)
def test_transaction_that_a_hook_left_open_is_rolled_back(begin, caplog):
    paper = Paper.objects.create(title="a")

    def begin_and_write():
        begin()
        write_down(paper)

    def act(paper):
        paper.title = "b"
        transaction.on_commit(begin_and_write)

    with heard("task_finished", "lease_lost") as events:
        returned = run_atomic(Paper.objects, act)
    assert [(name, facts["outcome"]) for name, facts in events] == [("task_finished", "finish")]
    assert (returned.title, row(paper).title, others_see(paper).state) == ("b", "b", State.finished)
    assert not connection.in_atomic_block
    assert connection.get_autocommit()
    assert not Ledger.objects.exists()
    assert "A hook of the commit returned in the middle of a transaction" in caplog.text


def test_hook_of_an_attempt_that_was_undone_is_not_called():
    Task.objects.create()

    def act(task):
        transaction.on_commit(unexpected)
        raise Abort

    assert run_atomic(Task.objects, act).status.attempts == 1


# The lock


def take_away(monkeypatch, status):
    """Somebody changes the row after it is claimed and before it is locked."""
    hold = attempts.AtomicAttempt.hold

    def change_and_hold(self):
        type(self.task).objects.filter(pk=self.task.pk).update(status=status)
        return hold(self)

    monkeypatch.setattr(attempts.AtomicAttempt, "hold", change_and_hold)


def test_action_does_not_begin_on_a_task_that_was_taken_away(monkeypatch, caplog):
    task = Task.objects.create()
    take_away(monkeypatch, Status.canceled(5))
    with heard("task_finished", "lease_lost") as events:
        returned = run_atomic(Task.objects, unexpected)
    assert [(name, facts["outcome"], facts["status"]) for name, facts in events] == [
        ("lease_lost", "release", Status.canceled(5))
    ]
    assert returned.status == stored(task) == Status.canceled(5)
    assert "lease lost, the task was taken away before its action began" in caplog.text
    assert "longer than the timeout" not in caplog.text


def test_lock_that_the_database_refuses_costs_no_attempt(monkeypatch):
    task = Task.objects.create()
    calls = []

    def refuse(self, *args):
        calls.append(args)
        raise OperationalError("out of memory")

    monkeypatch.setattr(base.Engine, "hold", refuse)
    with pytest.raises(OperationalError, match="out of memory"):
        run_atomic(Task.objects, unexpected)
    assert len(calls) == 1
    assert stored(task) == task.status


def test_connection_that_is_lost_when_the_transaction_begins_is_replaced(monkeypatch):
    Task.objects.create()
    hold, held = attempts.AtomicAttempt.hold, []

    def lose(self):
        held.append(self)
        if len(held) == 1:
            connection.close()
            raise OperationalError("server closed the connection unexpectedly")
        return hold(self)

    monkeypatch.setattr(attempts.AtomicAttempt, "hold", lose)
    assert run_atomic(Task.objects, write_down).status.state == State.finished
    assert (len(held), Ledger.objects.count()) == (2, 1)


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_recovery_passes_over_a_task_whose_transaction_is_open(caplog):
    caplog.set_level(logging.DEBUG, "modelqueue")
    task = Task.objects.create()
    recovered = []

    def recover():
        try:
            source = Source.of(Task.objects, "status")
            recovered.append(verbs.recover(source, Policy(timeout=0 * Policy().timeout)))
        finally:
            connection.close()

    def act(task):
        thread = threading.Thread(target=recover)
        thread.start()
        thread.join(60)

    run_atomic(Task.objects, act)
    assert recovered == [0]
    assert stored(task).state == State.finished
    assert "1 expired tasks are passed over" in caplog.text


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_admin_action_passes_over_a_task_whose_transaction_is_open_and_says_so(admin_client):
    jobs = [Job.objects.create() for _ in range(3)]
    pages = []

    def cancel():
        try:
            chosen = {"action": "make_status_state_canceled", "_selected_action": [job.pk for job in jobs]}
            pages.append(admin_client.post("/admin/testapp/job/", chosen, follow=True))
        finally:
            connection.close()

    def act(job):
        thread = threading.Thread(target=cancel)
        thread.start()
        thread.join(60)

    run_atomic(Job.objects, act)
    [message] = map(str, pages[0].context["messages"])
    assert message == (
        "Change status state to canceled: 2 changed. 1 left alone, as a transaction works on them. "
        "Try again when it has ended."
    )
    assert [stored(job).state.name for job in jobs] == ["finished", "canceled", "canceled"]


@pytest.mark.vendor("postgresql")
def test_child_rows_may_be_added_while_the_transaction_is_open(bystander):
    Paper.objects.create()

    def act(paper):
        with bystander.cursor() as cursor:
            cursor.execute("SET lock_timeout = '5s'")
            cursor.execute(f"INSERT INTO testapp_attachment (paper_id, name) VALUES ({paper.pk}, '')")

    run_atomic(Paper.objects, act)
    assert Attachment.objects.count() == 1


def test_edit_of_others_waits_for_the_end_and_comes_after_it():
    paper = Paper.objects.create(title="a")
    edited = []

    def edit():
        try:
            edited.append(Paper.objects.filter(pk=paper.pk).update(title="c", status=Status.created(5)))
        finally:
            connection.close()

    thread = threading.Thread(target=edit)

    def act(paper):
        thread.start()
        thread.join(0.3)  # as long as it would take if nothing held it up
        paper.title = "b"

    run_atomic(Paper.objects, act)
    thread.join(60)
    assert edited == [1]
    assert (row(paper).title, stored(paper)) == ("c", Status.created(5))


@pytest.mark.vendor("sqlite")
def test_database_that_is_busy_when_the_transaction_begins_is_waited_for(monkeypatch):
    monkeypatch.setitem(connection.settings_dict["OPTIONS"], "timeout", 0.05)
    connection.close()
    writer = connections["default"].copy()
    writer.settings_dict = {**writer.settings_dict, "OPTIONS": {"timeout": 20}}
    writer.inc_thread_sharing()
    Task.objects.create()
    held = []
    hold = attempts.AtomicAttempt.hold

    def let_go():
        wait_until(lambda: len(held) > 1)
        writer.rollback()

    def hold_while_busy(self):
        if not held:
            with writer.cursor() as cursor:
                cursor.execute("BEGIN IMMEDIATE")
            thread.start()
        held.append(1)
        return hold(self)

    thread = threading.Thread(target=let_go)
    monkeypatch.setattr(attempts.AtomicAttempt, "hold", hold_while_busy)
    assert run_atomic(Task.objects, write_down).status.state == State.finished
    thread.join()
    writer.close()
    connection.close()
    assert len(held) > 1
    assert Ledger.objects.count() == 1


# Within a transaction of the caller


@pytest.mark.django_db
@pytest.mark.parametrize(("error", "state", "attempts", "is_raised"), ENDINGS)
def test_within_a_transaction_of_the_caller_it_is_a_savepoint(error, state, attempts, is_raised):
    paper = Paper.objects.create(title="a")

    def act(paper):
        write_down(paper)
        paper.title = "b"
        raise error

    with transaction.atomic():
        with pytest.raises(type(error)) if is_raised else contextlib.nullcontext():
            run_atomic(Paper.objects, act)
        Paper.objects.create(status=Status.created())
        run_atomic(Task.objects, succeed)
    assert (stored(paper).state, stored(paper).attempts, row(paper).title) == (state, attempts, "a")
    assert not Ledger.objects.exists()


@pytest.mark.django_db
def test_success_within_a_transaction_of_the_caller():
    paper = Paper.objects.create(title="a")
    with transaction.atomic():
        run_atomic(Paper.objects, write_down)
    assert (stored(paper).state, Ledger.objects.count()) == (State.finished, 1)


def test_without_it_what_the_action_did_before_it_failed_stays():
    paper = Paper.objects.create()

    def act(paper):
        write_down(paper)
        raise Abort

    run(Paper.objects, "status", act)
    assert (stored(paper).attempts, Ledger.objects.count()) == (1, 1)


def test_try_again_error_of_its_commit_is_an_ordinary_failure(monkeypatch):
    """The action can not be done a second time within an attempt."""
    task = Task.objects.create()
    ran = []
    monkeypatch.setattr(
        type(engine_for("default")), "is_try_again", lambda self, error: "deadlock" in str(error)
    )
    succeed_once = attempts.AtomicAttempt.succeed

    def deadlock(self, *arguments):
        succeed_once(self, *arguments)
        raise OperationalError("deadlock")

    monkeypatch.setattr(attempts.AtomicAttempt, "succeed", deadlock)
    with pytest.raises(OperationalError, match="deadlock"):
        run_atomic(Task.objects, ran.append)
    assert len(ran) == 1
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


def test_failure_that_can_not_be_recorded_is_raised(monkeypatch):
    task = Task.objects.create()

    def refuse(self, outcome):
        raise KeyError

    monkeypatch.setattr(Attempt, "write_or_fail", refuse)
    with pytest.raises(KeyError):
        run_atomic(Task.objects, raising(Abort()))
    assert stored(task).state == State.working  # until its lease runs out


# Deferred fields and related objects


@models
def test_assigned_deferred_field_is_rolled_back_and_deferred_again(model):
    paper = model.objects.create(title="a", pages=1)

    def act(paper):
        paper.pages = 9
        raise Cancel

    returned = run_atomic(model.objects.only("title", "status"), act)
    assert (row(paper).pages, stored(paper).state) == (1, State.canceled)
    assert "pages" in returned.get_deferred_fields()
    assert returned.pages == 1


def test_deferred_field_that_was_read_is_not_written_after_the_rollback(bystander, unprepared):
    """In between others can edit it."""
    paper = Paper.objects.create(pages=1)

    def act(paper):
        assert paper.pages == 1
        raise Cancel

    with CaptureQueriesContext(connection) as queries:
        run_atomic(Paper.objects.only("title", "status"), act)
    assert not [query for query in queries if query["sql"].startswith("UPDATE") and "pages" in query["sql"]]
    assert stored(paper).state == State.canceled


def test_related_object_that_was_rolled_back_is_forgotten():
    task = Job.objects.create()

    def act(job):
        project = Project(name="new")
        job.project = project
        project.save()
        raise Retry

    returned = run_atomic(Job.objects, act)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 0)
    assert (returned.project, returned.project_id) == (None, None)
    assert not Project.objects.exists()


def test_related_object_that_was_loaded_with_the_task_stays(django_assert_num_queries):
    Job.objects.create(project=Project.objects.create(name="a"))
    returned = run_atomic(Job.objects.select_related("project"), raising(Retry()))
    with django_assert_num_queries(0):
        assert returned.project.name == "a"


# What the action does to its own row by other ways than its instance


def by_delete(paper):
    Paper.objects.filter(pk=paper.pk).delete()


def test_row_that_the_action_deleted_by_its_queryset_is_gone_with_what_it_wrote():
    paper = Paper.objects.create(title="a")

    def act(paper):
        write_down(paper)
        by_delete(paper)

    with heard("task_finished", "lease_lost") as events:
        run_atomic(Paper.objects, act)
    assert [(name, facts["outcome"]) for name, facts in events] == [("task_finished", "finish")]
    assert not Paper.objects.exists()
    assert Ledger.objects.filter(task=paper.pk).count() == 1


def test_row_that_goes_with_what_it_belongs_to_is_gone():
    job = Job.objects.create(project=Project.objects.create())

    def act(job):
        write_down(job)
        job.project.delete()

    run_atomic(Job.objects, act)
    assert not Job.objects.exists()
    assert Ledger.objects.filter(task=job.pk).count() == 1


@pytest.mark.parametrize(
    "status", [Status.canceled(), Status.created(7), Status.waiting(0, 1), Status.finished(0)]
)
def test_status_that_the_action_wrote_by_its_queryset_stands_with_what_it_changed(status):
    paper = Paper.objects.create(title="a")

    def act(paper):
        write_down(paper)
        Paper.objects.filter(pk=paper.pk).update(status=status)
        paper.title = "b"

    with heard("task_finished", "lease_lost") as events:
        assert run_atomic(Paper.objects, act).status == status
    assert [(name, facts["outcome"]) for name, facts in events] == [("task_finished", "assign")]
    assert (stored(paper), row(paper).title) == (status, "b")
    assert Ledger.objects.count() == 1


@pytest.mark.parametrize("status", [Status.working(5), 7])
def test_status_that_nobody_may_leave_is_a_failed_attempt_also_when_written_by_a_queryset(status):
    paper = Paper.objects.create()

    def act(paper):
        write_down(paper)
        Paper.objects.filter(pk=paper.pk).update(status=status)

    with pytest.raises(ValueError, match="as the status of its task"):
        run_atomic(Paper.objects, act)
    assert (stored(paper).state, stored(paper).attempts) == (State.waiting, 1)
    assert not Ledger.objects.exists()


# What only the database knows


def test_transaction_that_a_raw_statement_ended_is_no_success():
    task = Task.objects.create()

    def act(task):
        with connection.cursor() as cursor:
            cursor.execute("ROLLBACK")

    with pytest.raises(TransactionManagementError, match="left the transaction that it ran in"):
        run_atomic(Task.objects, act)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


@pytest.mark.vendor("mysql")
def test_deadlock_that_the_action_swallowed_is_no_success(bystander):
    """It has rolled back all that the action wrote before; whatever came afterwards was on its own."""
    task = Task.objects.create()
    first, second = Ledger.objects.create(task=-1), Ledger.objects.create(task=-2)
    heavy = Job.objects.bulk_create([Job() for _ in range(100)])
    codes = []

    def touch(other, ledger):
        with other.cursor() as cursor:
            cursor.execute("UPDATE testapp_ledger SET worker = 'x' WHERE id = %s", [ledger.pk])

    bystander.inc_thread_sharing()
    bystander.set_autocommit(False)
    with bystander.cursor() as cursor:  # who has changed more rows is not the victim
        cursor.execute("UPDATE testapp_job SET title = 'x' WHERE id >= %s", [heavy[0].pk])
    touch(bystander, second)
    session = bystander.connection.thread_id()

    def act(task):
        write_down(task)
        touch(connection, first)
        waiting = threading.Thread(target=touch, args=[bystander, first])
        waiting.start()
        wait_until(lambda: waits_for_lock(session))
        try:
            touch(connection, second)
        except OperationalError as error:
            codes.append(error.args[0])
        waiting.join()
        write_down(task)

    try:
        with pytest.raises(TransactionManagementError, match="left the transaction that it ran in"):
            run_atomic(Task.objects, act)
    finally:
        bystander.rollback()
        bystander.set_autocommit(True)
        bystander.dec_thread_sharing()
    assert codes == [1213]
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert not Ledger.objects.filter(task=task.pk).exists()


def waits_for_lock(session):
    """Say whether a session of MariaDB waits for a lock."""
    with contextlib.closing(connection.copy()) as watcher, watcher.cursor() as cursor:
        cursor.execute(
            "SELECT COUNT(*) FROM information_schema.innodb_trx "
            "WHERE trx_mysql_thread_id = %s AND trx_state = 'LOCK WAIT'",
            [session],
        )
        return cursor.fetchone()[0]
