"""Each fault point is arrived at, on each database: no test of faults passes by missing its point."""

import threading

import pytest
from django.db import connection

from modelqueue import ZERO_SECS, conf, run, verbs
from modelqueue.outcomes import Policy
from modelqueue.source import Source
from tests.actions import succeed
from tests.faults.points import MOMENTS, STEPS, fault
from tests.testapp.models import StampedPaper, Task

pytestmark = pytest.mark.django_db(transaction=True)


def go_through_all_steps(model):
    """Claim, renew, recover, and run a task both ways."""
    model.objects.create()
    model.objects.create()
    source = Source.of(model.objects, "status")
    (claim,) = verbs.claim(source)
    verbs.renew(source, {claim.row.key: {claim.lease}})
    verbs.recover(source, Policy(timeout=ZERO_SECS))
    run(model.objects, "status", succeed)
    run(model.objects, "status", succeed, atomic=True)


def go_through_all_steps_and_close(model):
    go_through_all_steps(model)
    connection.close()


@pytest.mark.parametrize("model", [Task, StampedPaper])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("step", STEPS)
def test_each_point_is_arrived_at(step, moment, model, vendor):
    has_no_such_moment = {("hold", "before the answer")}  # its transaction is committed by the outcome
    if vendor == "postgresql" and conf.get("ENGINE") == "auto":
        has_no_such_moment.add(("claim", "before the commit"))  # a claim is one statement in autocommit
    with fault(step, moment, lambda connection: None) as point:
        go_through_all_steps(model)
    assert (point.count == 0) == (point.point in has_no_such_moment)


def test_fault_happens_once_at_its_turn_and_in_its_thread_alone():
    happened = []
    with fault("claim", "before the statement", happened.append, nth=2):
        thread = threading.Thread(target=go_through_all_steps_and_close, args=[Task])
        thread.start()
        thread.join()
        assert not happened
        go_through_all_steps(Task)
    go_through_all_steps(Task)
    assert happened == [connection]
