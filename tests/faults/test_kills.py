"""Workers that are killed at each fault point: nothing is lost, owned twice, or charged wrongly."""

import pytest

from modelqueue import State
from tests.actions import stored
from tests.faults.harm import KILLED
from tests.faults.tables import lines, skip_where_missing
from tests.faults.trace import Trace
from tests.faults.workers import drain, make_tasks, work_until_killed
from tests.testapp.models import Ledger, StampedPaper

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


@lines(POINTS, POINTS_OF_ATOMIC)
def test_task_of_a_killed_worker_is_neither_lost_nor_owned_twice_nor_charged_wrongly(
    model, is_atomic, step, moment, expected, processes, tmp_path, vendor
):
    skip_where_missing(step, moment, vendor)
    state, begun, attempts = expected
    path = tmp_path / "trace"
    trace = Trace(path)
    neighbour, victim = make_tasks(model, step)
    worker = processes.start(work_until_killed, model.__name__, is_atomic, step, moment, str(path))
    assert worker.wait() == KILLED, worker.errors
    assert stored(victim).state.name == state

    with trace.listening():
        drain(model, is_atomic, trace)
    trace.check()
    for task, times, charged in ((neighbour, 1, 1), (victim, begun, attempts)):
        assert (stored(task).state, stored(task).attempts) == (State.finished, charged)
        assert [event["pk"] for event in trace.read("begins")].count(task.pk) == times
        effects = Ledger.objects.filter(task=task.pk).count()
        assert effects == (1 if is_atomic or moment == "before the effect" else times)
    assert not trace.read("lease_lost")
    assert len(trace.read("task_recovered")) == (state == "working")
    if model is StampedPaper:
        assert set(model.objects.values_list("pages", flat=True)) == {1}
