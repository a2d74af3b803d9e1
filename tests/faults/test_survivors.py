"""Workers that live on after a fault at each point: their connection is lost, or an exception comes up."""

import threading
from collections import Counter

import pytest
from django.db import Error, connection

from modelqueue import State, Status, verbs
from modelqueue.source import Source
from tests.actions import stored
from tests.faults.harm import cut, end_session, losing_the_answer, mute
from tests.faults.points import MOMENTS, fault
from tests.faults.tables import is_missing, lines, skip_where_missing
from tests.faults.trace import Trace
from tests.faults.workers import drain, make_tasks, run_next, work_into
from tests.processes import wait_until
from tests.testapp.models import Ledger, StampedPaper, Task

pytestmark = pytest.mark.django_db(transaction=True)
servers = pytest.mark.vendor("postgresql", "mysql")


@pytest.fixture
def trace(tmp_path):
    return Trace(tmp_path / "trace")


def check(model, is_atomic, step, moment, do, expected, trace):
    """Run two tasks, the second into a fault, then let others work; compare with the line of the table."""
    does, begun, attempts = expected
    tasks = make_tasks(model, step)
    with trace.listening():
        try:
            returned = work_into(model, is_atomic, step, moment, do, trace)
            did = "returns" if returned is not None else "returns None"
        except (Error, RuntimeError, KeyboardInterrupt):
            did = "raises"
        assert did == does
        drain(model, is_atomic, trace)

    trace.check()
    begins = Counter(event["pk"] for event in trace.read("begins"))
    ends = Counter(event["pk"] for event in trace.read("task_finished") if event["outcome"] == "finish")
    for task, times, charged in zip(tasks, (1, begun), (1, attempts), strict=True):
        assert (stored(task).state, stored(task).attempts) == (State.finished, charged)
        assert (begins[task.pk], ends[task.pk]) == (times, 1)
        assert Ledger.objects.filter(task=task.pk).count() == (1 if is_atomic else times)
    assert not trace.read("lease_lost")
    if model is StampedPaper:
        assert set(model.objects.values_list("pages", flat=True)) == {1}


# What run() does, how often the action begins in all, and how many attempts are counted when the task is
# finished at last.
MENDED = ("returns", 1, 1)
UNTOUCHED = ("raises", 1, 1)
CHARGED = ("raises", 1, 2)
FAILED = ("raises", 2, 2)


# A connection that is lost

LOST = {
    ("claim", "before the statement"): UNTOUCHED,
    ("claim", "before the commit"): UNTOUCHED,
    ("claim", "before the answer"): CHARGED,
    ("action", "after the effect"): MENDED,
    ("outcome", "before the statement"): MENDED,
    ("outcome", "before the commit"): MENDED,
    ("outcome", "before the answer"): MENDED,
    ("recovery", "before the statement"): CHARGED,
    ("recovery", "before the commit"): CHARGED,
    ("recovery", "before the answer"): CHARGED,
}
# The effects of the action are lost with the connection.
LOST_WHILE_ATOMIC = {
    ("hold", "before the statement"): MENDED,
    ("hold", "before the commit"): FAILED,
    ("action", "after the effect"): FAILED,
    ("outcome", "before the statement"): FAILED,
    ("outcome", "before the commit"): FAILED,
    ("outcome", "before the answer"): MENDED,
}


@servers
@pytest.mark.parametrize("harm", [cut, end_session])
@lines(LOST, LOST_WHILE_ATOMIC)
def test_connection_that_is_lost(model, is_atomic, step, moment, expected, harm, trace, vendor):
    skip_where_missing(step, moment, vendor)
    if step == "action":
        check(model, is_atomic, step, moment, lambda: harm(connection), expected, trace)
        return
    if is_atomic and (step, moment, vendor) == ("hold", "before the commit", "mysql"):
        expected = MENDED  # there a savepoint follows, and it is noticed before the action begins
    do = losing_the_answer(harm) if moment == "before the answer" else harm
    check(model, is_atomic, step, moment, do, expected, trace)


@servers
@pytest.mark.parametrize("harm", [cut, end_session])
@pytest.mark.parametrize("moment", MOMENTS)
def test_connection_that_is_lost_in_a_renewal_costs_no_lease(harm, moment):
    source, leases = claimed(3)
    with fault("renewal", moment, losing_the_answer(harm) if moment == "before the answer" else harm):
        renewal = verbs.renew(source, leases)
    assert renewal == (set(leases), set(), set())
    assert {key: {Status(status)} for key, status in Task.objects.values_list("pk", "status")} == leases


def claimed(count):
    for number in range(count):
        Task.objects.create(status=Status.waiting(number, number))
    source = Source.of(Task.objects, "status")
    return source, {claim.row.key: {claim.lease} for claim in verbs.claim(source, count)}


# The server does what it was asked for, and nobody hears so.


@servers
def test_outcome_that_the_server_wrote_unheard_is_no_lost_lease(trace):
    task = Task.objects.create()
    with trace.listening(), fault("outcome", "before the statement", mute):
        returned = run_next(Task, False, trace.action())
    assert returned.status == stored(task)
    assert (stored(task).state, stored(task).attempts) == (State.finished, 1)
    assert [event["what"] for event in trace.read()] == ["task_claimed", "begins", "ends", "task_finished"]


