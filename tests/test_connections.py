"""Connections that an action closes, breaks or misuses; errors that the database wants tried again."""

import sqlite3
import time

import pytest
from django.db import IntegrityError, InterfaceError, OperationalError, connection, connections, transaction
from django.db.models import F
from django.db.transaction import TransactionManagementError

from modelqueue import Abort, State, Status, attempts, run, verbs
from modelqueue.attempts import Attempt
from modelqueue.engines import base, engine_for, full_since, sessions
from modelqueue.engines.mysql import MySQLEngine
from modelqueue.engines.postgresql import PostgreSQLEngine
from modelqueue.engines.sqlite import SQLiteEngine
from modelqueue.outcomes import Policy
from modelqueue.source import Source
from tests.actions import heard, raising, row, stored, succeed, unexpected, write_down
from tests.faults.harm import end_session
from tests.faults.points import fault
from tests.pace import within
from tests.processes import wait_until
from tests.testapp.models import Job, Ledger, Paper, PickyField, PickyPaper, ShoutingPaper, StampedPaper, Task

pytestmark = pytest.mark.django_db(transaction=True)

MODELS = [Paper, StampedPaper, ShoutingPaper]


@pytest.fixture
def other_session():
    """A second connection to the same database."""
    other = connection.copy()
    yield other
    other.close()


# What an action does to its connection


def test_action_may_close_the_connection():
    task = Task.objects.create()
    run(Task.objects, "status", lambda task: connection.close())
    assert stored(task).state == State.finished


def test_action_may_close_all_connections_and_fail():
    task = Task.objects.create()

    def action(task):
        connections.close_all()
        raise Abort

    run(Task.objects, "status", action)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


def begin():
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")


def enter_atomic():
    transaction.atomic().__enter__()


def enter_atomic_twice():
    enter_atomic()
    enter_atomic()


def switch_autocommit_off():
    transaction.set_autocommit(False)


def close_within_atomic():
    enter_atomic()
    connection.close()


def break_within_atomic():
    enter_atomic()
    transaction.set_rollback(True)


UNFINISHED = [begin, enter_atomic, enter_atomic_twice, switch_autocommit_off, break_within_atomic]
unfinished = pytest.mark.parametrize("begin", UNFINISHED)


@unfinished
@pytest.mark.parametrize("model", [Task, StampedPaper])
def test_transaction_that_the_action_left_open_is_rolled_back_and_the_attempt_failed(model, begin):
    task = model.objects.create()

    def action(task):
        begin()
        if begin is not break_within_atomic:
            write_down(task)

    with pytest.raises(
        TransactionManagementError, match="returned in the middle of a transaction, which was roll"
    ):
        run(model.objects, "status", action)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert not Ledger.objects.exists()
    assert connection.get_autocommit()
    assert not connection.in_atomic_block
    assert run(model.objects, "status", write_down) == task
    assert Ledger.objects.count() == 1


@pytest.mark.parametrize("begin", [begin, enter_atomic, switch_autocommit_off])
def test_what_the_action_saved_in_a_transaction_that_it_left_open_is_saved_with_the_outcome(begin):
    paper = Paper.objects.create(title="a")

    def action(paper):
        begin()
        paper.title = "b"
        paper.status = Status.created()
        paper.save()

    with pytest.raises(TransactionManagementError, match="returned in the middle of a transaction"):
        run(Paper.objects, "status", action)
    assert (stored(paper).state, stored(paper).attempts, row(paper).title) == (State.waiting, 1, "b")


@unfinished
def test_error_in_the_middle_of_a_transaction_is_the_error_that_is_raised(begin):
    task = Task.objects.create()

    def action(task):
        begin()
        raise KeyError("x")

    with pytest.raises(KeyError):
        run(Task.objects, "status", action)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert connection.get_autocommit()


def test_connection_that_was_closed_within_a_transaction_is_opened_again():
    task = Task.objects.create()
    with pytest.raises(TransactionManagementError, match="returned in the middle of a transaction"):
        run(Task.objects, "status", lambda task: close_within_atomic())
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert run(Task.objects, "status", succeed) == task


@pytest.mark.vendor("postgresql")  # where a transaction can not go on after an error
def test_transaction_that_an_error_has_broken_is_rolled_back():
    task = Task.objects.create()

    def action(task):
        begin()
        with pytest.raises(IntegrityError):
            Task.objects.create(pk=task.pk)

    with pytest.raises(TransactionManagementError, match="returned in the middle of a transaction"):
        run(Task.objects, "status", action)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


def test_error_of_the_database_in_the_action_is_an_ordinary_failure():
    task = Task.objects.create()
    with pytest.raises(IntegrityError):
        run(Task.objects, "status", lambda task: Task.objects.create(pk=task.pk))
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert connection.get_autocommit()


