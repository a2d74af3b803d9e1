"""What holds in a Galera cluster, where no node sees the locks of another.

One server stands for it here: what another session does is what comes from another node. Real nodes are in
`tests/worker/test_galera.py`.
"""

import contextlib
import datetime as dt

import pytest
from django.db import OperationalError, connection

import modelqueue
from modelqueue import State, Status, attempts, run, verbs
from modelqueue.engines import Renewal, engine_for
from modelqueue.source import Source
from tests.actions import heard, row, stored, write_down
from tests.testapp.models import Ledger, Paper, Task

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.vendor("mysql")]

LEASE = dt.timedelta(seconds=30)


class Overruled(OperationalError):  # noqa: N818
    """What a node says whose transaction another one has overtaken."""


@pytest.fixture(autouse=True)
def _cluster(monkeypatch):
    engine = type(engine_for("default"))
    monkeypatch.setattr(engine, "is_of_cluster", lambda self: True)
    monkeypatch.setattr(engine, "is_overruled", lambda self, error: isinstance(error, Overruled))


@pytest.fixture
def bystander():
    """Another session, in autocommit."""
    other = connection.copy()
    yield other
    other.close()


def ask(session, sql, *params):
    with session.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchone()


def run_atomic(rows, action, **options):
    return run(rows, "status", action, atomic=True, **options)


def overruling(monkeypatch, times):
    """Let the first so many commits of an atomic action fail, as another node was faster."""
    succeed = attempts.AtomicAttempt.succeed
    left = [times]

    def fail(self, *arguments):
        success = succeed(self, *arguments)
        left[0] -= 1
        if left[0] >= 0:
            raise Overruled("Deadlock found")
        return success

    monkeypatch.setattr(attempts.AtomicAttempt, "succeed", fail)


def test_lease_of_an_atomic_action_is_renewed_as_others_do_not_see_its_lock(declare, bystander):
    task = Task.objects.create()
    seen = []

    def look():
        (status,) = ask(bystander, "SELECT status FROM testapp_task WHERE id = %s", task.pk)
        seen.append(status)

    def act(task):
        write_down(task)
        look()
        assert modelqueue.current().renew()
        look()

    declare(Task, "status", lease=LEASE, atomic=True)(act).run()
    assert State.working == Status(seen[0]).state
    assert seen[0] < seen[1]
    assert (stored(task).state, stored(task).attempts) == (State.finished, 1)


def test_atomic_action_whose_transaction_was_overruled_is_begun_once_more_and_not_charged(monkeypatch):
    paper = Paper.objects.create(title="a")
    titles = []

    def act(paper):
        titles.append(paper.title)
        paper.title += "b"
        write_down(paper)

    overruling(monkeypatch, 2)
    with heard("task_claimed", "task_finished") as events:
        run_atomic(Paper.objects, act, retry=0)
    assert titles == ["a"] * 3
    assert (row(paper).title, stored(paper).state, stored(paper).attempts) == ("ab", State.finished, 1)
    assert Ledger.objects.count() == 1
    assert [name for name, _ in events] == ["task_claimed", "task_finished"]


def test_atomic_action_that_is_overruled_for_too_long_has_failed(monkeypatch):
    task = Task.objects.create()
    monkeypatch.setattr(type(engine_for("default")), "patience", -1.0)
    overruling(monkeypatch, 1)
    with pytest.raises(Overruled):
        run_atomic(Task.objects, write_down)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert not Ledger.objects.exists()


def test_atomic_action_is_not_begun_once_more_where_the_task_was_taken_meanwhile():
    task = Task.objects.create()
    ran = []

    def act(task):
        ran.append(task)
        cancel_elsewhere(task)
        raise Overruled("Deadlock found")

    with heard("task_finished", "lease_lost") as events:
        run_atomic(Task.objects, act)
    assert [name for name, _ in events] == ["lease_lost"]
    assert len(ran) == 1
    assert stored(task).state == State.canceled


def cancel_elsewhere(task):
    """Do so by another session, which has committed it when this returns."""
    with contextlib.closing(connection.copy()) as other, other.cursor() as cursor:
        status = int(Status.combine(State.canceled, 1, 0))
        cursor.execute("UPDATE testapp_task SET status = %s WHERE id = %s", [status, task.pk])


def test_atomic_action_whose_task_is_canceled_meanwhile_has_no_effect():
    task = Task.objects.create()

    def act(task):
        write_down(task)
        cancel_elsewhere(task)

    with heard("task_finished", "lease_lost") as events:
        run_atomic(Task.objects, act)
    assert [name for name, _ in events] == ["lease_lost"]
    assert stored(task).state == State.canceled
    assert not Ledger.objects.exists()


def test_atomic_action_may_decide_on_its_own_row_by_a_queryset():
    kept, deleted = Task.objects.create(), Task.objects.create()

    def act(task):
        write_down(task)
        if task.pk == kept.pk:
            verbs.cancel(Task.objects.filter(pk=task.pk), "status")
        else:
            Task.objects.filter(pk=task.pk).delete()

    with heard("lease_lost") as events:
        for _ in range(2):
            run_atomic(Task.objects, act)
    assert events == []
    assert [stored(task) and stored(task).state for task in (kept, deleted)] == [State.canceled, None]
    assert Ledger.objects.count() == 2


class LateNode:
    """A node that sees a claim only after it was waited for."""

    def __init__(self, monkeypatch, name, unseen):
        engine = type(engine_for("default"))
        known = getattr(engine, name)
        self.is_late = True

        def late(engine, *arguments, **keywords):
            return unseen if self.is_late else known(engine, *arguments, **keywords)

        def catch_up(engine):
            self.is_late = False
            return True

        monkeypatch.setattr(engine, name, late)
        monkeypatch.setattr(engine, "catch_up", catch_up)


def test_outcome_is_written_on_a_node_that_does_not_see_the_claim_yet(monkeypatch):
    task = Task.objects.create()

    def act(task):
        LateNode(monkeypatch, "compare_and_set", False)

    with heard("lease_lost") as events:
        run(Task.objects, "status", act)
    assert (stored(task).state, events) == (State.finished, [])


def test_atomic_action_is_begun_on_a_node_that_does_not_see_the_claim_yet(monkeypatch):
    task = Task.objects.create()
    LateNode(monkeypatch, "read", (True, task.status))
    run_atomic(Task.objects, write_down)
    assert (stored(task).state, Ledger.objects.count()) == (State.finished, 1)


def test_renewal_on_a_node_that_does_not_see_the_claim_yet(monkeypatch):
    Task.objects.create()
    source = Source.of(Task.objects, "status")
    (claim,) = verbs.claim(source)
    leases = {claim.row.key: {claim.lease}}
    LateNode(monkeypatch, "renew", Renewal(set(), set(), {claim.row.key}))
    assert verbs.renew(source, leases) == ({claim.row.key}, set(), set())


def test_catching_up_leaves_the_session_as_it_was():
    engine = engine_for("default")
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION wsrep_sync_wait = 4")
        assert engine.catch_up()
        cursor.execute("SELECT @@SESSION.wsrep_sync_wait")
        assert cursor.fetchone() == (4,)
        cursor.execute("SET SESSION wsrep_sync_wait = 0")
