"""No lease is the same number twice on a row, and what is written is due by the time run() returns."""

import asyncio
import datetime as dt
import threading
from contextlib import suppress

import pytest
from django.db import connection

import modelqueue
from modelqueue import ZERO_SECS, Abort, Retry, State, Status, clock, run, verbs
from modelqueue.outcomes import Policy
from modelqueue.source import Source
from tests.actions import MILLISECOND, SECOND, Clock, raising, stored, succeed, unexpected
from tests.processes import wait_until
from tests.testapp.models import Task

pytestmark = pytest.mark.django_db(transaction=True)

#: Each is over within a few milliseconds.
RUNS = 12


class TickingClock(Clock):
    """A clock that goes on by 0.2 ms with each look, so that a whole task fits into a millisecond."""

    def __call__(self):
        self.moment += dt.timedelta(microseconds=200)
        return self.moment


def assign(*waiting):
    def action(task):
        task.status = Status.waiting(*waiting)

    return action


def recover():
    verbs.recover(Source.of(Task.objects, "status"), Policy(retry=None, timeout=ZERO_SECS))


BACK_TO_WAITING = {
    "Retry": raising(Retry()),
    "Abort": raising(Abort()),
    "failure": raising(ValueError()),
    "release": raising(asyncio.CancelledError()),
    "assigned time": assign(None, 9),
    "assigned number": assign(0, 9),
    "assigned past": assign(dt.datetime(2020, 1, 1), 9),
}


@pytest.mark.parametrize("now", [TickingClock, None], ids=["a fast machine", "this machine"])
@pytest.mark.parametrize("action", BACK_TO_WAITING.values(), ids=BACK_TO_WAITING)
@pytest.mark.parametrize("atomic", [False, True], ids=["", "atomic"])
def test_no_lease_is_used_twice(atomic, action, now):
    # With 9 attempts, where these stay the same, and the lowest priority that the row ever had.
    Task.objects.create(status=Status.waiting(0, 9))
    leases = []

    def note(task):
        leases.append(task.status)
        action(task)

    with clock.use(now() if now else clock._clock):
        for _ in range(RUNS):
            with suppress(ValueError, asyncio.CancelledError):
                assert run(Task.objects, "status", note, retry=None, atomic=atomic) is not None
    assert len(leases) == RUNS  # each time the next call found it due
    assert len(set(leases)) == RUNS
    assert leases == sorted(leases)


def test_no_lease_is_used_twice_after_a_recovery():
    now = Clock()
    with clock.use(now):
        Task.objects.create(status=Status.waiting(0, 9))
        leases = []

        def act(depth):
            def action(task):
                leases.append(task.status)
                if depth:
                    for _ in range(5):
                        recover()
                        run(Task.objects, "status", act(depth - 1), retry=None)
                        now.move(dt.timedelta(microseconds=500))

            return action

        run(Task.objects, "status", act(5), retry=None)
    assert len(leases) == len(set(leases)) > 2


def test_lease_is_later_than_the_moment_of_the_claim_and_than_what_it_replaced():
    now = Clock()
    with clock.use(now):
        Task.objects.create(status=Status.waiting(now.moment))
        seen = []
        run(Task.objects, "status", lambda task: seen.append(task.status))
    assert seen == [Status.working(now.moment + MILLISECOND)]


@pytest.mark.vendor("sqlite")
def test_lease_begins_after_the_wait_for_the_database():
    """The time that a claim waits while somebody else writes is not taken from its worker."""
    Task.objects.create()
    writer = connection.copy()
    with writer.cursor() as cursor:
        cursor.execute("BEGIN IMMEDIATE")
    started = modelqueue.now()
    held = 300 * MILLISECOND

    def end():
        wait_until(lambda: modelqueue.now() - started > held)
        writer.rollback()

    # The connection of the writer is used by this thread alone from here on.
    writer.inc_thread_sharing()
    thread = threading.Thread(target=end)
    thread.start()
    leases = []
    run(Task.objects, "status", lambda task: leases.append(task.status))
    thread.join()
    writer.close()
    assert leases[0].parse()[1] > started + held


@pytest.mark.usefixtures("step_by_step")
def test_clock_that_is_set_back_between_pick_and_claim():
    """The lease is later than the time that it replaces all the same."""
    now = Clock()
    with clock.use(now):
        before = Status.waiting()
        Task.objects.create(status=before)
    looks = []

    def set_back():
        looks.append(now.moment if not looks else now.moment - 10 * SECOND)
        return looks[-1]

    with clock.use(set_back):
        [claim] = verbs.claim(Source.of(Task.objects, "status"))
    assert claim.lease.priority == before.priority + 1
    assert claim.row.status == before


def test_clock_that_stands_still_makes_nobody_wait():
    now = Clock()
    with clock.use(now):
        task = Task.objects.create()
        run(Task.objects, "status", raising(Retry()))
        assert stored(task) == Status.waiting(now.moment + MILLISECOND)
        assert run(Task.objects, "status", unexpected) is None
        now.move(MILLISECOND)
        assert run(Task.objects, "status", succeed) == task


def test_time_far_ahead_is_not_waited_for():
    now = Clock()
    with clock.use(now):
        task = Task.objects.create()

        def action(task):
            now.move(-60 * SECOND)
            task.status = Status.waiting(0)

        run(Task.objects, "status", action)
        assert stored(task) == Status.waiting(0)


def test_claim_at_the_end_of_the_calendar():
    now = Clock(dt.datetime.max.replace(tzinfo=dt.timezone.utc))
    with clock.use(now):
        task = Task.objects.create(status=Status.waiting(dt.datetime.max))
        run(Task.objects, "status", raising(Abort()), delay=SECOND)
    assert (stored(task).state, stored(task).priority) == (State.waiting, 99991231235959999)