def test_error_that_the_action_caught_is_its_own_affair():
    task = Task.objects.create()

    def action(task):
        with pytest.raises(IntegrityError):
            Task.objects.create(pk=task.pk)

    run(Task.objects, "status", action)
    assert stored(task).state == State.finished


def test_action_may_use_transactions():
    task = Task.objects.create()

    def action(task):
        with transaction.atomic():
            write_down(task)
        transaction.set_autocommit(False)
        write_down(task)
        transaction.commit()
        transaction.set_autocommit(True)

    run(Task.objects, "status", action)
    assert stored(task).state == State.finished
    assert Ledger.objects.count() == 2


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_other_connections_are_left_alone():
    task = Task.objects.create()
    run(Task.objects, "status", lambda task: transaction.atomic(using="other").__enter__())
    assert stored(task).state == State.finished
    assert connections["other"].in_atomic_block
    connections["other"].close()
    connections["other"].connect()


# Connections that the server ends


servers = pytest.mark.vendor("postgresql", "mysql")


@servers
@pytest.mark.parametrize("model", MODELS)
def test_session_that_ended_during_the_action_costs_nothing(model, other_session):
    task = model.objects.create()

    def action(task):
        task.title = "b"
        end_session(connection, other_session)

    run(model.objects, "status", action)
    assert (stored(task).state, stored(task).attempts, row(task).title) == (State.finished, 1, "b")


@servers
@pytest.mark.parametrize("swallow", [True, False])
def test_session_that_ended_under_a_query_of_the_action(swallow, other_session):
    task = Task.objects.create()

    def action(task):
        end_session(connection, other_session)
        try:
            write_down(task)
        except (OperationalError, InterfaceError):
            if not swallow:
                raise

    if swallow:
        run(Task.objects, "status", action)
        assert stored(task).state == State.finished
    else:
        with pytest.raises((OperationalError, InterfaceError)):
            run(Task.objects, "status", action)
        assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert Task.objects.count() == 1


@servers
def test_session_that_ended_within_a_transaction_of_the_action(other_session):
    task = Task.objects.create()

    def action(task):
        with transaction.atomic():
            write_down(task)
            end_session(connection, other_session)
            write_down(task)

    with pytest.raises((OperationalError, InterfaceError)):
        run(Task.objects, "status", action)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert not Ledger.objects.exists()


@servers
@pytest.mark.parametrize("begin", [switch_autocommit_off, enter_atomic])
def test_session_that_ended_within_a_transaction_that_the_action_left_open(begin, other_session):
    """What the action wrote is gone, so its return is no success."""
    task = Task.objects.create()

    def action(task):
        begin()
        write_down(task)
        end_session(connection, other_session)

    with pytest.raises(TransactionManagementError, match="returned in the middle of a transaction"):
        run(Task.objects, "status", action)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert not Ledger.objects.exists()


@servers
def test_after_an_error_of_the_connection_the_next_call_opens_another(other_session):
    task = Task.objects.create()
    end_session(connection, other_session)
    with pytest.raises((OperationalError, InterfaceError)):
        run(Task.objects, "status", unexpected)
    assert run(Task.objects, "status", succeed) == task


@pytest.mark.usefixtures("step_by_step")
@servers
def test_after_an_error_of_the_connection_within_a_claim_the_next_call_opens_another(
    other_session, monkeypatch
):
    task = Task.objects.create()
    engine = type(engine_for("default"))
    load = engine._load

    def end_and_load(self, source, rows):
        end_session(connection, other_session)
        return load(self, source, rows)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_load", end_and_load)
        with pytest.raises((OperationalError, InterfaceError)):
            run(Task.objects, "status", unexpected)
    assert stored(task) == task.status
    assert run(Task.objects, "status", succeed) == task


@servers
def test_error_of_the_connection_within_a_recovery_is_no_fault_of_a_row(other_session, monkeypatch, caplog):
    Task.objects.bulk_create([Task(status=Status.working(0)) for _ in range(3)])
    lock = engine_class()._lock

    def end_and_lock(*args, **options):
        end_session(connection, other_session)
        return lock(*args, **options)

    source = Source.of(Task.objects, "status")
    with monkeypatch.context() as patch:
        patch.setattr(engine_class(), "_lock", end_and_lock)
        with pytest.raises((OperationalError, InterfaceError)):
            verbs.recover(source, Policy())
    assert "can not be recovered" not in caplog.text
    assert verbs.recover(source, Policy()) == 3


@pytest.mark.usefixtures("step_by_step")
@servers
def test_error_of_the_connection_is_not_taken_for_a_row_that_can_not_be_loaded(other_session, monkeypatch):
    paper = PickyPaper.objects.create(title="unreadable")
    load_one = engine_class()._load_one

    def end_and_load(*args):
        end_session(connection, other_session)
        return load_one(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine_class(), "_load_one", end_and_load)
        with pytest.raises((OperationalError, InterfaceError)):
            run(PickyPaper.objects, "status", unexpected)
    assert stored(paper) == paper.status
    with pytest.raises(ValueError, match="can not be read"):
        run(PickyPaper.objects, "status", unexpected)


