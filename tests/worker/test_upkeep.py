"""The upkeep of queues: called each second by a worker as long as it serves them, whatever it does."""

import itertools
import threading
import time

import pytest
from django.db import DatabaseError, connection, connections

from modelqueue import Status
from modelqueue.worker import child as child_module
from modelqueue.worker import team, upkeep
from modelqueue.worker.options import Options
from modelqueue.worker.supervisor import Supervisor
from modelqueue.worker.upkeep import Upkeep
from tests.actions import succeed
from tests.faults.harm import end_session
from tests.pace import within
from tests.processes import wait_until
from tests.testapp.models import Shift, Task
from tests.worker.test_supervisor import Played

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(upkeep, "_INTERVAL", 0.01)


@pytest.fixture
def queue(declare):
    """Declare a queue with this upkeep."""

    def make(work, name="tasks"):
        return declare(Task, "status", name=name, upkeep=work)(succeed)

    return make


@pytest.fixture
def keep():
    """Start the upkeep of some queues; at the end it is stopped."""
    started = []

    def keep(*queues):
        started.append(Upkeep(list(queues)))
        started[-1].start()
        return started[-1]

    yield keep
    for one in started:
        one.stop()
        wait_until(lambda one=one: one._thread.ident is None or one.has_ended)


class Work:
    """An upkeep that counts its calls, and does in each what the next of these says."""

    def __init__(self, *does):
        self.does = list(does)
        self.calls = 0
        self.sessions = []

    def __call__(self):
        self.calls += 1
        if self.does:
            self.does.pop(0)()
        self.sessions.append(connection.connection)

    def is_called(self, times):
        wait_until(lambda: self.calls >= times)


def fail():
    raise LookupError("no")


def test_it_is_called_at_once_and_each_second(queue, keep, monkeypatch):
    monkeypatch.setattr(upkeep, "_INTERVAL", 0.5)
    times = []
    keep(queue(lambda: times.append(time.monotonic())))
    began = time.monotonic()
    wait_until(lambda: len(times) == 3)
    assert times[0] - began < within(0.3)
    assert all(0.45 < later - earlier < within(1.0) for earlier, later in itertools.pairwise(times))


def test_queues_come_in_turn_and_those_without_any_are_left_out(queue, keep):
    calls = []
    with_one = [queue(lambda: calls.append("a"), "a"), queue(lambda: calls.append("b"), "b")]
    keep(*with_one, queue(None, "none"))
    wait_until(lambda: len(calls) >= 6)
    assert calls[:6] == ["a", "b"] * 3


def test_nothing_is_started_where_no_queue_has_any(queue, keep):
    assert keep(queue(None))._thread.ident is None


def test_it_is_not_called_after_the_stop(queue, keep):
    kept = []

    def stop():
        wait_until(lambda: kept)
        kept[0].stop()

    first, second = Work(stop), Work()
    kept.append(keep(queue(first, "a"), queue(second, "b")))
    wait_until(lambda: kept[0].has_ended)
    assert (first.calls, second.calls) == (1, 0)


@pytest.mark.parametrize("error", [LookupError, SystemExit])
def test_failure_is_told_once_until_it_works_again_and_costs_the_others_nothing(error, queue, keep, caplog):
    caplog.set_level("DEBUG", "modelqueue")

    def fail():
        raise error("no")

    failing, other = Work(fail, fail, fail, lambda: None, fail), Work()
    keep(queue(failing, "failing"), queue(other, "other"))
    other.is_called(6)
    records = [record for record in caplog.records if "upkeep" in record.getMessage()]
    told = [(record.levelname, record.getMessage()) for record in records]
    assert told == [
        ("WARNING", "failing: its upkeep has failed: no"),
        ("DEBUG", "failing: its upkeep has failed: no"),
        ("DEBUG", "failing: its upkeep has failed: no"),
        ("WARNING", "failing: its upkeep works again."),
        ("WARNING", "failing: its upkeep has failed: no"),
        ("WARNING", "failing: its upkeep works again."),
    ]
    assert records[0].exc_info[0] is error


def break_a_statement():
    with connection.cursor() as cursor:
        cursor.execute("SELECT nothing FROM nowhere")


def swallow_an_error():
    with pytest.raises(DatabaseError):
        break_a_statement()


@pytest.mark.parametrize("error", [break_a_statement, swallow_an_error])
def test_connection_that_had_an_error_is_replaced_and_others_are_kept(error, queue, keep):
    work = Work(Task.objects.count, Task.objects.count, error, Task.objects.count)
    keep(queue(work))
    wait_until(lambda: len(work.sessions) > 3)
    first, second, *_, last = work.sessions
    assert first is second is not last


