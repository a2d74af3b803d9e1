"""Whoever of a worker is killed, whenever: nothing is lost, and all goes on within seconds.

A process of a worker stands still at a moment, see `tests.faults.halts`, until it is killed there, or goes on
as somebody else was. `make kill-matrix` shows the times.
"""

import os
import signal
import time

import pytest
from django.db import connection

from modelqueue import State, Status
from tests.actions import stored
from tests.faults.halts import MOMENTS, Halt
from tests.faults.targets import DjangoTasks, Errands
from tests.pace import within
from tests.processes import wait_until
from tests.testapp.models import Ledger
from tests.worker.workers import is_gone

pytestmark = pytest.mark.django_db(transaction=True)

#: When the actions have ended.
ENDED = ("writing", "written")
VICTIMS = ("process", "supervisor", "fork server", "group")
IDLE = "idle"
#: Where a living supervisor makes it quick, seconds until a task can run again; beyond the lease, else.
AT_ONCE, EXTRA = 2, 5

ERRANDS, DJANGO_TASKS = Errands(), DjangoTasks()


def cells():
    """All on PostgreSQL. What dies is the same elsewhere; what the database makes of that is not.

    Of Django tasks what they do when their process dies: who else is dead is nothing to them.
    """
    if connection.vendor != "postgresql":
        moments = "acting", "writing", "written"
        return [(ERRANDS, victim, moment) for victim in ("process", "group") for moment in moments]
    return [
        *((ERRANDS, victim, moment) for victim in VICTIMS for moment in (IDLE, *MOMENTS)),
        *((DJANGO_TASKS, victim, moment) for victim in ("process", "group") for moment in MOMENTS),
    ]


@pytest.fixture
def target(request):
    with request.param.serving():
        yield request.param


@pytest.mark.parametrize(("target", "victim", "moment"), cells(), ids=str, indirect=["target"])
def test_kill(target, victim, moment, workers, tmp_path):
    if moment == IDLE:
        worker, process = idle(workers, target)
        tasks, held = [], []
    else:
        worker, process, tasks, halt = met(workers, tmp_path, moment, target=target)
        held = tasks[:2]
    kill(worker, victim, process)
    killed = time.monotonic()
    if moment == IDLE:
        tasks = target.make("", "", "")
    if moment in ENDED:
        tasks += target.make("")
    is_replaced = victim in ("supervisor", "group")
    other = (
        workers.start(*target.queues, "--threads", 2, variables=target.variables) if is_replaced else worker
    )
    if victim in ("supervisor", "fork server") and moment != IDLE:  # its processes end what they have in hand
        if moment == "acting":  # whose lease is renewed: so others have time for what they must not do
            wait_until(is_finished(tasks[2]))
        halt.go_on()
    wait_until(lambda: all(can_run_again(task) for task in held))
    again = time.monotonic() - killed
    wait_until(is_finished(*tasks))
    done = time.monotonic() - killed
    again = again if held else done
    print(f"\n{victim}, {moment}: can run again after {again:.1f} s, all are finished after {done:.1f} s")
    assert again < within(longest(victim, moment, target))
    attempts, runs = expected(victim, moment)
    assert (attempts_of(tasks), runs_of(tasks)) == (attempts, runs)
    target.check(tasks)
    wait_until(lambda: "Stop it with Ctrl-C" in other.output)
    assert other.stop()[0] == 0
    wait_until(is_gone(worker))
    wait_until(is_gone(other))


def expected(victim, moment):
    """How many attempts are counted for two tasks in hand and one that waits, and how often each is run."""
    if victim in ("supervisor", "fork server") or moment == IDLE:
        return [1, 1, 1], [1, 1, 1]
    if (victim, moment) == ("process", "told"):  # who had not begun pays nothing
        return [1, 1, 1], [1, 1, 1]
    if moment in ("claimed", "told"):  # nobody is left who knows that they had not
        return [1, 2, 2], [1, 1, 1]
    if moment == "written":  # the outcome of one of the two
        return [1, 1, 2], [1, 1, 2]
    return [1, 2, 2], [1, 2, 2]


def longest(victim, moment, target):
    """Within how many seconds what was in hand can run again; where nothing was, a new task is run."""
    if victim == "process" and moment not in (IDLE, "claimed"):
        return AT_ONCE
    if victim == "fork server" and moment not in (IDLE, "claimed", "acting"):
        return AT_ONCE
    return target.seconds_of_lease() + EXTRA


# Steps


def start(workers, target, *options, **variables):
    return workers.start(*target.queues, "--threads", 2, *options, variables=variables | target.variables)


def idle(workers, target):
    """A worker that has nothing to do any more, and its process."""
    (task,) = target.make("")
    worker = start(workers, target)
    wait_until(lambda: stored(task).state == State.finished)
    process = int(Ledger.objects.get().worker)
    Ledger.objects.all().delete()
    return worker, process