def lose_answer(monkeypatch, method, count=1):
    """Let the answer to a write of the outcome be lost: it is done, and then the connection breaks."""
    write = getattr(Attempt, method)
    lost = []

    def write_and_lose(self, *args):
        result = write(self, *args)
        if len(lost) < count:
            lost.append(result)
            connection.close()
            raise OperationalError("server closed the connection unexpectedly")
        return result

    monkeypatch.setattr(Attempt, method, write_and_lose)
    return lost


@pytest.mark.parametrize(("model", "method"), [(Paper, "write_status"), (StampedPaper, "write_task")])
def test_answer_that_was_lost_is_asked_for(model, method, monkeypatch, caplog):
    task = model.objects.create()
    lost = lose_answer(monkeypatch, method)
    with heard("task_finished", "lease_lost") as events:
        returned = run(model.objects, "status", succeed)
    assert lost == [True]
    assert (stored(task).state, stored(task).attempts) == (State.finished, 1)
    assert returned.status == stored(task)
    assert [(name, event["status"]) for name, event in events] == [("task_finished", stored(task))]
    assert "lease lost" not in caplog.text


def test_what_became_of_a_lost_task_is_asked_again(monkeypatch):
    other = Task.objects.create(status=Status.created(1))
    task = Task.objects.create()
    read, lost = base.Engine.read, []

    def lose(self, source, candidate):
        if not lost:
            lost.append(candidate)
            connection.close()
            raise OperationalError("server closed the connection unexpectedly")
        return read(self, source, candidate)

    def take_away(task):
        Task.objects.filter(pk=task.pk).update(status=Status.canceled(5))

    monkeypatch.setattr(base.Engine, "read", lose)
    with heard("task_finished", "lease_lost") as events:
        run(Task.objects, "status", take_away)
    assert [(name, event["status"]) for name, event in events] == [("lease_lost", Status.canceled(5))]
    assert (stored(other), stored(task)) == (other.status, Status.canceled(5))


def test_database_that_does_not_come_back_raises_in_the_end(monkeypatch):
    monkeypatch.setattr(sessions.Session, "patience", 0.2)
    task = Task.objects.create()
    lose_answer(monkeypatch, "write_status", count=1_000_000)
    with pytest.raises(OperationalError, match="server closed the connection"):
        run(Task.objects, "status", succeed)
    assert stored(task).state == State.finished  # as it happens


# Errors that the database wants tried again


class TryAgain(OperationalError):  # noqa: N818
    pass


@pytest.fixture
def asks_again(monkeypatch):
    """Every engine takes `TryAgain` for an error after which the same may be tried again."""
    for engine in (type(engine_for("default")), base.Engine):
        known = engine.is_try_again
        monkeypatch.setattr(
            engine,
            "is_try_again",
            lambda self, error, known=known: isinstance(error, TryAgain) or known(self, error),
        )


def fail_first(monkeypatch, owner, name, times, after=False):
    """Let a function raise `TryAgain` at its first calls, before or after it has done its work."""
    original = getattr(owner, name)
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) > times:
            return original(*args, **kwargs)
        if after:
            original(*args, **kwargs)
        raise TryAgain("deadlock")

    monkeypatch.setattr(owner, name, wrapped)
    return calls


def engine_class():
    return type(engine_for("default"))


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.usefixtures("asks_again")
@pytest.mark.parametrize("step", ["_read_page", "_lock", "_load", "compare_and_set"])
def test_each_step_of_a_claim_is_tried_again(step, monkeypatch):
    task = Task.objects.create()
    calls = fail_first(monkeypatch, engine_class(), step, 3)
    assert run(Task.objects, "status", succeed) == task
    assert len(calls) > 3
    assert (stored(task).state, stored(task).attempts) == (State.finished, 1)


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.usefixtures("asks_again")
def test_row_that_can_not_be_loaded_is_not_blamed_for_a_deadlock(monkeypatch):
    paper = PickyPaper.objects.create(title="unreadable")
    errors = [ValueError("the row"), TryAgain("deadlock"), TryAgain("deadlock")]

    def refuse(self, value, *args):
        raise errors.pop(0) if errors else ValueError("the row")

    monkeypatch.setattr(PickyField, "from_db_value", refuse)
    with pytest.raises(ValueError, match="the row"):
        run(PickyPaper.objects, "status", unexpected)
    assert errors == []
    assert (stored(paper).state, stored(paper).attempts) == (State.waiting, 1)


