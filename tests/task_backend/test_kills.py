"""Atomic Django tasks while workers are killed again and again: each effect is there exactly once.

`make task-kills` runs 10,000 of them, and shows how often whom.
"""

import os
import random
import signal
from collections import Counter

import pytest

from modelqueue.task_backend.queues import task_queues
from tests.processes import wait_until
from tests.task_backend.serving import SERVED, VARIABLES
from tests.testapp.models import Ledger

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.vendor("postgresql")]

TASKS = int(os.environ.get("MODELQUEUE_TEST_TASKS", "800"))
WORKERS = 3
#: One kill for so many tasks, about; the most seconds that one takes.
PER_KILL, LONGEST = 80, 0.02
VICTIMS = ("process", "process", "group", "supervisor", "fork server")


def start(workers):
    return workers.start("default", "--threads", 3, variables=VARIABLES)


def processes_of(worker):
    server = worker.fork_server
    return worker.members("multiprocessing.forkserver", parent=server) if server else []


def strike(team, workers):
    """Kill a part of one of the workers; where it can not go on, another one takes its place."""
    worker = random.choice([one for one in team if one.members()])
    victim = random.choice(VICTIMS)
    if victim == "group":
        worker.kill_group()
    else:
        processes = processes_of(worker)
        found = {"supervisor": worker.pid, "fork server": worker.fork_server}
        pid = random.choice(processes or [0]) if victim == "process" else found[victim]
        if not pid:  # it is about to be replaced
            return None
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return None
    if victim in ("group", "supervisor"):
        team[team.index(worker)] = start(workers)
    return victim


def test_each_effect_of_atomic_tasks_is_there_once_though_workers_are_killed_at_random(workers, settings):
    settings.TASKS = SERVED
    from tests.task_backend.deeds import book

    backend = book.get_backend()
    results = backend.enqueue_many((book, [n, random.uniform(0, LONGEST)], {}) for n in range(TASKS))
    (queue,) = [one for one in task_queues() if one.name == "default"]
    team, struck, goal = [start(workers) for _ in range(WORKERS)], Counter(), 0
    wait_until(lambda: queue.tally()["working"] >= 2 * WORKERS)
    for worker in team[:]:  # all at once, so that attempts are lost for sure
        worker.kill_group()
        team[team.index(worker)] = start(workers)
    while True:
        goal += random.randint(1, 2 * PER_KILL)
        if goal >= TASKS:
            break
        wait_until(lambda goal=goal: Ledger.objects.count() >= goal)
        struck[strike(team, workers)] += 1
    wait_until(lambda: queue.tally()["finished"] == TASKS, timeout=120)
    assert Counter(Ledger.objects.values_list("task", flat=True)) == dict.fromkeys(range(TASKS), 1)

    again = Counter()
    for result in (backend.get_result(result.id) for result in results):
        assert result.status.name == "SUCCESSFUL"
        assert result.attempts == len(result.errors) + 1
        again.update(error.exception_class_path.rpartition(".")[2] for error in result.errors)
    print(f"\n{TASKS} tasks; killed: {dict(struck)}; attempts that were lost: {dict(again)}")
    assert sum(again.values()) > 0
    assert set(again) <= {"WorkerDied", "LeaseExpired"}