@pytest.mark.vendor("postgresql", "mysql")
def test_session_that_the_server_has_ended_is_replaced(queue, keep, caplog):
    counts = []
    work = Work(
        Task.objects.count,
        lambda: end_session(connection),
        Task.objects.count,
        lambda: counts.append(Task.objects.count()),
    )
    keep(queue(work))
    wait_until(lambda: counts == [0])
    assert caplog.text.count("its upkeep has failed") == 1


def test_connection_that_can_not_be_closed_ends_nothing(queue, keep, monkeypatch):
    def closing_fails():
        swallow_an_error()
        monkeypatch.setattr(connection, "close", fail, raising=False)
        connection.errors_occurred = True

    work = Work(closing_fails, monkeypatch.undo)
    keep(queue(work))
    work.is_called(4)


def test_its_connections_are_closed_at_the_end(queue, keep):
    mine = []

    def work():
        Task.objects.count()
        mine[:] = connections.all()

    one = keep(queue(work))
    wait_until(lambda: mine)
    one.stop()
    wait_until(lambda: one.has_ended)
    assert [made.connection for made in mine if made.alias == "default"] == [None]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (5, "upkeep is a callable that gets no arguments, not 5"),
        (succeed, "can not be called with no arguments: missing a required argument: 'task'"),
    ],
)
def test_upkeep_is_a_callable_without_arguments(given, text, queue):
    with pytest.raises(TypeError, match=text):
        queue(given)


# In a worker


@pytest.fixture
def supervise(monkeypatch):
    """Start a supervisor of some queues, whose processes the test plays."""
    monkeypatch.setattr(Played, "started", [])
    monkeypatch.setattr(team, "Child", Played)
    monkeypatch.setattr(child_module, "_EXTRA", 0.2)
    started = []

    def supervise(*queues, **options):
        names = tuple(queue.name for queue in queues)
        one = Supervisor(Options(names=names, **{"grace": 0.2, **options}), list(queues))
        thread = threading.Thread(target=one.run, args=[False])
        thread.start()
        started.append((one, thread))
        return one, thread

    yield supervise
    for one, thread in started:
        one.stop()
        for child in Played.started:
            child.die(0)
        thread.join(30)
        assert not thread.is_alive()


def test_worker_keeps_up_the_queues_it_serves_once_for_all_its_processes(queue, supervise):
    work, other = Work(), Work()
    queue(other, "other")
    supervise(queue(work), processes=3)
    work.is_called(1)
    wait_until(lambda: len(Played.started) == 3)
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("modelqueue-upkeep") == 1
    assert other.calls == 0


def test_worker_that_is_stopping_does_no_upkeep(queue, supervise):
    """Its processes may still have to end."""
    work = Work()
    one, thread = supervise(queue(work), grace=60.0)
    work.is_called(1)
    wait_until(lambda: Played.started)
    one.stop()
    wait_until(lambda: one._upkeep.has_ended)
    assert thread.is_alive()
    calls = work.calls
    time.sleep(0.1)
    assert work.calls == calls


def test_upkeep_that_hangs_holds_up_neither_the_prober_nor_the_stop(queue, supervise):
    may_end = threading.Event()
    work = Work(may_end.wait)
    one, thread = supervise(queue(work))
    try:
        work.is_called(1)
        Task.objects.create()
        wait_until(lambda: one._seen is not None and one._seen.due == ["tasks"])
        one.stop()
        Played.started[0].die(0)
        thread.join(10)
        assert not thread.is_alive()
    finally:
        may_end.set()
    wait_until(lambda: one._upkeep.has_ended)
    assert work.calls == 1


def test_error_of_the_supervisor_ends_the_upkeep(queue, supervise, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    one, thread = supervise(queue(Work()))
    monkeypatch.setattr(one, "_is_well", lambda: 1 / 0)
    thread.join(30)
    wait_until(lambda: one._upkeep.has_ended)


def test_worker_without_its_upkeep_stops_in_order(queue, supervise, monkeypatch, caplog):
    monkeypatch.setattr(Upkeep, "has_ended", False)
    _, thread = supervise(queue(Work()))
    wait_until(lambda: Played.started)
    monkeypatch.setattr(Upkeep, "has_ended", True)
    wait_until(lambda: Played.started[0].listen() or ("stop", 0.2) in Played.started[0].heard)
    Played.started[0].die(0)
    thread.join(30)
    assert not thread.is_alive()
    assert "The thread that does the upkeep of the queues has died" in caplog.text


def test_upkeep_promotes_tasks_that_a_worker_then_finds(declare, supervise):
    """What it is for: rows that became due under a time go where their priority is."""

    def promote():
        Shift.objects.filter(worker="urgent").update(status=Status.waiting(77))

    queue = declare(Shift, "status", name="shifts", upkeep=promote)(succeed)
    Shift.objects.create(worker="urgent", status=Status.created())
    one, _ = supervise(queue)
    wait_until(lambda: one._seen is not None and one._seen.due == ["shifts"])