@pytest.mark.usefixtures("asks_again")
@pytest.mark.parametrize("step", ["_read_page", "_lock", "compare_and_set"])
def test_each_step_of_a_recovery_is_tried_again(step, monkeypatch):
    Task.objects.bulk_create([Task(status=Status.working(0)) for _ in range(3)])
    fail_first(monkeypatch, engine_class(), step, 3)
    assert verbs.recover(Source.of(Task.objects, "status"), Policy()) == 3
    assert {task.status.attempts for task in Task.objects.all()} == {1}


@pytest.mark.usefixtures("asks_again")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("after", [False, True])
def test_outcome_is_tried_again(model, after, monkeypatch):
    task = model.objects.create(pages=1, title="a")

    def action(task):
        task.pages = F("pages") + 10
        task.title = "b"
        # From here on it is the outcome that is written.
        fail_first(monkeypatch, engine_class(), "compare_and_set", 2, after)

    returned = run(model.objects, "status", action)
    assert (stored(task).state, stored(task).attempts) == (State.finished, 1)
    assert (row(task).pages, row(task).title) == (returned.pages, returned.title) == (11, "b")


@pytest.mark.usefixtures("asks_again")
def test_outcome_that_was_rolled_back_is_computed_anew(monkeypatch):
    """What was rolled back after the save counts for nothing: an F() is applied to the value of then."""
    job = Job.objects.create(title="a", review_status=None)
    paper = Paper.objects.create(pages=1)
    save = attempts.save_merged

    def save_and_fail(*args):
        save(*args)
        monkeypatch.setattr(attempts, "save_merged", edit_and_save)
        raise TryAgain("could not serialize")

    def edit_and_save(*args):
        Paper.objects.update(pages=100)
        save(*args)

    def count(paper):
        paper.pages = F("pages") + 10

    monkeypatch.setattr(attempts, "save_merged", save_and_fail)
    assert run(Paper.objects, "status", count).pages == 110
    assert row(paper).pages == 110

    def enqueue_next(job):
        job.review_status = Status.waiting(5)

    monkeypatch.setattr(attempts, "save_merged", save_and_fail)
    run(Job.objects, "status", enqueue_next)
    assert row(job).review_status == Status.waiting(5)


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.usefixtures("asks_again")
def test_error_to_be_tried_again_is_raised_in_the_end(monkeypatch):
    monkeypatch.setattr(sessions.Session, "patience", 0.2)
    task = Task.objects.create()
    calls = fail_first(monkeypatch, engine_class(), "_lock", 1_000_000)
    before = time.monotonic()
    with pytest.raises(TryAgain):
        run(Task.objects, "status", unexpected)
    assert 0.2 <= time.monotonic() - before < within(5)
    assert len(calls) > 3
    assert stored(task) == task.status


@pytest.mark.usefixtures("asks_again")
def test_outcome_that_can_not_be_written_for_long_is_no_failure_of_the_action(monkeypatch):
    monkeypatch.setattr(sessions.Session, "patience", 0.1)
    task = Task.objects.create()

    def action(task):
        fail_first(monkeypatch, engine_class(), "compare_and_set", 1_000_000)

    with pytest.raises(TryAgain):
        run(Task.objects, "status", action)
    assert stored(task).state == State.working  # until its lease runs out


@pytest.mark.usefixtures("asks_again")
def test_try_again_error_of_the_action_is_an_ordinary_failure():
    task = Task.objects.create()
    calls = []

    def action(task):
        calls.append(task)
        raise TryAgain("deadlock")

    with pytest.raises(TryAgain):
        run(Task.objects, "status", action)
    assert len(calls) == 1
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


@pytest.mark.usefixtures("step_by_step")
def test_other_error_of_the_database_is_raised_at_once(monkeypatch):
    Task.objects.create()
    calls = []

    def refuse(*args):
        calls.append(args)
        raise OperationalError("disk full")

    monkeypatch.setattr(engine_class(), "_lock", refuse)
    with pytest.raises(OperationalError, match="disk full"):
        run(Task.objects, "status", unexpected)
    assert len(calls) == 2  # all candidates together, then one by one


# Which errors are to be tried again


def locked_by_another(other):
    """Lock the row, or on SQLite the database, in another session; return how to let go."""
    other.set_autocommit(False)
    with other.cursor() as cursor:
        if other.vendor == "sqlite":
            cursor.execute("BEGIN IMMEDIATE")
        else:
            cursor.execute("SELECT id FROM testapp_task FOR UPDATE")
            cursor.fetchall()


