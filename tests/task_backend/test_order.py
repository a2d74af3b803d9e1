"""In which order workers take Django tasks: by priority, then as they were enqueued, and none too early."""

import datetime as dt
import os
import random

import pytest

from modelqueue.task_backend.queues import task_queues
from tests.actions import SECOND
from tests.pace import within
from tests.processes import wait_until
from tests.task_backend.serving import SERVED, VARIABLES

pytestmark = pytest.mark.django_db(transaction=True)

TASKS = int(os.environ.get("MODELQUEUE_TEST_TASKS", "600"))
WORKERS, SECONDS = 4, 0.03
#: The time in which a deferred task is met that has become due: a look for those, and a sweep of the queue.
SWEEP = 2.0
#: The time in which a claim locks what another one passes over.
MOMENT = 0.2


def test_workers_take_tasks_by_priority_then_by_age_and_none_before_its_time(workers, settings):
    settings.TASKS = SERVED
    from tests.task_backend.deeds import clock_in

    backend, chance = clock_in.get_backend(), random.Random(random.random())
    until = TASKS * SECONDS / WORKERS / 2  # half of the time that all of them take
    calls = []
    for _ in range(TASKS):
        wait = chance.choice([None, dt.timedelta(seconds=chance.uniform(0, until))])
        task = clock_in.using(
            priority=chance.choice([-100, -1, 0, 1, 100, chance.randint(-100, 100)]),
            run_after=None if wait is None else dt.datetime.now(dt.timezone.utc) + SECOND + wait,
        )
        calls.append((task, [SECONDS], {}))
    enqueued = backend.enqueue_many(calls)
    (queue,) = [one for one in task_queues() if one.name == "default"]
    for _ in range(WORKERS):
        workers.start("default", "--threads", 1, variables=VARIABLES)
    wait_until(lambda: queue.tally()["finished"] == TASKS, timeout=120)

    results = [backend.get_result(result.id) for result in enqueued]
    early = [result for result in results if result.started_at < due(result)]
    assert not early
    for result in results:
        began = dt.datetime.fromisoformat(result.return_value)
        assert -0.1 < (began - result.started_at).total_seconds() < within(1)  # it was not held for long
    wrong = passed_over(results)
    longest = max(wrong.values(), default=0.0)
    print(f"\n{TASKS} tasks, {len(wrong)} passed over, the longest for {longest:.2f} s")
    assert longest <= within(SWEEP)
    # Of those that were ready from the start only what somebody has locked for long can be: InnoDB locks
    # more than a statement takes.
    assert len(passed_over([one for one in results if one.task.run_after is None])) <= TASKS / 100
    moments = [result.started_at for result in results]
    assert (max(moments) - min(moments)).total_seconds() > TASKS * SECONDS / WORKERS / 2


def due(result):
    return result.task.run_after or result.enqueued_at


def passed_over(results):
    """Return for how long tasks were due while others were taken that come behind them, by their ids.

    Not for what was in flight together.
    """
    found = {}
    for number, one in enumerate(results):
        rank, moment = (-one.task.priority, due(one), number), one.started_at
        together = moment + dt.timedelta(seconds=within(MOMENT))
        for earlier, other in enumerate(results):
            if (
                other.started_at > together
                and due(other) < moment
                and (-other.task.priority, due(other), earlier) < rank
            ):
                seconds = min(moment - due(other), other.started_at - moment).total_seconds()
                found[other.id] = max(seconds, found.get(other.id, 0.0))
    return found
