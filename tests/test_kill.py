"""Workers that are killed with SIGKILL: nothing is lost, and each attempt is counted."""

import datetime as dt
import os
import random
import time

import pytest

import modelqueue
from tests.processes import wait_until
from tests.testapp.models import Ledger, Task

#: Long enough for one that lives, on a busy machine.
TIMEOUT = dt.timedelta(seconds=6)
TASKS = 300
KILLS = 6


def note_and_linger(task):
    Ledger.objects.create(task=task.pk, worker=str(os.getpid()))
    time.sleep(0.03)  # most of the time of an attempt, so that a kill is likely to hit an action


def run_until_done():
    while True:
        try:
            task = modelqueue.run(Task.objects.all(), "status", note_and_linger, retry=8, timeout=TIMEOUT)
        except Exception:
            time.sleep(0.01)
            continue
        if task is None:
            if not Task.objects.filter(status__state__in=["waiting", "working"]).exists():
                return
            time.sleep(0.1)


@pytest.mark.django_db(transaction=True)
def test_tasks_of_workers_that_are_killed_at_random_moments_end_finished(processes):
    Task.objects.bulk_create([Task() for _ in range(TASKS)])
    workers = [processes.start(run_until_done) for _ in range(3)]
    for _ in range(KILLS):
        victim = workers.pop(0)
        runs = random.randint(1, 5)
        wait_until(lambda pid=victim.pid, runs=runs: Ledger.objects.filter(worker=pid).count() >= runs)
        time.sleep(random.uniform(0, 0.02))  # the moment is what is random here
        victim.kill()
        workers.append(processes.start(run_until_done))
    for worker in workers:
        worker.result(120)

    statuses = [task.status for task in Task.objects.all()]
    assert {status.state for status in statuses} == {modelqueue.State.finished}
    # A killed worker held one task at most, and that attempt is counted.
    assert len(statuses) == TASKS
    extra = sum(status.attempts for status in statuses) - TASKS
    assert 1 <= extra <= KILLS
    for task in Task.objects.all():
        runs = Ledger.objects.filter(task=task.pk).count()
        assert 1 <= runs <= task.status.attempts  # it may have been killed just before it wrote