def test_lock_of_somebody_else_is_an_error_to_be_tried_again(other_session):
    task = Task.objects.create()
    locked_by_another(other_session)
    with connection.cursor() as cursor:
        cursor.execute(
            {
                "sqlite": "PRAGMA busy_timeout = 10",
                "postgresql": "SET lock_timeout = '10ms'",
                "mysql": "SET innodb_lock_wait_timeout = 1",
            }[connection.vendor]
        )
    try:
        with pytest.raises(OperationalError) as caught:
            Task.objects.filter(pk=task.pk).update(data="x")
        assert engine_for("default").is_try_again(caught.value)
        assert not base.Engine("default").is_try_again(caught.value)
    finally:
        other_session.rollback()
        other_session.close()
        connection.close()


def test_other_errors_are_not_tried_again():
    engine = engine_for("default")
    assert not engine.is_try_again(OperationalError("disk full"))
    assert not engine.is_try_again(OperationalError())
    with pytest.raises(Exception) as caught, connection.cursor() as cursor:  # noqa: PT011
        cursor.execute("SELECT nonsense")
    assert not engine.is_try_again(caught.value)


@pytest.mark.vendor("sqlite")
@pytest.mark.parametrize(("text", "is_busy"), [("database is locked", True), ("disk I/O error", False)])
def test_busy_sqlite_is_known_by_its_text_where_there_is_no_code(text, is_busy):
    error = OperationalError(text)
    error.__cause__ = sqlite3.OperationalError(text)  # as on Python 3.10
    assert engine_for("default").is_try_again(error) == is_busy


@pytest.mark.parametrize(
    ("code", "is_busy"),
    [
        (5, True),
        (5 | 1 << 8, True),
        (5 | 2 << 8, True),
        (6, True),
        (6 | 1 << 8, True),
        (1, False),
        (8, False),
    ],
)
def test_busy_sqlite_is_known_by_its_primary_code(code, is_busy):
    error = OperationalError("no")
    error.__cause__ = sqlite3.OperationalError("no")
    error.__cause__.sqlite_errorcode = code
    assert SQLiteEngine("default").is_try_again(error) == is_busy


@pytest.mark.parametrize(
    ("code", "again"), [("40001", True), ("40P01", True), ("55P03", True), ("57014", False), (None, False)]
)
def test_codes_of_postgresql_that_mean_try_again(code, again):
    error, cause = OperationalError(), Exception()
    cause.sqlstate = code
    error.__cause__ = cause
    assert PostgreSQLEngine("default").is_try_again(error) == again


@pytest.mark.parametrize(
    ("code", "again"),
    [(1020, True), (1180, True), (1205, True), (1213, True), (2006, False), ("deadlock", False)],
)
def test_codes_of_mysql_that_mean_try_again(code, again):
    assert MySQLEngine("default").is_try_again(OperationalError(code, "no")) == again


def test_codes_of_galera(monkeypatch):
    engine = MySQLEngine("default")
    overruled, not_prepared = OperationalError(1213, "no"), OperationalError(1047, "no")
    assert engine.is_away(not_prepared)
    assert not engine.is_away(overruled)
    for is_of_cluster in (True, False):
        monkeypatch.setattr(engine, "is_of_cluster", lambda answer=is_of_cluster: answer)
        assert engine.is_overruled(overruled) == is_of_cluster
        assert not engine.is_overruled(not_prepared)


def test_server_that_says_that_it_is_away_is_left_and_tried_again(monkeypatch):
    """Another one may be there the next time, and the session with it may not have been set up in full."""
    engine = engine_for("default")
    sessions = []

    def work():
        sessions.append(connection.connection)
        if len(sessions) == 1:
            raise OperationalError("not yet prepared")
        return "done"

    monkeypatch.setattr(type(engine), "is_away", lambda self, error: True)
    assert engine.patiently(work, reconnect=True) == "done"
    assert sessions[0] is not sessions[1]
    sessions.clear()
    with pytest.raises(OperationalError):
        engine.patiently(work)
    assert connection.connection is None
    assert engine.meets_everybody(OperationalError())


@pytest.mark.vendor("postgresql")
def test_error_of_psycopg_2_is_known_by_its_code():
    error, cause = OperationalError(), Exception()
    cause.pgcode = "40P01"
    error.__cause__ = cause
    assert engine_for("default").is_try_again(error)


# A full disk


@pytest.mark.parametrize(("code", "is_full"), [(13, True), (13 | 1 << 8, True), (5, False), (10, False)])
def test_full_disk_of_sqlite_is_known_by_its_primary_code(code, is_full):
    error = OperationalError("no")
    error.__cause__ = sqlite3.OperationalError("no")
    error.__cause__.sqlite_errorcode = code
    assert SQLiteEngine("default").is_full(error) == is_full


@pytest.mark.parametrize(("code", "is_full"), [("53100", True), ("53200", False), (None, False)])
def test_code_of_postgresql_that_means_a_full_disk(code, is_full):
    error, cause = OperationalError(), Exception()
    cause.sqlstate = code
    error.__cause__ = cause
    assert PostgreSQLEngine("default").is_full(error) == is_full