@servers
def test_claim_that_the_server_made_unheard_is_recovered(trace, vendor):
    if not is_missing("claim", "before the commit", vendor):
        pytest.skip("the server makes a claim only when it hears of its commit, too")
    task = Task.objects.create()
    with trace.listening():
        with fault("claim", "before the statement", mute), pytest.raises(Error):
            run_next(Task, False, trace.action())
        wait_until(lambda: stored(task).state == State.working)
        drain(Task, False, trace)
    trace.check()
    assert (stored(task).attempts, len(trace.read("begins"))) == (2, 1)


# A worker that is held up for longer than its lease


@pytest.mark.parametrize(
    ("model", "is_atomic", "step"),
    [
        (Task, False, "outcome"),
        (StampedPaper, False, "outcome"),
        (Task, True, "hold"),
        (StampedPaper, True, "hold"),
    ],
)
def test_worker_that_was_overtaken_by_others_writes_nothing(model, is_atomic, step, trace):
    def overtake(connection):
        thread = threading.Thread(target=work_as_others)
        thread.start()
        thread.join()

    def work_as_others():
        try:
            drain(model, is_atomic, trace)
        finally:
            connection.close()

    neighbour, victim = make_tasks(model, step)
    with trace.listening():
        returned = work_into(model, is_atomic, step, "before the statement", overtake, trace)
    trace.check()
    assert returned == victim
    assert returned.status == stored(victim)
    assert [stored(task).attempts for task in (neighbour, victim)] == [1, 2]
    told = [(event["what"], event["pk"]) for event in trace.read("lease_lost", "task_finished")]
    assert told[1:] == [("task_finished", victim.pk), ("lease_lost", victim.pk)]
    assert Ledger.objects.filter(task=victim.pk).count() == (1 if is_atomic else 2)
    if model is StampedPaper:
        assert set(model.objects.values_list("pages", flat=True)) == {1}


def test_renewal_of_a_worker_that_was_overtaken_by_others_writes_nothing(trace):
    source, leases = claimed(2)

    def overtake(connection):
        Task.objects.filter(pk=min(leases)).update(status=Status.finished(7, 1))

    with fault("renewal", "before the statement", overtake):
        assert verbs.renew(source, leases) == ({max(leases)}, set(), {min(leases)})
    assert Task.objects.get(pk=min(leases)).status == Status.finished(7, 1)


# An exception. (RuntimeError stands for one that is of neither the database nor its connection.)

RAISED = {
    ("claim", "before the statement"): MENDED,  # step by step, see Engine.claim
    ("claim", "before the commit"): MENDED,
    ("claim", "before the answer"): ("returns None", 1, 2),
    ("outcome", "before the statement"): FAILED,  # the changes can not be saved
    ("outcome", "before the commit"): FAILED,
    ("outcome", "before the answer"): MENDED,
    ("recovery", "before the statement"): ("returns", 1, 2),  # row by row
    ("recovery", "before the commit"): ("returns", 1, 2),
    ("recovery", "before the answer"): ("returns", 1, 2),
}
RAISED_WHILE_ATOMIC = {
    ("hold", "before the statement"): CHARGED,
    ("hold", "before the commit"): CHARGED,
    ("outcome", "before the statement"): FAILED,
    ("outcome", "before the commit"): FAILED,
    ("outcome", "before the answer"): MENDED,
}
INTERRUPTED = {
    ("claim", "before the statement"): UNTOUCHED,
    ("claim", "before the commit"): UNTOUCHED,
    ("claim", "before the answer"): CHARGED,
    ("outcome", "before the statement"): FAILED,
    ("outcome", "before the commit"): FAILED,
    ("outcome", "before the answer"): UNTOUCHED,
    ("recovery", "before the statement"): CHARGED,
    ("recovery", "before the commit"): CHARGED,
    ("recovery", "before the answer"): CHARGED,
}
INTERRUPTED_WHILE_ATOMIC = RAISED_WHILE_ATOMIC | {
    ("outcome", "before the answer"): UNTOUCHED,
}


def throw(error):
    def do(connection):
        raise error

    return do


@lines(RAISED, RAISED_WHILE_ATOMIC)
def test_exception(model, is_atomic, step, moment, expected, trace, vendor):
    skip_where_missing(step, moment, vendor)
    check(model, is_atomic, step, moment, throw(RuntimeError("no")), expected, trace)


@lines(INTERRUPTED, INTERRUPTED_WHILE_ATOMIC)
def test_interruption(model, is_atomic, step, moment, expected, trace, vendor):
    skip_where_missing(step, moment, vendor)
    check(model, is_atomic, step, moment, throw(KeyboardInterrupt()), expected, trace)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", MOMENTS)
def test_renewal_after_one_that_was_interrupted_still_knows_the_leases(error, moment):
    source, leases = claimed(3)
    with fault("renewal", moment, throw(error())), pytest.raises(error):
        verbs.renew(source, leases)
    assert verbs.renew(source, leases) == (set(leases), set(), set())
    assert {key: {Status(status)} for key, status in Task.objects.values_list("pk", "status")} == leases
