"""Workers that are killed at each fault point: nothing is lost, owned twice, or charged wrongly."""

import datetime as dt

import pytest
from django.apps import apps

from modelqueue import State, Status, clock, conf, run, verbs
from modelqueue.source import Source
from modelqueue.status import ONE_HOUR
from tests.actions import stored
from tests.faults.harm import KILLED
from tests.faults.points import fault
from tests.faults.trace import Trace
from tests.processes import wait_until
from tests.testapp.models import Ledger

pytestmark = pytest.mark.django_db(transaction=True)

# What stands in the row when its worker is dead, how often the action begins in all, and how many attempts
# are counted when the task is finished at last.
NOT_CLAIMED = ("waiting", 1, 1)
CLAIMED_AND_NOT_BEGUN = ("working", 1, 2)
BEGUN = ("working", 2, 2)
RECORDED = ("finished", 1, 1)
RECOVERED = ("waiting", 1, 2)

POINTS = {
    ("claim", "before the statement"): NOT_CLAIMED,
    ("claim", "before the commit"): NOT_CLAIMED,
    ("claim", "before the answer"): CLAIMED_AND_NOT_BEGUN,
    ("action", "before the effect"): BEGUN,
    ("action", "after the effect"): BEGUN,
    ("renewal", "before the statement"): CLAIMED_AND_NOT_BEGUN,
    ("renewal", "before the commit"): CLAIMED_AND_NOT_BEGUN,
    ("renewal", "before the answer"): CLAIMED_AND_NOT_BEGUN,
    ("outcome", "before the statement"): BEGUN,
    ("outcome", "before the commit"): BEGUN,
    ("outcome", "before the answer"): RECORDED,
    ("recovery", "before the statement"): CLAIMED_AND_NOT_BEGUN,  # by another worker, long ago
    ("recovery", "before the commit"): CLAIMED_AND_NOT_BEGUN,
    ("recovery", "before the answer"): RECOVERED,
}
POINTS_OF_ATOMIC = {
    ("hold", "before the statement"): CLAIMED_AND_NOT_BEGUN,
    ("hold", "before the commit"): CLAIMED_AND_NOT_BEGUN,
    ("action", "before the effect"): BEGUN,
    ("action", "after the effect"): BEGUN,
    ("outcome", "before the statement"): BEGUN,
    ("outcome", "before the commit"): BEGUN,
    ("outcome", "before the answer"): RECORDED,
}


def cells():
    for is_atomic, points in ((False, POINTS), (True, POINTS_OF_ATOMIC)):
        for (step, moment), expected in points.items():
            # The outcome of the first is one UPDATE, that of the second is written by save().
            for model in ("Task", "StampedPaper"):
                if model == "StampedPaper" and step not in ("hold", "action", "outcome"):
                    continue
                if (model, is_atomic, step, moment) == ("Task", False, "outcome", "before the commit"):
                    continue  # an UPDATE in autocommit has no such moment
                name = f"{'atomic ' * is_atomic}{model}, {step}, {moment}"
                yield pytest.param(model, is_atomic, step, moment, *expected, id=name)


def later():
    """A time at which the lease of whoever is dead has run out."""
    return dt.datetime.now(dt.timezone.utc) + 2 * ONE_HOUR


def run_next(model, is_atomic, action):
    return run(model.objects, "status", action, timeout=ONE_HOUR, atomic=is_atomic)


def drain(model, is_atomic, trace):
    """Work as the others do after the death of one, until all is done.

    The server may need a moment to find out that the dead one will not end its transaction.
    """

    def is_done():
        is_idle = run_next(model, is_atomic, trace.action()) is None
        return is_idle and not model.objects.exclude(status__state="finished").exists()

    with clock.use(later), trace.listening():
        wait_until(is_done)


def work_until_killed(model, is_atomic, step, moment, path):
    model, trace = apps.get_model("testapp", model), Trace(path)
    with trace.listening():
        if step != "recovery":
            run_next(model, is_atomic, trace.action())
        if step == "action":
            name = moment.split()[0]
            run_next(model, is_atomic, trace.action(**{name: trace.die}))
        with fault(step, moment, trace.die):
            if step == "renewal":
                source = Source.of(model.objects, "status")
                (claim,) = verbs.claim(source)
                verbs.renew(source, {claim.row.key: {claim.lease}})
            else:
                run_next(model, is_atomic, trace.action())


@pytest.mark.parametrize(("model", "is_atomic", "step", "moment", "state", "begun", "attempts"), [*cells()])
def test_task_of_a_worker_that_was_killed_is_neither_lost_nor_owned_twice_nor_charged_wrongly(
    model, is_atomic, step, moment, state, begun, attempts, processes, tmp_path, vendor
):
    if (step, moment) == ("claim", "before the commit") and vendor == "postgresql" and is_one_statement():
        pytest.skip("a claim is one statement in autocommit")
    path = tmp_path / "trace"
    model, trace = apps.get_model("testapp", model), Trace(path)
    neighbour = model.objects.create(status=Status.waiting(0))
    victim = model.objects.create(status=Status.working(0) if step == "recovery" else Status.waiting(1))
    worker = processes.start(work_until_killed, model.__name__, is_atomic, step, moment, str(path))
    assert worker.wait() == KILLED, worker.errors
    assert stored(victim).state.name == state

    drain(model, is_atomic, trace)
    trace.check()
    for task, times, charged in ((neighbour, 1, 1), (victim, begun, attempts)):
        assert (stored(task).state, stored(task).attempts) == (State.finished, charged)
        assert [event["pk"] for event in trace.read("begins")].count(task.pk) == times
        effects = Ledger.objects.filter(task=task.pk).count()
        assert effects == (1 if is_atomic or moment == "before the effect" else times)
    assert not trace.read("lease_lost")
    assert len(trace.read("task_recovered")) == (state == "working")
    if model.__name__ == "StampedPaper":
        assert set(model.objects.values_list("pages", flat=True)) == {1}


def is_one_statement():
    return conf.get("ENGINE") == "auto"