@pytest.mark.parametrize(("code", "is_full"), [(1021, True), (1114, True), (1213, False)])
def test_codes_of_mysql_that_mean_a_full_disk(code, is_full):
    assert MySQLEngine("default").is_full(OperationalError(code, "no")) == is_full


#: Makes a table that is full after some rows, for this session. (One of PostgreSQL is full with its disk.)
FULL_SOON = {
    "sqlite": ["CREATE TEMPORARY TABLE full_soon (text TEXT)", "PRAGMA temp.max_page_count = 10"],
    "mysql": [
        "SET max_heap_table_size = 16384",
        "CREATE TEMPORARY TABLE full_soon (text VARCHAR(5000)) ENGINE = MEMORY",
    ],
}


def fill(vendor):
    with connection.cursor() as cursor:
        for statement in FULL_SOON[vendor]:
            cursor.execute(statement)
        for _ in range(200):
            cursor.execute("INSERT INTO full_soon VALUES (%s)", ["x" * 5000])


@pytest.mark.vendor("sqlite", "mysql")
def test_full_database_is_known(vendor):
    try:
        with pytest.raises(OperationalError) as caught:
            fill(vendor)
        assert engine_for("default").is_full(caught.value)
        assert not base.Engine("default").is_full(caught.value)
    finally:
        connection.close()


@pytest.fixture
def full(monkeypatch):
    """Return what a fault point does when the disk of the database is full."""
    monkeypatch.setattr(type(engine_for("default")), "is_full", lambda self, error: "full" in str(error))

    def refuse(_):
        raise OperationalError("the disk is full")

    return refuse


def test_claim_on_a_full_disk_is_not_tried_in_another_way(full):
    Task.objects.create()
    with fault("claim", "before the statement", full), pytest.raises(OperationalError):
        run(Task.objects, "status", succeed)
    assert Task.objects.get().status.state == State.waiting


def test_outcome_that_finds_no_room_is_no_fault_of_its_attempt(full):
    task = Task.objects.create()
    with fault("outcome", "before the statement", full), pytest.raises(OperationalError, match="full"):
        run(Task.objects, "status", succeed)
    assert (stored(task).state, stored(task).attempts) == (State.working, 0)


def test_recovery_on_a_full_disk_does_not_go_on_row_by_row(full, caplog):
    tasks = [Task.objects.create(status=Status.working(5)) for _ in range(2)]
    with fault("recovery", "before the statement", full), pytest.raises(OperationalError, match="full"):
        run(Task.objects, "status", succeed)
    assert {stored(task).state for task in tasks} == {State.working}
    assert "can not be recovered" not in caplog.text


def test_databases_are_known_whose_disk_was_full_lately(full):
    began = time.monotonic()
    assert full_since(began) == []
    Task.objects.create()
    with fault("claim", "before the statement", full), pytest.raises(OperationalError):
        run(Task.objects, "status", succeed)
    assert full_since(began) == ["default"]
    assert full_since(time.monotonic()) == []


# Locks of others


def test_busy_database_does_not_reach_the_caller(other_session):
    """Somebody holds the write lock (SQLite) or the row for longer than the database itself waits."""
    task = Task.objects.create()
    with connection.cursor() as cursor:
        if connection.vendor == "sqlite":
            cursor.execute("PRAGMA busy_timeout = 1")
    locked_by_another(other_session)
    returned = []
    waits = []

    def let_go():
        waits.append(1)
        if len(waits) == 5:
            other_session.rollback()

    engine = engine_class()
    note = engine.note_contention
    try:
        if connection.vendor == "sqlite":
            engine.note_contention = lambda self: (let_go(), note(self))
            returned.append(run(Task.objects, "status", succeed))
            assert len(waits) >= 5
        else:
            assert run(Task.objects, "status", unexpected) is None
            other_session.rollback()
            returned.append(run(Task.objects, "status", succeed))
    finally:
        engine.note_contention = note
        other_session.rollback()
        other_session.close()
        connection.close()
    assert returned == [task]


def test_contention_makes_workers_pause(vendor, monkeypatch):
    pauses = []
    monkeypatch.setattr("modelqueue.engines.sqlite.time.sleep", pauses.append)
    engine = engine_for("default")
    engine.note_contention()
    engine.give_way()
    assert len(pauses) == (vendor == "sqlite")
    assert all(0.001 <= pause <= 0.005 for pause in pauses)


