"""What workers do in the tests of faults, in this process or in one of their own.

(Apart from the tests, since a process that imports pytest takes a third longer to start.)
"""

from __future__ import annotations

import datetime as dt
from contextlib import ExitStack

from django.apps import apps
from django.db import Error, connections

from modelqueue import Status, clock, run, verbs
from modelqueue.source import Source
from modelqueue.status import ONE_HOUR
from tests.actions import SECOND
from tests.faults.harm import cut, end_session, losing_the_answer
from tests.faults.points import fault
from tests.faults.trace import Trace
from tests.processes import wait_until
from tests.testapp.models import Task


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


def work_under_fire(using, path, harm, points):
    """Work until harm was done at the nth arrival at each of these points; without any, until all is done.

    The timeout is short, as it is waited for. Who is too slow loses the task before the action begins.
    """
    trace = Trace(path)
    pending = {(step, moment) for step, moment, _ in points}
    do = {"kill": trace.die, "cut": cut, "end_session": end_session, "none": None}[harm]
    in_action = {}
    with trace.listening(), ExitStack() as stack:
        for step, moment, nth in points:

            def harmed(connection, point=(step, moment)):
                pending.discard(point)
                do(connection)

            if step == "action":
                in_action[moment.split()[0]] = at_nth(nth, harmed, connections[using])
            else:
                if moment == "before the answer":
                    harmed = losing_the_answer(harmed)
                stack.enter_context(fault(step, moment, harmed, nth, using))
        action = trace.action(**in_action)
        tasks = Task.objects.using(using)
        while pending or not points:
            if not tasks.filter(status__state__in=["waiting", "working"]).exists():
                break
            try:
                run(tasks, "status", action, retry=None, timeout=SECOND, atomic=True)
            except Error:
                trace.note("raises")
    return sorted(pending)


def at_nth(nth, do, connection):
    turns = iter(range(1, nth + 1))

    def arrive():
        if next(turns, None) == nth:
            do(connection)

    return arrive


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

    with clock.use(later):
        wait_until(is_done)
