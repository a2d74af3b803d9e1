"""The leases of running tasks are kept alive, and a renewal and an outcome never cross."""

import asyncio
import datetime as dt
import logging
import threading
import time
from contextlib import suppress

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import DatabaseError, OperationalError, connection, connections, transaction
from django.test.utils import CaptureQueriesContext

import modelqueue
from modelqueue import State, Status, leases, verbs
from modelqueue.engines import Engine, engine_for
from modelqueue.leases import Keeper
from tests.actions import SECOND, heard, stored
from tests.faults.harm import end_session
from tests.processes import wait_until
from tests.testapp.models import Errand, Paper, Task
from tests.testapp.queues import do_errand

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Renew a lease of 3 s each tenth of a second."""
    monkeypatch.setattr(leases, "_SHARE", 30)
    monkeypatch.setattr(leases, "_SOON", 0.1)


def see_renewed(task):
    """Wait, as an action, until the lease of the task has been renewed twice."""
    for _ in range(2):
        before = stored(task)
        wait_until(lambda before=before: stored(task) > before)


def test_lease_is_renewed_while_the_action_runs_and_the_outcome_recorded_under_it(declare):
    made = declare(Task, "status", name="tasks", lease=3 * SECOND)(see_renewed)
    task = Task.objects.create()
    with heard("task_finished", "lease_lost") as events:
        assert made.run() == task
    assert [name for name, _ in events] == ["task_finished"]
    assert (stored(task).state, stored(task).attempts) == (State.finished, 1)


def test_what_the_action_changed_is_saved_under_the_renewed_lease(declare):
    def change(paper):
        see_renewed(paper)
        paper.title = "changed"

    made = declare(Paper, "status", name="papers", lease=3 * SECOND)(change)
    paper = Paper.objects.create()
    made.run()
    assert (stored(paper).state, Paper.objects.get().title) == (State.finished, "changed")


def test_failure_after_a_renewal_is_no_older_than_it(declare):
    seen = []

    def fail(task):
        see_renewed(task)
        seen.append(stored(task))
        raise ValueError("no")

    made = declare(Task, "status", name="tasks", lease=3 * SECOND)(fail)
    task = Task.objects.create()
    with pytest.raises(ValueError, match="no"):
        made.run()
    assert stored(task).state == State.waiting
    assert stored(task).priority >= seen[0].priority


def test_lease_of_an_async_action_is_renewed(declare):
    async def act(task):
        await asyncio.to_thread(see_renewed_elsewhere, task)

    def see_renewed_elsewhere(task):
        try:
            see_renewed(task)
        finally:
            connection.close()

    made = declare(Task, "status", name="tasks", lease=3 * SECOND)(act)
    task = Task.objects.create()
    async_to_sync(made.arun)()
    assert (stored(task).state, stored(task).attempts) == (State.finished, 1)


def test_action_learns_that_its_lease_is_lost(declare):
    def be_canceled(task):
        Task.objects.update(status=Status.canceled(5))
        wait_until(lambda: modelqueue.current().cancel_requested)

    made = declare(Task, "status", name="tasks", lease=3 * SECOND)(be_canceled)
    task = Task.objects.create()
    with heard("lease_lost") as events:
        made.run()
    assert [facts["outcome"] for _, facts in events] == ["finish"]
    assert stored(task) == Status.canceled(5)


def test_action_may_renew_its_lease_itself(declare, monkeypatch):
    monkeypatch.setattr(leases, "_SHARE", 0.01)  # never by itself

    def renew(task):
        before = stored(task)
        time.sleep(0.002)
        assert modelqueue.current().renew()
        assert stored(task) > before
        Task.objects.update(status=Status.canceled(5))
        assert not modelqueue.current().renew()

    made = declare(Task, "status", name="tasks", lease=3 * SECOND)(renew)
    Task.objects.create()
    with heard("lease_lost") as events:
        made.run()
    assert len(events) == 1


@pytest.mark.parametrize("error", [OperationalError("gone"), RuntimeError("a fault of ours")])
def test_renewal_that_fails_is_tried_again(error, declare, monkeypatch, caplog):
    renew, failures = verbs.renew, [error]

    def fail_once(*arguments):
        if failures:
            raise failures.pop()
        return renew(*arguments)

    monkeypatch.setattr(verbs, "renew", fail_once)
    made = declare(Task, "status", name="tasks", lease=3 * SECOND)(see_renewed)
    task = Task.objects.create()
    made.run()
    assert stored(task).state == State.finished
    assert "Leases of testapp.Task.status can not be renewed" in caplog.text


def test_outcome_waits_for_a_renewal_that_is_under_way(declare, monkeypatch):
    """Else the renewal would come after it, and make a finished task working again, or lose the outcome."""
    began, go_on, order = threading.Event(), threading.Event(), []
    renew, settle = verbs.renew, modelqueue.attempts.Attempt.write_or_fail

    def slow(*arguments):
        began.set()
        assert go_on.wait(30)
        renewal = renew(*arguments)
        order.append("renewal")
        return renewal

    def write(self, outcome):
        order.append("outcome")
        return settle(self, outcome)

    monkeypatch.setattr(verbs, "renew", slow)
    monkeypatch.setattr(modelqueue.attempts.Attempt, "write_or_fail", write)

    def act(task):
        assert began.wait(30)
        threading.Timer(0.2, go_on.set).start()

    made = declare(Task, "status", name="tasks", lease=3 * SECOND)(act)
    task = Task.objects.create()
    with heard("task_finished", "lease_lost") as events:
        made.run()
    wait_until(lambda: "renewal" in order)
    assert order[-1] == "outcome"
    assert order.count("outcome") == 1
    assert [name for name, _ in events] == ["task_finished"]
    assert stored(task).state == State.finished


def test_lease_is_not_renewed_after_its_end(declare):
    made = declare(Task, "status", name="tasks", lease=3 * SECOND)(see_renewed)
    Task.objects.create()
    task = made.run()
    ended = stored(task)
    time.sleep(0.3)
    assert stored(task) == ended


def test_inside_a_transaction_of_the_caller_nothing_is_renewed():
    """Another connection would not see the claim, and wait for its lock."""
    Errand.objects.create()
    with transaction.atomic():
        claims = []
        made = modelqueue.attempts.Attempt
        before = made.process

        def look(self, action):
            claims.append(self.renewal)
            return before(self, action)

        made.process = look
        try:
            do_errand.drain()
        finally:
            made.process = before
    assert claims == [None]


def let_go(keeper):
    """Reserve nothing any more, and wait for the end of the thread."""
    with keeper._changed:
        keeper._is_reserved = False
        keeper._changed.notify()
    wait_until(lambda: keeper._thread is None)


def test_thread_ends_when_there_is_nothing_to_renew_and_begins_anew(declare, monkeypatch):
    monkeypatch.setattr(leases, "_LINGER", 0.05)
    own = Keeper("default")
    monkeypatch.setattr(modelqueue.execution, "keeper_for", lambda using: own)
    made = declare(Task, "status", name="tasks", lease=3 * SECOND)(see_renewed)
    Task.objects.bulk_create([Task(), Task()])
    for _ in range(2):
        made.run()
        wait_until(lambda: own._thread is None)
    assert made.tally()["finished"] == 2


def test_connection_that_is_reserved_is_there_before_the_first_lease_and_after_the_last(declare, monkeypatch):
    """Once many actions run, the server may have none left to give."""
    monkeypatch.setattr(leases, "_LINGER", 0.05)
    keeper, tries = Keeper("default"), []
    connect = Keeper._connect

    def fail_once(self):
        tries.append(1)
        if len(tries) > 1:
            connect(self)

    monkeypatch.setattr(Keeper, "_connect", fail_once)
    for _ in range(2):
        keeper.reserve()
    wait_until(lambda: keeper._is_connected)
    time.sleep(0.2)
    assert (keeper._is_connected, len(tries)) == (True, 2)
    let_go(keeper)
    assert not keeper._is_connected


def test_reserved_connection_that_was_closed_meanwhile_is_replaced(monkeypatch):
    """By a restart of the server, for example, while nothing was held."""
    monkeypatch.setattr(leases, "_LONGEST_REST", 0.05)
    monkeypatch.setattr(leases, "_LINGER", 0.05)
    keeper, asked = Keeper("default"), []
    engine = type(engine_for("default"))
    monkeypatch.setattr(engine, "is_connected", lambda self: asked.append(1) or len(asked) != 2)
    closed = []
    close = keeper._close_connections
    monkeypatch.setattr(keeper, "_close_connections", lambda: closed.append(len(asked)) or close())
    keeper.reserve()
    wait_until(lambda: len(asked) > 3)
    assert closed == [2]
    assert keeper._is_connected
    let_go(keeper)


def test_reserved_connection_that_does_not_even_tell_whether_it_is_there_is_replaced(monkeypatch):
    """Whatever a driver raises then, it ends no renewals."""
    monkeypatch.setattr(leases, "_LONGEST_REST", 0.05)
    monkeypatch.setattr(leases, "_LINGER", 0.05)
    keeper, asked = Keeper("default"), []

    def raise_once(engine):
        asked.append(engine.connection.connection)
        if len(asked) == 1:
            raise AttributeError("a fault of the driver")
        return True

    monkeypatch.setattr(type(engine_for("default")), "is_connected", raise_once)
    keeper.reserve()
    thread = keeper._thread
    wait_until(lambda: len(asked) > 1)
    assert thread.is_alive()
    assert asked[0] is not asked[1]
    let_go(keeper)


def test_connection_is_reserved_at_once_also_while_the_thread_waits_for_a_next_lease(monkeypatch):
    """Else the actions may take the last one that the server has."""
    monkeypatch.setattr(leases, "_LINGER", 600.0)
    keeper = Keeper("default")
    with keeper._changed:
        keeper._see_to_thread()
    wait_until(lambda: keeper._looks_at > 0.0)
    keeper.reserve()
    wait_until(lambda: keeper._is_connected)
    monkeypatch.setattr(leases, "_LINGER", 0.05)
    let_go(keeper)


def test_database_that_gives_no_connection_to_reserve_is_asked_again(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, "modelqueue")
    keeper = Keeper("nowhere")
    keeper._connect()
    assert not keeper._is_connected
    assert "gives no connection to renew leases" in caplog.text


def test_keeper_whose_thread_has_died_begins_another():
    keeper = Keeper("default")
    keeper._thread = threading.Thread()
    assert not keeper._thread.is_alive()
    with keeper._changed:
        keeper._see_to_thread()
        assert keeper._thread.is_alive()
        keeper._changed.notify()
    wait_until(lambda: keeper._thread is None)


def test_lease_is_renewed_while_an_atomic_action_waits_for_its_transaction(declare, monkeypatch):
    """Which takes long where there is one writer at a time."""
    hold = Engine.hold

    def hold_when_renewed(engine, source, row, leases):
        if len(seen) < 2:
            seen.add(stored(task))
            raise OperationalError("busy")
        return hold(engine, source, row, leases)

    seen = set()
    monkeypatch.setattr(Engine, "hold", hold_when_renewed)
    monkeypatch.setattr(type(engine_for("default")), "is_try_again", lambda engine, error: True)
    made = declare(Task, "status", name="tasks", lease=3 * SECOND, atomic=True)(lambda task: None)
    task = Task.objects.create()
    assert made.run() == task
    assert stored(task).state == State.finished


@pytest.fixture
def kept(declare):
    """Three leases that are kept together, and renewed only when somebody asks for it."""
    made = declare(Task, "status", name="tasks")(lambda task: None)
    Task.objects.bulk_create([Task(), Task(), Task()])
    source, keeper = made.source(), Keeper("default")
    attempts = [made.attempt(claim, source) for claim in verbs.claim(source, 3)]
    kept = keeper.hold_all(source, [(attempt, None, lambda *_: None) for attempt in attempts], 3600.0)
    yield kept
    leases.Lease.end_all(kept)


def test_leases_that_end_together_are_renewed_no_more_and_the_others_are(kept):
    kept[0].end()
    leases.Lease.end_all(kept[:2])
    before = [stored(one.attempt.task) for one in kept]
    wait_until(lambda: Status.working(modelqueue.now()) > max(before))
    assert kept[2].renew()
    after = [stored(one.attempt.task) for one in kept]
    assert after[:2] == before[:2]
    assert after[2] > before[2]
    assert after[2] == kept[2].attempt.lease


def test_end_of_leases_together_waits_for_a_renewal_that_is_under_way(kept, monkeypatch):
    """Or their outcomes would be written under leases that do not stand there any more."""
    renew, is_renewing, go_on = verbs.renew, threading.Event(), threading.Event()

    def renew_slowly(*arguments):
        is_renewing.set()
        go_on.wait(30)
        return renew(*arguments)

    monkeypatch.setattr(verbs, "renew", renew_slowly)
    before = {one.attempt.lease for one in kept}
    wait_until(lambda: Status.working(modelqueue.now()) > max(before))
    asking = threading.Thread(target=kept[0].renew, daemon=True)
    asking.start()
    assert is_renewing.wait(30)
    ending = threading.Thread(target=leases.Lease.end_all, args=[kept], daemon=True)
    ending.start()
    ending.join(0.2)
    assert ending.is_alive()
    go_on.set()
    ending.join(30)
    asking.join(30)
    found = {one.attempt.lease for one in kept}
    assert found == {stored(one.attempt.task) for one in kept}
    assert min(found) > max(before)


def test_end_of_an_atomic_action_waits_for_no_renewal_that_waits_for_it(declare, monkeypatch):
    """On SQLite the action has locked all there is, also the row of its neighbour."""
    renew, is_renewing, errors = verbs.renew, threading.Event(), []

    def renew_and_tell(*arguments):
        is_renewing.set()
        try:
            return renew(*arguments)
        except Exception as error:
            errors.append(error)
            raise

    def act(task):
        Paper.objects.create()
        is_renewing.clear()
        assert is_renewing.wait(10)

    monkeypatch.setattr(verbs, "renew", renew_and_tell)
    made = declare(Task, "status", name="tasks", lease=3 * SECOND, atomic=True)(act)
    source, task = made.source(), Task.objects.bulk_create([Task(), Task()])[1]
    (claim,) = verbs.claim(source, 1)
    neighbour = leases.keeper_for("default").hold(made.attempt(claim, source), 3.0)
    try:
        made.run()
    finally:
        neighbour.end()
    assert stored(task).state == State.finished
    assert errors == []


@pytest.fixture
def bystander():
    """Another session, in autocommit."""
    other = connection.copy()
    yield other
    other.close()


@pytest.fixture
def looks(monkeypatch):
    """How many rows each renewal has asked for, and found locked."""
    found, renew = [], verbs.renew

    def look(source, held, note):
        renewal = renew(source, held, note)
        found.append((len(held), len(renewal.locked)))
        return renewal

    monkeypatch.setattr(verbs, "renew", look)
    return found


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_lease_of_an_atomic_action_is_renewed_when_the_server_has_ended_its_session(
    declare, bystander, looks, monkeypatch
):
    """With it the lock is gone, which was the lease, and the action does not know."""
    monkeypatch.setattr(leases, "_SHARE", 1)

    def act(task):
        if not first:
            with bystander.cursor() as cursor:
                cursor.execute("SELECT status FROM testapp_task")
                first.extend(cursor.fetchone())
            end_session(connection, bystander)
            wait_until(lambda: (1, 0) in looks)
            with bystander.cursor() as cursor:
                cursor.execute("SELECT status FROM testapp_task")
                first.extend(cursor.fetchone())

    first = []
    made = declare(Task, "status", name="tasks", lease=60 * SECOND, atomic=True)(act)
    task = Task.objects.create()
    with heard("task_finished", "lease_lost") as events, suppress(DatabaseError):
        made.run()
    assert first[1] > first[0]
    assert [(name, event["outcome"]) for name, event in events] == [("task_finished", "fail")]
    assert stored(task).attempts == 1
    made.run()
    assert (stored(task).state, stored(task).attempts) == (State.finished, 2)


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_lease_of_an_atomic_action_is_not_renewed_while_its_lock_is_there(declare, looks):
    def act(task):
        wait_until(lambda: looks.count((1, 1)) > 2)

    made = declare(Task, "status", name="tasks", lease=3 * SECOND, atomic=True)(act)
    task = Task.objects.create()
    with heard("task_finished", "lease_lost") as events:
        made.run()
    assert (stored(task).state, stored(task).attempts) == (State.finished, 1)
    assert [name for name, _ in events] == ["task_finished"]
    assert set(looks) == {(1, 1)}


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_row_that_is_locked_is_tried_again_soon_and_it_alone(declare, bystander, looks, monkeypatch):
    monkeypatch.setattr(leases, "_SHARE", 1)
    made = declare(Task, "status", name="tasks")(lambda task: None)
    source = made.source()
    Task.objects.bulk_create([Task(), Task(), Task()])
    claims = verbs.claim(source, 3)
    kept = [Keeper("default").hold(made.attempt(claims[0], source), 3600.0)]
    kept += [kept[0]._keeper.hold(made.attempt(claim, source), 3600.0) for claim in claims[1:]]
    with transaction.atomic(using="default"):
        Task.objects.select_for_update().get(pk=claims[0].row.pk)
        assert kept[1].renew()
        wait_until(lambda: len(looks) > 2)
    wait_until(lambda: looks[-1][1] == 0)
    assert looks == [(3, 1), *[(1, 1)] * (len(looks) - 2), (1, 0)]
    for lease in kept:
        lease.end()


def test_lease_that_is_kept_again_is_renewed_at_once_also_by_a_new_thread(declare, monkeypatch):
    monkeypatch.setattr(leases, "_LINGER", 0.05)
    monkeypatch.setattr(leases, "_SHARE", 1)
    keeper = Keeper("default")
    made = declare(Task, "status", name="tasks")(lambda task: None)
    task = Task.objects.create()
    source = made.source()
    (claim,) = verbs.claim(source)
    attempt = made.attempt(claim, source)
    lease = keeper.hold(attempt, 30.0)
    lease.end()
    lease._group.due = 0.0
    with keeper._changed:
        keeper._changed.notify()
    wait_until(lambda: keeper._thread is None)
    lease._group.due = time.monotonic() + 600
    lease.resume()
    wait_until(lambda: stored(task) > claim.lease)
    lease.end()


def test_leases_that_can_not_be_renewed_are_told_once(declare, monkeypatch, caplog):
    def see_outage(task):
        wait_until(lambda: len(tries) == 3)
        see_renewed(task)

    def renew(*arguments):
        if len(tries) < 3:
            tries.append("away")
            raise OperationalError("away")
        return actual(*arguments)

    tries, actual = [], verbs.renew
    monkeypatch.setattr(verbs, "renew", renew)
    made = declare(Task, "status", name="tasks", lease=3 * SECOND)(see_outage)
    Task.objects.create()
    made.run()
    assert caplog.text.count("Leases of testapp.Task.status can not be renewed: away") == 1
    assert caplog.text.count("Leases of testapp.Task.status are renewed again") == 1


def test_connection_of_the_keeper_lasts_while_it_holds_a_lease_and_no_longer(declare, monkeypatch):
    """A server that is full gives no other, and drops no database while there is one."""

    def connect(connection):
        if threading.current_thread().name == "modelqueue-leases":
            opened.append(connection)
        actual(connection)

    kind = type(connections["default"])
    opened, actual = [], kind.connect
    monkeypatch.setattr(kind, "connect", connect)
    made = declare(Task, "status", name="tasks", lease=3 * SECOND)(see_renewed)
    Task.objects.create()
    made.run()
    assert len(opened) == 1
    wait_until(lambda: opened[0].connection is None)
    assert made.tally()["finished"] == 1


@pytest.mark.parametrize("lease", [dt.timedelta(days=10**8), dt.timedelta.max])
def test_lease_that_is_longer_than_a_thread_can_wait_costs_no_other_its_renewal(lease, declare, monkeypatch):
    own = Keeper("default")
    monkeypatch.setattr(modelqueue.execution, "keeper_for", lambda using: own)
    long = declare(Paper, "status", name="papers", lease=lease)(lambda paper: time.sleep(0.1))
    paper = Paper.objects.create()
    assert long.run() == paper
    short = declare(Task, "status", name="tasks", lease=3 * SECOND)(see_renewed)
    Task.objects.create()
    short.run()
    assert (long.tally()["finished"], short.tally()["finished"]) == (1, 1)


def test_end_of_a_lease_waits_no_longer_for_its_renewal_than_it_may(declare, monkeypatch):
    """A process that ends leaves what the database does not answer."""
    began, go_on, renewals = threading.Event(), threading.Event(), []
    renew = verbs.renew

    def slow(*arguments):
        began.set()
        assert go_on.wait(30)
        renewals.append(renew(*arguments))
        return renewals[-1]

    monkeypatch.setattr(verbs, "renew", slow)
    keeper = Keeper("default")
    made = declare(Task, "status", name="tasks", lease=3 * SECOND)(lambda task: None)
    task = Task.objects.create()
    source = made.source()
    (claim,) = verbs.claim(source)
    lease = keeper.hold(made.attempt(claim, source), 3.0)
    assert began.wait(30)
    lease.end(0.05)
    assert not renewals
    go_on.set()
    wait_until(lambda: renewals)
    last = stored(task)
    time.sleep(0.3)
    assert (stored(task), len(renewals)) == (last, 1)


def test_nothing_is_asked_where_the_last_lease_has_ended_meanwhile(declare):
    """While the leases of another queue were renewed, for example."""
    keeper = Keeper("default")
    made = declare(Task, "status", name="tasks")(lambda task: None)
    Task.objects.create()
    source = made.source()
    (claim,) = verbs.claim(source)
    lease = keeper.hold(made.attempt(claim, source), 30.0)
    lease.end()
    with CaptureQueriesContext(connection) as queries:
        lease._group.renew()
    assert len(queries) == 0


def test_async_action_renews_its_lease_without_holding_up_the_event_loop(declare, monkeypatch):
    monkeypatch.setattr(leases, "_SHARE", 0.01)  # never by itself

    async def act(task):
        with pytest.raises(SynchronousOnlyOperation, match=r"Await current\(\)\.arenew"):
            modelqueue.current().renew()
        before = await sync_to_async(stored)(task)
        await asyncio.sleep(0.002)
        assert await modelqueue.current().arenew()
        assert await sync_to_async(stored)(task) > before
        await Task.objects.aupdate(status=Status.canceled(5))
        assert not await modelqueue.current().arenew()
        seen.append(task)

    seen = []
    made = declare(Task, "status", name="tasks", lease=3 * SECOND)(act)
    task = Task.objects.create()
    async_to_sync(made.arun)()
    assert seen == [task]
    assert stored(task) == Status.canceled(5)