# The portable engine


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.vendor("mysql")
def test_transaction_of_ours_is_read_committed_whatever_the_options_say(monkeypatch):
    """Under REPEATABLE READ a claim locks the gaps between the rows, and nobody can insert a task there."""
    levels = []

    def level_of_this_transaction(self, source, rows):
        levels.extend(wait_until(find_level))  # its answer may be 0.1 s old
        return load(self, source, rows)

    def find_level():
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT trx_isolation_level FROM information_schema.innodb_trx"
                " WHERE trx_mysql_thread_id = connection_id()"
            )
            return cursor.fetchone()

    load = engine_class()._load
    Task.objects.create()
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    monkeypatch.setattr(connection, "isolation_level", "repeatable read")
    monkeypatch.setattr(engine_class(), "_load", level_of_this_transaction)
    run(Task.objects, "status", succeed)
    connection.close()
    assert levels == ["READ COMMITTED"]


@pytest.mark.vendor("mysql")
def test_transaction_left_open_on_mysql_is_rolled_back(monkeypatch):
    """MySQL does not say whether there is one."""
    task = Task.objects.create()
    monkeypatch.setattr(connections["default"], "mysql_is_mariadb", False)

    def action(task):
        begin()
        write_down(task)

    run(Task.objects, "status", action)
    assert stored(task).state == State.finished
    assert not Ledger.objects.exists()


@servers
def test_connection_that_can_not_even_be_closed_is_thrown_away(monkeypatch):
    task = Task.objects.create()

    def action(task):
        enter_atomic()
        monkeypatch.setattr(connection, "close", refuse_to_close)

    def refuse_to_close():
        monkeypatch.undo()
        raise OperationalError("server closed the connection unexpectedly")

    with pytest.raises(TransactionManagementError):
        run(Task.objects, "status", action)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


@pytest.fixture
def portable(monkeypatch):
    """What a database gets that has no engine of its own and no SKIP LOCKED."""
    monkeypatch.setattr("modelqueue.engines._ENGINES", {})
    monkeypatch.setattr(connection.features, "has_select_for_update_skip_locked", False)
    assert type(engine_for("default")) is base.Engine


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("model", [Task, StampedPaper])
def test_portable_engine_runs_tasks(model):
    tasks = [model.objects.create() for _ in range(3)]
    assert [run(model.objects, "status", succeed) for _ in range(4)] == [*tasks, None]
    expired = model.objects.create(status=Status.working(0))
    assert run(model.objects, "status", raising(Abort())) == expired
    assert stored(expired).attempts == 2


@pytest.mark.usefixtures("portable")
def test_portable_engine_restores_a_connection():
    task = Task.objects.create()

    def action(task):
        with connection.cursor() as cursor:
            cursor.execute("BEGIN")
        write_down(task)

    run(Task.objects, "status", action)
    assert stored(task).state == State.finished
    assert not Ledger.objects.exists()  # rolled back, though it can not tell that there was something


@pytest.mark.usefixtures("portable")
def test_portable_engine_takes_no_row_that_another_was_faster_to_take(monkeypatch):
    Task.objects.create(status=Status.waiting(0))
    second = Task.objects.create()
    compare_and_set = base.Engine.compare_and_set

    def overtaken(self, source, candidate, old, new, **others):
        monkeypatch.setattr(base.Engine, "compare_and_set", compare_and_set)
        Task.objects.filter(pk=candidate.pk).update(status=Status.working(7))
        return compare_and_set(self, source, candidate, old, new, **others)

    monkeypatch.setattr(base.Engine, "compare_and_set", overtaken)
    assert run(Task.objects, "status", succeed) == second
    assert Task.objects.get(pk=second.pk - 1).status == Status.working(7)


@pytest.mark.usefixtures("portable")
def test_portable_engine_recovers_no_row_that_another_was_faster_to_recover(monkeypatch):
    tasks = Task.objects.bulk_create([Task(status=Status.working(0)) for _ in range(3)])
    lock = base.Engine._lock

    def lock_and_lose(*args, **options):
        locked = lock(*args, **options)
        Task.objects.filter(pk=tasks[1].pk).update(status=Status.waiting(7, 1))
        return locked

    monkeypatch.setattr(base.Engine, "_lock", lock_and_lose)
    assert verbs.recover(Source.of(Task.objects, "status"), Policy()) == 2
    assert stored(tasks[1]) == Status.waiting(7, 1)


@pytest.mark.vendor("sqlite")
def test_claim_at_once_takes_no_row_that_has_changed_under_its_lock(monkeypatch, settings):
    """A lock is no proof: the UPDATE compares."""
    settings.MODELQUEUE = {"ENGINE": "auto"}
    tasks = Task.objects.bulk_create([Task(status=Status.waiting(number)) for number in range(3)])
    taken = Status.working(7)
    step_by_step, repeated = base.Engine._claim_step_by_step, []

    def repeat(*arguments):
        repeated.append(stored(tasks[1]))
        return step_by_step(*arguments)

    def interfere(execute, sql, params, many, context):
        if sql.startswith("UPDATE") and "%% 10" in sql:
            with connection.cursor() as cursor:
                cursor.execute("UPDATE testapp_task SET status = %s WHERE id = %s", [int(taken), tasks[1].pk])
        return execute(sql, params, many, context)

    monkeypatch.setattr(base.Engine, "_claim_step_by_step", repeat)
    with connection.execute_wrapper(interfere):
        claims = verbs.claim(Source.of(Task.objects, "status"), 3)
    assert repeated == [tasks[1].status]  # all of it was rolled back, also what stands for the other node
    assert [stored(claim.task) for claim in claims] == [claim.lease for claim in claims] != []


