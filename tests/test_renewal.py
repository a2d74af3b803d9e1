"""Renewal: who works on tasks says so in time, for all of them at once, and loses to nobody's lock."""

import datetime as dt
import threading
import time

import pytest
from django.db import OperationalError, connection

from modelqueue import State, Status, clock, run, verbs
from modelqueue.engines import Engine, engine_for
from modelqueue.outcomes import Policy
from modelqueue.source import Source
from modelqueue.status import ONE_HOUR
from tests.actions import MILLISECOND, SECOND, Clock, stored, succeed
from tests.pace import within
from tests.testapp.models import Job, PrintJob, Task

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def now():
    injected = Clock()
    with clock.use(injected):
        yield injected


def working(count, model=Task):
    """That many claimed tasks, with 0, 1, 2 ... attempts, and what their worker knows of their leases."""
    for number in range(count):
        model.objects.create(status=Status.waiting(0, number % 10))
    source = Source.of(model.objects, "status")
    claims = verbs.claim(source, count)
    assert len(claims) == count
    return source, claims, {claim.row.key: {claim.lease} for claim in claims}


@pytest.mark.parametrize("model", [Task, Job, PrintJob])
def test_each_lease_gets_the_time_of_the_renewal_and_keeps_its_attempts(now, model):
    source, claims, leases = working(12, model)
    now.move(10 * SECOND)
    renewal = verbs.renew(source, leases)
    assert renewal == ({claim.row.key for claim in claims}, set(), set())
    for claim in claims:
        status = stored(claim.task)
        assert status == Status.working(now(), claim.lease.attempts)
        assert leases[claim.row.key] == {status}


def test_what_a_lease_is_about_to_become_is_noted_before_it_is_written(now):
    source, (claim,), leases = working(1)
    now.move(10 * SECOND)
    noted = []
    verbs.renew(source, leases, lambda *note: noted.append((*note, stored(claim.task))))
    assert noted == [(claim.row.key, claim.lease, stored(claim.task), claim.lease)]


def test_renewal_is_repeated_on_a_new_connection(now, monkeypatch):
    source, claims, leases = working(2)
    now.move(10 * SECOND)
    renew, lost = Engine._renew_together, []

    def lose(self, *arguments):
        renewal = renew(self, *arguments)
        if not lost:
            lost.append(renewal)
            connection.close()
            raise OperationalError("server closed the connection unexpectedly")
        return renewal

    monkeypatch.setattr(Engine, "_renew_together", lose)
    assert verbs.renew(source, leases).renewed == {claim.row.key for claim in claims}
    assert [{stored(claim.task)} for claim in claims] == [leases[claim.row.key] for claim in claims]


def test_renewed_task_is_not_recovered(now):
    source, claims, leases = working(2)
    del leases[claims[1].row.key]
    now.move(10 * SECOND)
    verbs.renew(source, leases)
    now.move(10 * SECOND)
    assert verbs.recover(source, Policy(timeout=15 * SECOND)) == 1
    assert [stored(claim.task).state for claim in claims] == [State.working, State.waiting]


def test_lease_never_gets_an_older_time(now):
    """As after a clock that was set back: an older time could be stamped by a claim once more."""
    source, (claim,), leases = working(1)
    now.move(-SECOND)
    assert verbs.renew(source, leases).renewed == {claim.row.key}
    assert stored(claim.task) == claim.lease
    assert leases == {claim.row.key: {claim.lease}}


def test_tasks_that_are_not_ours_any_more_are_lost_and_left_alone(now):
    source, claims, leases = working(5)
    ours, canceled, recovered, deleted, claimed_again = (claim.task for claim in claims)
    now.move(SECOND)
    others = {
        canceled.pk: Status.canceled(),
        recovered.pk: Status.waiting(),
        claimed_again.pk: Status.working(now() + MILLISECOND, 5),
    }
    for pk, status in others.items():
        Task.objects.filter(pk=pk).update(status=status)
    Task.objects.filter(pk=deleted.pk).delete()
    renewal = verbs.renew(source, leases)
    assert renewal == ({ours.pk}, set(), {canceled.pk, recovered.pk, deleted.pk, claimed_again.pk})
    assert {pk: stored(Task(pk=pk), using="default") for pk in others} == others
    assert leases[canceled.pk] == {claims[1].lease}


def test_task_under_the_lease_of_its_neighbour_is_lost(now):
    """Each row is compared with its own lease, not with that of any task of the worker."""
    source, claims, leases = working(2)
    first, second = claims
    Task.objects.filter(pk=first.row.key).update(status=second.lease)
    now.move(SECOND)
    assert verbs.renew(source, leases) == ({second.row.key}, set(), {first.row.key})
    assert stored(first.task) == second.lease