def met(workers, folder, moment, *titles, options=(), target=ERRANDS):
    """A worker that stands still, its process, which has two tasks in hand, and these and one that waits.

    Where the actions of the two have ended the one would have a slot of theirs, so there it is to come later.
    """
    halt = Halt(folder, moment)
    waiting = [] if moment in ENDED else [""]
    tasks = target.make(*(titles or ("", "")), *waiting)
    worker = workers.start(
        *target.queues, "--threads", 2, *options, variables=halt.variables | target.variables
    )
    process = halt.wait()
    if moment not in ("claimed", "told"):
        wait_until(lambda: runs_of(tasks) == [0] * len(waiting) + [1, 1])
    return worker, process, tasks, halt


def kill(worker, victim, process):
    if victim == "group":
        worker.kill_group()
    else:
        found = {"process": process, "supervisor": worker.pid, "fork server": worker.fork_server}
        os.kill(found[victim], signal.SIGKILL)


def can_run_again(task):
    return stored(task).state != State.working or runs(task) > 1


def runs(task):
    return Ledger.objects.filter(task=task.pk).count()


def runs_of(tasks):
    return sorted(runs(task) for task in tasks)


def attempts_of(tasks):
    return sorted(stored(task).attempts for task in tasks)


def is_finished(*tasks):
    return lambda: all(stored(task).state == State.finished for task in tasks)


# Other ways to die, once in an action, beside one that does no harm

once = pytest.mark.vendor("postgresql")


@once
@pytest.mark.parametrize(
    ("title", "told"),
    [("exit", "exited with code 3"), ("overflow", "was killed by SIGSEGV")],
)
def test_action_that_ends_its_process(title, told, workers, tmp_path):
    worker, _, tasks, halt = met(workers, tmp_path, "acting", title, "")
    began = time.monotonic()
    halt.strike()
    wait_until(lambda: all(can_run_again(task) for task in tasks[:2]))
    again = time.monotonic() - began
    wait_until(is_finished(*tasks))
    print(f"\n{title}: can run again after {again:.1f} s, all after {time.monotonic() - began:.1f} s")
    assert again < within(AT_ONCE)
    assert (attempts_of(tasks), runs_of(tasks)) == ([1, 2, 2], [1, 2, 2])
    assert told in worker.output
    assert worker.stop()[0] == 0
    wait_until(is_gone(worker))


@once
def test_process_over_its_memory_is_replaced_at_no_cost(workers, tmp_path):
    worker, process, tasks, halt = met(
        workers, tmp_path, "acting", "hoard", "", options=["--max-memory", 250]
    )
    halt.strike()
    began = time.monotonic()
    wait_until(is_finished(tasks[2]))  # by the next process, as this one stands still
    print(f"\nmemory over --max-memory: another process runs a task after {time.monotonic() - began:.1f} s")
    halt.go_on()
    wait_until(is_finished(*tasks))
    assert (attempts_of(tasks), runs_of(tasks)) == ([1, 1, 1], [1, 1, 1])
    wait_until(lambda: "more than --max-memory 250, and is replaced" in worker.output)
    assert Ledger.objects.exclude(worker=process).get().task == tasks[2].pk
    assert worker.stop()[0] == 0
    wait_until(is_gone(worker))


@once
def test_action_that_gets_no_memory_has_failed_and_its_neighbour_has_not(workers, tmp_path):
    worker, _, tasks, halt = met(workers, tmp_path, "acting", "starve", "")
    halt.strike()
    wait_until(lambda: stored(tasks[0]).attempts == 1)
    halt.go_on()
    wait_until(is_finished(*tasks))
    assert (attempts_of(tasks), runs_of(tasks)) == ([1, 1, 2], [1, 1, 2])
    assert worker.stop()[0] == 0
    wait_until(is_gone(worker))


@once
def test_action_that_ignores_the_stop_is_ended_and_given_back(workers, tmp_path):
    worker, _, tasks, halt = met(workers, tmp_path, "acting", "ignore", "", options=["--grace", 0.5])
    halt.strike()
    code, seconds = worker.stop()
    print(f"\nSIGTERM ignored: stopped after {seconds:.1f} s, with a grace time of 0.5 s")
    assert code == 0
    assert seconds < within(6)
    wait_until(is_gone(worker))
    assert [stored(task) for task in tasks] == [Status.waiting(number) for number in range(3)]
    other = workers.start()
    wait_until(is_finished(*tasks))
    assert (attempts_of(tasks), runs_of(tasks)) == ([1, 1, 1], [1, 2, 2])
    assert other.stop()[0] == 0


@once
def test_stop_of_the_supervisor_lets_actions_end(workers, tmp_path):
    worker, _, tasks, halt = met(workers, tmp_path, "acting", options=["--grace", 20])
    worker.send(signal.SIGTERM)
    wait_until(lambda: "Stopping" in worker.output)
    halt.go_on()
    assert worker.process.wait(30) == 0
    wait_until(is_gone(worker))
    assert [stored(task).state for task in tasks] == [State.finished, State.finished, State.waiting]
    other = workers.start()
    wait_until(is_finished(*tasks))
    assert (attempts_of(tasks), runs_of(tasks)) == ([1, 1, 1], [1, 1, 1])
    assert other.stop()[0] == 0
