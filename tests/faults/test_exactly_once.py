"""`atomic=True` under fire: workers die at every fault point, and each effect is there exactly once."""

import os
import random
from collections import Counter

import pytest

from modelqueue import State
from tests.faults.harm import KILLED
from tests.faults.tables import is_missing
from tests.faults.trace import Trace
from tests.faults.workers import work_under_fire
from tests.processes import wait_until
from tests.testapp.models import Ledger, Task

#: MODELQUEUE_TEST_TASKS=2000 makes it a long run.
TASKS = int(os.environ.get("MODELQUEUE_TEST_TASKS", "300"))
#: How many of them there are for each round through all points.
PER_ROUND = 300
WORKERS = 3

POINTS = [
    ("claim", "before the statement"),
    ("claim", "before the commit"),
    ("claim", "before the answer"),
    ("hold", "before the statement"),
    ("hold", "before the commit"),
    ("action", "before the effect"),
    ("action", "after the effect"),
    ("outcome", "before the statement"),
    ("outcome", "before the commit"),
    ("outcome", "before the answer"),
]


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize("using", ["default", pytest.param("other", marks=pytest.mark.vendor("sqlite"))])
def test_each_effect_is_there_once_though_workers_die_at_every_point(using, processes, tmp_path, vendor):
    Task.objects.using(using).bulk_create([Task() for _ in range(TASKS)])
    trace = Trace(tmp_path / "trace")
    points = [point for point in POINTS if not is_missing(*point, vendor)]
    harms = [("kill", [point]) for point in points]
    if vendor != "sqlite":
        harms += [("cut", points), ("end_session", points)]
    harms *= max(TASKS // PER_ROUND, 1)
    random.shuffle(harms)

    started = []
    for harm, at in harms:
        wait_until(lambda: sum(worker.alive for worker, _ in started) < WORKERS)
        aimed = [(*point, random.randint(1, PER_ROUND // 40)) for point in at]
        worker = processes.start(work_under_fire, using, str(trace.path), harm, aimed)
        started.append((worker, harm))
    for worker, harm in started:
        if harm == "kill":
            assert worker.wait() == KILLED, worker.errors
        else:
            assert worker.result() == []
    work_under_fire(using, trace.path, "none", [])

    effects = Counter(Ledger.objects.using(using).values_list("task", flat=True))
    assert effects == dict.fromkeys(Task.objects.using(using).values_list("pk", flat=True), 1)
    assert len(effects) == TASKS
    assert set(Task.objects.using(using).values_list("status__state", flat=True)) == {State.finished}
    trace.check()
    finished = Counter(event["pk"] for event in trace.read("task_finished") if event["outcome"] == "finish")
    assert set(finished.values()) == {1}
    attempts = sum(Task.objects.using(using).values_list("status__attempts", flat=True))
    assert attempts - TASKS <= len(trace.read("dies", "raises", "lease_lost"))