def test_after_an_answer_that_was_lost_either_lease_is_ours(now):
    source, claims, leases = working(2)
    now.move(SECOND)
    unanswered = {claim.row.key: Status.working(now(), claim.lease.attempts) for claim in claims}
    written, _ = claims
    Task.objects.filter(pk=written.row.key).update(status=unanswered[written.row.key])
    for key, status in unanswered.items():
        leases[key].add(status)
    now.move(SECOND)
    assert verbs.renew(source, leases).renewed == set(leases)
    for claim in claims:
        assert leases[claim.row.key] == {stored(claim.task)} == {Status.working(now(), claim.lease.attempts)}


def test_renewal_that_ends_with_an_error_leaves_both_leases(now, monkeypatch):
    source, (claim,), leases = working(1)
    now.move(SECOND)

    def fail(*arguments):
        raise OperationalError("no answer")

    monkeypatch.setattr(type(engine_for("default")), "_stamp", fail)
    with pytest.raises(OperationalError):
        verbs.renew(source, leases)
    assert leases == {claim.row.key: {claim.lease, Status.working(now(), claim.lease.attempts)}}


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_one_locked_row_of_a_hundred_costs_the_other_99_nothing(bystander, now):
    source, claims, leases = working(100)
    locked = claims[37]
    with bystander.cursor() as cursor:
        cursor.execute("SELECT id FROM testapp_task WHERE id = %s FOR UPDATE", [locked.row.key])
    now.move(10 * SECOND)
    began = time.monotonic()
    renewal = verbs.renew(source, leases)
    assert time.monotonic() - began < within(1)  # each database would wait longer for the lock
    assert renewal == (leases.keys() - {locked.row.key}, {locked.row.key}, set())
    assert stored(locked.task) == locked.lease

    bystander.rollback()
    retry = {locked.row.key: leases[locked.row.key]}
    assert verbs.renew(source, retry) == ({locked.row.key}, set(), set())
    assert {stored(claim.task).priority for claim in claims} == {Status.working(now()).priority}


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_locked_row_that_was_taken_away_before_is_lost(bystander, now):
    source, (claim,), leases = working(1)
    Task.objects.update(status=Status.canceled())
    with bystander.cursor() as cursor:
        cursor.execute("SELECT id FROM testapp_task FOR UPDATE")
    assert verbs.renew(source, leases) == (set(), set(), {claim.row.key})


def test_more_tasks_than_one_statement_takes_parameters_for(now):
    source, _, leases = working(900)
    now.move(SECOND)
    assert verbs.renew(source, leases).renewed == set(leases)
    assert all(stored_now == {max(stored_now)} for stored_now in leases.values())
    assert Task.objects.filter(status__gte=Status.working(now())).count() == 900


def test_nothing_to_renew_asks_nothing(django_assert_num_queries):
    source = Source.of(Task.objects, "status")
    with django_assert_num_queries(0):
        assert verbs.renew(source, {}) == (set(), set(), set())


def test_no_two_owners_have_the_same_lease(now):
    """Not even if the task goes back uncharged in the millisecond of a renewal and is claimed in it again."""
    source, (claim,), leases = working(1)
    owners = []
    for _ in range(5):
        owners.append({claim.lease})
        now.move(2 * MILLISECOND)
        verbs.renew(source, leases)
        (lease,) = leases[claim.row.key]
        owners[-1].add(lease)
        engine_for("default").compare_and_set(source, claim.row, [lease], Status.waiting(now(), 0))
        (claim,) = verbs.claim(source)
        leases = {claim.row.key: {claim.lease}}
    assert [len(owner) for owner in owners] == [2] * 5
    assert len(set.union(*owners)) == 10


def test_renewals_and_outcomes_at_once_leave_each_task_finished():
    """A renewal either comes before the outcome, which then has to know its lease, or finds the task lost."""
    source, claims, leases = working(40)
    stop = threading.Event()

    def renew():
        try:
            while not stop.is_set():
                verbs.renew(source, leases)
        finally:
            connection.close()

    renewer = threading.Thread(target=renew)
    renewer.start()
    try:
        finished = Status.finished()
        for claim in claims:
            engine = engine_for("default")
            while not engine.patiently(
                lambda engine=engine, claim=claim: engine.compare_and_set(
                    source, claim.row, list(leases[claim.row.key]), finished
                )
            ):
                assert stored(claim.task).state == State.working
    finally:
        stop.set()
        renewer.join()
    assert set(Task.objects.values_list("status", flat=True)) == {finished}


def test_run_takes_what_was_renewed_only_when_its_time_is_over(now):
    source, (claim,), leases = working(1)
    now.move(ONE_HOUR - SECOND)
    verbs.renew(source, leases)
    now.move(2 * SECOND)
    assert run(Task.objects, "status", succeed) is None
    now.move(ONE_HOUR + dt.timedelta(milliseconds=1))
    assert run(Task.objects, "status", succeed).pk == claim.row.key
