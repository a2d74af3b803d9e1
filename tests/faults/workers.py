"""What workers do in the tests of faults, in this process or in one of their own.

(Apart from the tests, since a process that imports pytest takes a third longer to start.)
"""

from __future__ import annotations

import datetime as dt

from django.apps import apps

from modelqueue import Status, clock, run, verbs
from modelqueue.source import Source
from modelqueue.status import ONE_HOUR
from tests.faults.points import fault
from tests.faults.trace import Trace
from tests.processes import wait_until


def run_next(model, is_atomic, action):
    return run(model.objects, "status", action, timeout=ONE_HOUR, atomic=is_atomic)


def make_tasks(model, step):
    """Return two tasks, of which the second meets a fault in this step."""
    neighbour = model.objects.create(status=Status.waiting(0))
    is_expired = step == "recovery"
    victim = model.objects.create(status=Status.working(0) if is_expired else Status.waiting(1))
    return neighbour, victim


def work_into(model, is_atomic, step, moment, do, trace):
    """Run the first of the two tasks, and the second into a fault; return what the last call returned."""
    if step != "recovery":
        run_next(model, is_atomic, trace.action())
    if step == "action":
        return run_next(model, is_atomic, trace.action(**{moment.split()[0]: do}))
    with fault(step, moment, do):
        if step == "renewal":
            source = Source.of(model.objects, "status")
            (claim,) = verbs.claim(source)
            return verbs.renew(source, {claim.row.key: {claim.lease}})
        return run_next(model, is_atomic, trace.action())


def work_until_killed(model, is_atomic, step, moment, path):
    trace = Trace(path)
    with trace.listening():
        work_into(apps.get_model("testapp", model), is_atomic, step, moment, trace.die, trace)


def later():
    """A time at which the lease of whoever is dead has run out."""
    return dt.datetime.now(dt.timezone.utc) + 2 * ONE_HOUR


def drain(model, is_atomic, trace):
    """Work as others do after the death of one, until all is done.

    The server may need a moment to find out that nobody will end the transaction of the dead one.
    """

    def is_done():
        is_idle = run_next(model, is_atomic, trace.action()) is None
        return is_idle and not model.objects.exclude(status__state="finished").exists()

    with clock.use(later), trace.listening():
        wait_until(is_done)
