"""Inside a transaction of the caller: correct too, as tests of users do that."""

import random
from contextlib import suppress

import pytest
from django.db import DatabaseError, IntegrityError, OperationalError, connection, transaction
from django.db.transaction import TransactionManagementError
from django.test.utils import CaptureQueriesContext

from modelqueue import Abort, Cancel, Retry, State, Status, run
from modelqueue.engines import engine_for
from tests.actions import MILLISECOND, heard, raising, row, stored, succeed, unexpected, write_down
from tests.testapp.models import ExclusiveTask, Ledger, Paper, ShoutingPaper, StampedPaper, Task

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize("model", [Task, StampedPaper])
@pytest.mark.parametrize(
    ("error", "state", "attempts"),
    [
        (None, State.finished, 1),
        (Retry(), State.waiting, 0),
        (Abort(), State.waiting, 1),
        (Cancel(), State.canceled, 1),
        (ValueError(), State.waiting, 1),
        (SystemExit(), State.waiting, 1),
    ],
    ids=repr,
)
def test_outcome_is_recorded(model, error, state, attempts):
    assert connection.in_atomic_block
    task = model.objects.create()
    with suppress(ValueError, SystemExit):
        run(model.objects, "status", raising(error) if error else succeed)
    assert (stored(task).state, stored(task).attempts) == (state, attempts)


def test_expired_task_is_recovered():
    task = Task.objects.create(status=Status.working(0))
    assert run(Task.objects, "status", succeed) == task


@pytest.mark.parametrize("error", [None, Retry(), ValueError()])
def test_what_the_action_wrote_stays(error):
    Task.objects.create()

    def action(task):
        write_down(task)
        if error:
            raise error

    with suppress(ValueError):
        run(Task.objects, "status", action)
    assert Ledger.objects.count() == 1


@pytest.mark.parametrize("error", [None, ValueError("no")], ids=repr)
@pytest.mark.parametrize("model", [Task, StampedPaper])
def test_block_that_the_action_never_left_is_rolled_back_and_the_attempt_failed(model, error):
    """The caller's own block stays as deep as it was, with all that is in it."""
    task = model.objects.create()
    depth = len(connection.savepoint_ids)

    def enter_and_write(task):
        transaction.atomic().__enter__()
        transaction.atomic().__enter__()
        write_down(task)
        if error:
            raise error

    expected = "no" if error else "in the middle of a transaction"
    with transaction.atomic():
        with pytest.raises((TransactionManagementError, ValueError), match=expected):
            run(model.objects, "status", enter_and_write)
        assert len(connection.savepoint_ids) == depth + 1
        assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert not Ledger.objects.exists()
    assert len(connection.savepoint_ids) == depth
    assert stored(task).attempts == 1


def test_deferred_field_that_was_read_in_what_is_rolled_back_is_not_written(unprepared):
    """In between others can edit it."""
    paper = Paper.objects.create(pages=1)

    def act(paper):
        assert paper.pages == 1
        transaction.atomic().__enter__()

    with CaptureQueriesContext(connection) as queries, pytest.raises(TransactionManagementError):
        run(Paper.objects.only("title", "status"), "status", act)
    writes = [query["sql"] for query in queries if "UPDATE " in query["sql"]]
    assert writes
    assert not [sql for sql in writes if "pages" in sql]
    assert stored(paper).attempts == 1


def duplicate(task):
    """Break the transaction, where the database minds."""
    Task.objects.create(pk=task.pk)


def test_database_error_of_the_action_leaves_the_transaction_usable():
    task = Task.objects.create()
    with pytest.raises(IntegrityError):
        run(Task.objects, "status", duplicate)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


def test_database_error_that_the_action_swallowed_fails_the_attempt():
    task = Task.objects.create()

    def swallow(task):
        write_down(task)
        with suppress(IntegrityError):
            duplicate(task)

    with pytest.raises(TransactionManagementError, match="went on after an error of the database"):
        run(Task.objects, "status", swallow)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert not Ledger.objects.exists()


@pytest.mark.django_db(databases=["default", "other"])
def test_error_on_another_database_leaves_its_transaction_usable():
    task = Task.objects.using("other").create()

    def swallow(task):
        with suppress(IntegrityError):
            Task.objects.using("other").create(pk=task.pk)

    with pytest.raises(TransactionManagementError, match="went on after an error of the database"):
        run(Task.objects.using("other"), "status", swallow)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


@pytest.mark.vendor("postgresql")  # where a transaction can not go on after an error
def test_database_error_that_django_did_not_notice_fails_the_attempt():
    task = Task.objects.create()

    def swallow(task):
        write_down(task)
        with suppress(DatabaseError), connection.cursor() as cursor:
            cursor.execute("SELECT nonsense")

    with pytest.raises(DatabaseError, match="current transaction is aborted"):
        run(Task.objects, "status", swallow)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert not Ledger.objects.exists()


def test_database_error_within_a_transaction_of_the_action_is_its_own_affair():
    task = Task.objects.create()

    def swallow(task):
        write_down(task)
        with suppress(IntegrityError), transaction.atomic():
            duplicate(task)

    run(Task.objects, "status", swallow)
    assert stored(task).state == State.finished
    assert Ledger.objects.count() == 1


