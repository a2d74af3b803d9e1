"""The recovery of a worker: what dead workers have left is taken back once it was seen twice."""

import threading
import time

import pytest
from django.db import OperationalError, connections

from modelqueue import State, Status, verbs
from modelqueue.worker import recovery as module
from modelqueue.worker import suspects
from modelqueue.worker.recovery import Recovery
from tests.actions import stored
from tests.processes import wait_until
from tests.testapp.models import Errand
from tests.testapp.queues import do_errand, review

pytestmark = pytest.mark.django_db(transaction=True)

ERRANDS, REVIEWS = do_errand.name, review.name
#: Where what has expired begins.
FIRST = Status.working(5)


@pytest.fixture
def recovery():
    one = Recovery([do_errand, review])
    one.start()
    yield one
    one.stop()
    wait_until(lambda: one.has_ended)


@pytest.fixture
def looks(monkeypatch):
    """The names of the queues that were looked at, in that order."""
    seen = []
    recover = verbs.recover

    def watched(source, *arguments, **options):
        seen.append(source.queue_name)
        return recover(source, *arguments, **options)

    monkeypatch.setattr(verbs, "recover", watched)
    return seen


def abandon():
    return Errand.objects.create(status=Status.working(5))


def test_what_has_expired_is_taken_back_when_it_was_seen_twice(recovery, looks):
    errand, began = abandon(), time.monotonic()

    def is_recovered():
        recovery.look_at({ERRANDS: FIRST})  # as the prober says at each look
        return stored(errand).state == State.waiting

    wait_until(is_recovered)
    assert time.monotonic() - began >= 1.5
    assert stored(errand).attempts == 1


def test_recovery_begins_where_the_prober_has_seen_the_first(recovery, monkeypatch):
    """Below that there are the entries that ended tasks have left in the index, perhaps very many."""
    monkeypatch.setattr(suspects, "_SHORTEST", 0.0)
    below, first = abandon(), Errand.objects.create(status=Status.working(6))
    recovery.look_at({ERRANDS: Status.working(6)})
    wait_until(lambda: stored(first).state == State.waiting)
    assert stored(below) == Status.working(5)


def test_expired_row_is_left_alone_until_it_was_seen_twice(recovery, looks, monkeypatch):
    """A transaction had locked it for longer than the lease, perhaps, and its worker is about to renew it."""
    monkeypatch.setattr(suspects, "_SHORTEST", 600.0)
    errand = abandon()
    recovery.look_at({ERRANDS: FIRST})
    wait_until(lambda: looks)
    recovery.look_at({REVIEWS: FIRST})
    wait_until(lambda: looks == [ERRANDS, REVIEWS])
    assert stored(errand) == Status.working(5)


def test_nothing_is_taken_back_that_the_prober_holds_back_since(recovery, looks, monkeypatch):
    """It has seen that it was cut off, perhaps, for longer than all leases."""
    monkeypatch.setattr(suspects, "_SHORTEST", 0.0)
    errand = abandon()
    recovery.look_at({})
    recovery.look_at({REVIEWS: FIRST})
    wait_until(lambda: REVIEWS in looks)
    assert stored(errand) == Status.working(5)


def test_what_the_prober_has_seen_long_ago_counts_no_more(recovery, looks, monkeypatch):
    """The database was silent, or the machine asleep, and whoever lives has to renew its leases first."""
    monkeypatch.setattr(module, "_FRESH", -1.0)
    errand = abandon()
    recovery.look_at({ERRANDS: FIRST})
    monkeypatch.setattr(module, "_FRESH", 60.0)
    recovery.look_at({REVIEWS: FIRST})
    wait_until(lambda: looks)
    assert looks == [REVIEWS]
    assert stored(errand) == Status.working(5)


def test_claims_that_have_run_out_in_a_silence_of_the_database_are_not_taken(recovery, monkeypatch):
    """Nobody could renew them. Who had to wait for the database does not look once more by itself."""
    monkeypatch.setattr(suspects, "_SHORTEST", 0.3)
    silence, looks, recover = threading.Event(), [], verbs.recover

    def recover_slowly(*arguments, **options):
        looks.append(recover(*arguments, **options))
        return silence.wait(30)

    monkeypatch.setattr(verbs, "recover", recover_slowly)
    abandon()
    recovery.look_at({ERRANDS: FIRST})
    wait_until(lambda: looks)
    living = abandon()
    time.sleep(0.4)
    silence.set()
    time.sleep(1.0)
    assert stored(living) == Status.working(5)
    assert looks == [0]


@pytest.mark.parametrize("error", [OperationalError("away"), RuntimeError("a fault"), SystemExit("exit")])
def test_recovery_that_fails_is_told_once_and_stops_nothing(error, recovery, monkeypatch, caplog):
    recover, failures = verbs.recover, [error, error]

    def fail(source, *arguments, **options):
        if source.queue_name == ERRANDS and failures:
            raise failures.pop()
        return recover(source, *arguments, **options)

    monkeypatch.setattr(verbs, "recover", fail)
    errand = abandon()

    def is_recovered():
        recovery.look_at({ERRANDS: FIRST, REVIEWS: FIRST})
        return stored(errand).state == State.waiting

    wait_until(is_recovered)
    assert caplog.text.count("its tasks can not be recovered, trying again") == 1
    assert "testapp.do_errand: its tasks can be recovered again." in caplog.text


def test_queues_with_much_to_recover_take_turns(recovery, monkeypatch):
    seen = []
    monkeypatch.setattr(verbs, "recover", lambda source, *_, **__: seen.append(source.queue_name) or 100)

    def is_enough():
        recovery.look_at({ERRANDS: FIRST, REVIEWS: FIRST})
        return len(seen) >= 10

    wait_until(is_enough)
    assert {ERRANDS, REVIEWS} == set(seen[:2]) == set(seen[2:4]) == set(seen[4:6])


def test_row_that_stays_locked_is_not_asked_for_all_the_time(recovery, looks, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 60.0)

    def is_looked_at():
        recovery.look_at({ERRANDS: FIRST})
        return looks

    wait_until(is_looked_at)
    for _ in range(20):
        recovery.look_at({ERRANDS: FIRST})
        time.sleep(0.01)
    assert looks == [ERRANDS]


def test_connection_is_let_go_when_there_was_nothing_to_do_for_long(recovery, looks, monkeypatch):
    closed = []
    close_all = connections.close_all
    monkeypatch.setattr(connections, "close_all", lambda: closed.append(len(looks)) or close_all())
    monkeypatch.setattr(module, "_IDLE", 0.1)
    recovery.look_at({ERRANDS: FIRST})
    wait_until(lambda: 1 in closed)