# A lock that somebody holds for too long


SHORT_WAIT = {
    "sqlite": "PRAGMA busy_timeout = 50",
    "postgresql": "SET lock_timeout = '50ms'",
    "mysql": "SET SESSION innodb_lock_wait_timeout = 1",
}


@pytest.fixture(params=[False, True], ids=["status only", "changes"])
def change(request):
    """Whether an action changes more than the status."""
    return request.param


@pytest.fixture
def act(change, other_session, vendor):
    """An action whose row another session locks until it rolls back; nobody waits for that for long."""

    def act(paper):
        if change:
            paper.title = "changed"
        with connection.cursor() as cursor:
            cursor.execute(SHORT_WAIT[vendor])
        other_session.set_autocommit(False)
        with other_session.cursor() as cursor:
            cursor.execute("UPDATE testapp_paper SET pages = 5")

    yield act
    other_session.rollback()
    other_session.set_autocommit(True)
    connection.close()


def test_success_that_can_not_be_written_for_a_lock_is_no_failure(act, other_session, monkeypatch):
    """Who is in the way is not the fault of the task. It is taken back when its lease runs out."""
    monkeypatch.setattr(sessions.Session, "patience", 0.2)
    paper = Paper.objects.create()
    without_changes = Attempt.without_changes

    def free_and_fail(*arguments):
        other_session.rollback()
        return without_changes(*arguments)

    monkeypatch.setattr(Attempt, "without_changes", free_and_fail)
    with heard() as events, pytest.raises(OperationalError):
        run(Paper.objects, "status", act, retry=0)
    other_session.rollback()
    assert (stored(paper).state, row(paper).title) == (State.working, "")
    assert [name for name, _ in events] == ["task_claimed"]


def test_one_long_wait_for_a_lock_is_not_the_last_try(change, act, other_session, monkeypatch):
    """MySQL and MariaDB let a statement wait for 50 s: all patience is gone then, and the lock free."""
    monkeypatch.setattr(sessions.Session, "patience", 0.01)
    paper, waits = Paper.objects.create(), []

    def free_when_it_was_too_long(engine, error):
        waits.append(str(error))
        other_session.rollback()
        return is_try_again(engine, error)

    is_try_again = engine_class().is_try_again
    monkeypatch.setattr(engine_class(), "is_try_again", free_when_it_was_too_long)
    run(Paper.objects, "status", act)
    assert (stored(paper).state, row(paper).title) == (State.finished, "changed" * change)
    assert len(waits) == 1


def test_database_without_an_engine_of_its_own_trusts_what_django_knows_of_a_transaction():
    engine = base.Engine("default")
    with transaction.atomic():
        assert engine.is_at(engine.mark())


def test_attempt_that_can_not_begin_has_failed(monkeypatch):
    """Ctrl-C in that moment, for example, when nothing of the instance is remembered yet."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(attempts, "Snapshot", interrupt)
    for atomic in (False, True):
        task = Task.objects.create()
        with pytest.raises(KeyboardInterrupt):
            run(Task.objects.filter(pk=task.pk), "status", unexpected, atomic=atomic)
        assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


def test_transaction_that_was_left_open_before_the_action_began_is_an_error_too():
    Task.objects.create()
    source = Source.of(Task.objects, "status")
    (claim,) = verbs.claim(source)
    error = Attempt(source, Policy(), claim).error_of_left_open(None)
    assert isinstance(error, TransactionManagementError)


def test_failure_to_save_of_a_task_that_somebody_has_taken_meanwhile_is_dropped(monkeypatch):
    paper = ShoutingPaper.objects.create()
    without_changes = Attempt.without_changes

    def lose_it(self, outcome, error):
        ShoutingPaper.objects.update(status=Status.canceled(5))
        return without_changes(self, outcome, error)

    monkeypatch.setattr(Attempt, "without_changes", lose_it)

    def change(paper):
        paper.title = "x"

    monkeypatch.setattr(ShoutingPaper, "save", raising(ValueError("no")))
    with heard("lease_lost", "task_finished") as events, pytest.raises(ValueError, match="no"):
        run(ShoutingPaper.objects, "status", change)
    assert [(name, facts["outcome"]) for name, facts in events] == [("lease_lost", "fail")]
    assert stored(paper) == Status.canceled(5)