def test_rollback_that_the_action_asks_for_fails_the_attempt():
    task = Task.objects.create()

    def ask(task):
        write_down(task)
        transaction.set_rollback(True)

    with pytest.raises(TransactionManagementError, match=r"called set_rollback\(True\)"):
        run(Task.objects, "status", ask)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert not Ledger.objects.exists()


def test_changes_that_can_not_be_saved_leave_the_transaction_usable():
    paper = Paper.objects.create(title="a")

    def action(paper):
        write_down(paper)
        paper.pages = None

    with pytest.raises(IntegrityError):
        run(Paper.objects, "status", action)
    assert (stored(paper).attempts, row(paper).title, Ledger.objects.count()) == (1, "a", 1)
    shouting = ShoutingPaper.objects.bulk_create([ShoutingPaper(title="unsavable")])[0]
    with pytest.raises(RuntimeError):
        run(ShoutingPaper.objects, "status", succeed)
    assert ShoutingPaper.objects.get(title=shouting.title).status.attempts == 1


@pytest.mark.db_feature("supports_partial_indexes")
def test_row_that_a_constraint_keeps_from_working_is_passed_over():
    ExclusiveTask.objects.create(group=1, status=Status.working())
    ExclusiveTask.objects.create(group=1, status=Status.waiting(1))
    free = ExclusiveTask.objects.create(group=2, status=Status.waiting(2))
    assert run(ExclusiveTask.objects, "status", succeed) == free


@pytest.mark.django_db(transaction=True)
def test_rollback_of_the_caller_undoes_the_attempt():
    task = Task.objects.create()
    with suppress(KeyError), transaction.atomic():
        run(Task.objects, "status", write_down)
        assert stored(task).state == State.finished
        raise KeyError
    assert stored(task) == task.status
    assert not Ledger.objects.exists()


@pytest.mark.vendor("postgresql", "mysql")  # on SQLite Django's own atomic() commits then
@pytest.mark.django_db(transaction=True)
def test_connection_without_autocommit_is_an_outer_transaction_too():
    task = Task.objects.create()
    transaction.set_autocommit(False)
    try:
        run(Task.objects, "status", write_down)
        assert stored(task).state == State.finished
        assert not connection.get_autocommit()
        transaction.rollback()
        assert stored(task) == task.status
        transaction.rollback()
    finally:
        transaction.set_autocommit(True)
    assert not Ledger.objects.exists()


@pytest.mark.usefixtures("step_by_step")
def test_try_again_is_raised_at_once_since_only_the_caller_can(monkeypatch):
    engine = type(engine_for("default"))
    calls = []

    def refuse(*args):
        calls.append(args)
        raise OperationalError("try again")

    monkeypatch.setattr(engine, "is_try_again", lambda self, error: True)
    monkeypatch.setattr(engine, "_lock", refuse)
    Task.objects.create()
    with pytest.raises(OperationalError, match="try again"):
        run(Task.objects, "status", unexpected)
    assert len(calls) == 1


def test_try_again_while_the_outcome_is_written_is_raised_at_once(monkeypatch):
    engine = type(engine_for("default"))
    calls = []

    def refuse(*args):
        calls.append(args)
        raise OperationalError("try again")

    def action(task):
        monkeypatch.setattr(engine, "is_try_again", lambda self, error: True)
        monkeypatch.setattr(engine, "compare_and_set", refuse)

    Task.objects.create()
    with pytest.raises(OperationalError, match="try again"):
        run(Task.objects, "status", action)
    assert len(calls) == 1


def test_savepoints_of_the_caller_stay():
    with transaction.atomic():
        Task.objects.create()
        with transaction.atomic():
            run(Task.objects, "status", write_down)
        with suppress(KeyError), transaction.atomic():
            run(Task.objects, "status", write_down)
            raise KeyError
    assert Ledger.objects.count() == 1


def test_signals_are_sent_before_the_commit():
    Task.objects.create()
    with heard() as events:
        run(Task.objects, "status", succeed)
    assert [name for name, _ in events] == ["task_claimed", "task_finished"]
    assert connection.in_atomic_block


def test_a_thousand_random_steps():
    """Rows come in and are run with every kind of end; nothing gets lost and no state is impossible."""
    rng = random.Random(2026)
    errors = [None, None, None, Retry, Abort, Cancel, ValueError, SystemExit, KeyboardInterrupt]
    created = 0
    runs = 0

    def action(task):
        assert task.status.state == State.working
        error = rng.choice(errors)
        if error:
            raise error

    steps = 1_000
    for _ in range(steps):
        if rng.random() < 0.3:
            # Some of a worker that died.
            Task.objects.create(**({"status": Status.working(0)} if rng.random() < 0.05 else {}))
            created += 1
        else:
            with suppress(ValueError, SystemExit, KeyboardInterrupt):
                runs += (
                    run(Task.objects, "status", action, timeout=10 * MILLISECOND, delay=MILLISECOND)
                    is not None
                )
    tally = Status.tally(Task.objects, "status")
    assert sum(tally.values()) == Task.objects.count() == created
    assert tally["finished"] > created / 4
    assert tally["canceled"] > created / 20
    assert runs > steps / 3
    while tally["waiting"] + tally["working"]:
        with suppress(ValueError, SystemExit, KeyboardInterrupt):
            run(Task.objects, "status", action, timeout=10 * MILLISECOND, delay=MILLISECOND)
        tally = Status.tally(Task.objects, "status")
    assert tally["finished"] + tally["canceled"] == created
