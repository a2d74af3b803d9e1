"""Django tasks that real workers run: which they serve, how they stop, and what becomes of whoever dies."""

import os
import signal
import time

import pytest

from modelqueue import State
from tests.pace import within
from tests.processes import wait_until
from tests.task_backend.backends import queue_of
from tests.task_backend.serving import SERVED, VARIABLES
from tests.testapp.models import Errand, Ledger
from tests.worker.workers import is_gone

pytestmark = pytest.mark.django_db(transaction=True)

LEASE = SERVED["default"]["OPTIONS"]["lease"]


@pytest.fixture
def deeds(settings):
    settings.TASKS = SERVED
    from tests.task_backend import deeds

    return deeds


@pytest.fixture
def serve(workers):
    """Start a worker that serves the backends."""

    def start(*arguments, **variables):
        return workers.start(*arguments, variables=VARIABLES | variables)

    return start


def now(result):
    """The result as it is now."""
    result.refresh()
    return result


def state(result):
    return now(result).status.name


def is_done(*results):
    return lambda: all(now(result).is_finished for result in results)


def runs(number):
    return Ledger.objects.filter(task=number).count()


def process_of(result):
    return int(now(result).worker_ids[-1].rpartition(":")[2])


# What is served


def test_worker_serves_the_queues_of_all_backends_by_itself(deeds, serve):
    one = deeds.do.enqueue("this", number=-1)
    mail = deeds.do.using(queue_name="mail").enqueue("that")
    nightly = deeds.do.using(backend="reports", queue_name="nightly").enqueue()
    whatever = deeds.do.using(backend="any", queue_name="whatever").enqueue()
    told = deeds.tell.enqueue(number=5)
    errand = Errand.objects.create()
    worker = serve("--drain")
    assert worker.process.wait(60) == 0, worker.output
    assert [state(one) for one in (one, mail, nightly, whatever, told)] == ["SUCCESSFUL"] * 5
    assert [result.return_value for result in (one, mail)] == ["did this", "did that"]
    assert told.return_value == {"number": 5, "id": told.id, "attempt": 1}
    assert now(one).attempts == 1
    assert one.errors == []
    assert Ledger.objects.get(task=-1).worker == str(process_of(one))
    errand.refresh_from_db()
    assert errand.status.state == State.finished
    for name in ("any", "default", "mail", "reports:nightly"):
        assert f"  {name} " in worker.output
    assert "Serving 6 queues with 1 process of 4 threads" in worker.output


@pytest.mark.parametrize(
    ("arguments", "served"),
    [
        (["mail", "any"], {"mail", "any"}),
        (["--exclude", "mail", "--exclude", "reports:nightly"], {"default", "any"}),
    ],
)
def test_worker_serves_those_queues_alone_that_it_is_told(arguments, served, deeds, serve):
    results = {
        "default": deeds.do.enqueue(),
        "mail": deeds.do.using(queue_name="mail").enqueue(),
        "reports:nightly": deeds.do.using(backend="reports", queue_name="nightly").enqueue(),
        "any": deeds.do.using(backend="any", queue_name="here").enqueue(),
    }
    worker = serve("--drain", *arguments)
    assert worker.process.wait(60) == 0, worker.output
    assert {name for name, result in results.items() if state(result) == "SUCCESSFUL"} == served
    assert {state(result) for name, result in results.items() if name not in served} == {"READY"}


def test_queue_that_no_backend_has_is_refused_by_name(serve):
    worker = serve("mial")
    assert worker.process.wait(30) == 2
    assert "There is no queue 'mial'. Did you mean 'mail'?" in worker.output


def test_task_that_comes_later_is_run_while_the_worker_waits(deeds, serve):
    worker = serve("--poll", 0.2)
    wait_until(lambda: "Stop it with Ctrl-C" in worker.output)
    result = deeds.do.enqueue()
    wait_until(is_done(result))
    assert now(result).started_at >= result.enqueued_at
    assert worker.stop()[0] == 0
    wait_until(is_gone(worker))


def test_task_that_fails_is_tried_again_and_ends_failed_with_the_error_of_every_attempt(deeds, serve):
    result = deeds.do.enqueue("fail thus", number=-1)
    worker = serve("--drain")
    assert worker.process.wait(60) == 0, worker.output
    # Its second attempt waits for the next look for tasks that are due, which a drain does not wait for.
    while not is_done(result)():
        assert serve("--drain").process.wait(60) == 0
    assert state(result) == "FAILED"
    assert runs(-1) == result.attempts == len(result.errors) == 3
    assert {error.exception_class for error in result.errors} == {ValueError}
    assert all("ValueError: thus" in error.traceback for error in result.errors)


# Stopping


def test_task_that_runs_may_end_when_its_worker_is_told_to_stop(deeds, serve):
    running, waiting = deeds.do.enqueue("doze 1.5", number=-1), None
    worker = serve("--threads", 1, "--grace", 20)
    wait_until(lambda: runs(-1))
    waiting = deeds.do.enqueue()
    assert worker.stop(signal.SIGTERM)[0] == 0
    assert (state(running), running.attempts, runs(-1)) == ("SUCCESSFUL", 1, 1)
    assert (state(waiting), waiting.worker_ids) == ("READY", [])
    wait_until(is_gone(worker))


def test_task_that_outlasts_the_grace_time_waits_as_if_it_had_never_begun(deeds, serve):
    result = deeds.do.enqueue("doze 60", number=-1)
    worker = serve("--grace", 0.5)
    wait_until(lambda: runs(-1))
    assert worker.stop()[0] == 0
    assert (state(result), result.attempts, result.errors, result.started_at) == ("READY", 0, [], None)


# Deaths


@pytest.mark.parametrize("victim", ["process", "group"])
def test_task_of_a_killed_worker_runs_again_and_ends_successful(victim, deeds, serve):
    result = deeds.do.enqueue("doze 3", number=-1)
    worker = serve()
    wait_until(lambda: runs(-1))
    first = now(result).worker_ids
    if victim == "process":
        os.kill(process_of(result), signal.SIGKILL)
    else:
        worker.kill_group()
        worker = serve()
    began = time.monotonic()
    wait_until(lambda: runs(-1) == 2)
    seconds = time.monotonic() - began
    print(f"\nruns again {seconds:.1f} s after SIGKILL of its {victim}, with a lease of {LEASE} s")
    # It waits for its turn behind those that are ready until the worker has looked what is due.
    promised = 2 + 1 if victim == "process" else queue_of().recovery().lease.total_seconds() + 5 + 1
    assert seconds < within(promised)
    wait_until(is_done(result))
    assert (state(result), result.return_value) == ("SUCCESSFUL", "did doze 3")
    assert (result.attempts, runs(-1)) == (2, 2)
    assert result.worker_ids[:1] == first
    assert result.worker_ids[1] == f"{first[0].rpartition(':')[0]}:{Ledger.objects.last().worker}"
    assert len(set(result.worker_ids)) == 2
    (error,) = result.errors
    died, told = {
        "process": ("modelqueue.exceptions.WorkerDied", "was killed by SIGKILL"),
        "group": ("modelqueue.exceptions.LeaseExpired", "its worker was killed or cut off"),
    }[victim]
    assert error.exception_class_path == died
    assert told in error.traceback
    assert result.started_at < result.last_attempted_at < result.finished_at


def test_task_that_kills_its_worker_each_time_ends_failed_and_its_neighbours_finish(deeds, serve):
    before = [deeds.do.enqueue("doze 0.05") for _ in range(15)]
    killer = deeds.do.enqueue("die", number=-1)
    after = [deeds.do.enqueue("doze 0.05") for _ in range(15)]
    worker = serve("--threads", 4)
    wait_until(is_done(killer, *before, *after))
    assert (state(killer), killer.attempts, runs(-1)) == ("FAILED", 3, 3)
    assert len(set(killer.worker_ids)) == len(killer.errors) == 3
    assert {error.exception_class_path for error in killer.errors} == {"modelqueue.exceptions.WorkerDied"}
    assert {state(one) for one in before + after} == {"SUCCESSFUL"}
    assert worker.stop()[0] == 0


# Time limits, and cancel while running


def test_task_that_hangs_is_ended_at_its_own_timeout_with_the_reason(deeds, serve):
    result, neighbour = deeds.hang.enqueue(-1), deeds.do.enqueue("doze 4", number=-2)
    serve("--threads", 2)
    wait_until(is_done(result))
    assert (state(result), result.attempts, runs(-1)) == ("FAILED", 2, 2)
    assert [error.exception_class_path for error in result.errors] == ["modelqueue.exceptions.TimedOut"] * 2
    assert all("took longer than its timeout of 0:00:01" in error.traceback for error in result.errors)
    wait_until(is_done(neighbour))
    assert (state(neighbour), neighbour.attempts) == ("SUCCESSFUL", 1)


def test_coroutine_that_awaits_too_long_is_canceled_and_its_process_stays(deeds, serve):
    result, neighbour = deeds.linger.enqueue(), deeds.do.enqueue("doze 4", number=-2)
    worker = serve("--threads", 2)
    wait_until(is_done(result))
    assert (result.finished_at - result.started_at).total_seconds() < within(3)
    assert (state(result), result.attempts) == ("FAILED", 1)
    assert result.errors[0].exception_class_path == "modelqueue.exceptions.TimedOut"
    wait_until(is_done(neighbour))
    assert (state(neighbour), neighbour.attempts) == ("SUCCESSFUL", 1)
    assert "await asyncio.sleep(60)" in result.errors[0].traceback
    assert "although it was interrupted" not in worker.output
    assert written_of(-3) == ["began", "cleaned up"]


def test_coroutine_that_awaits_is_canceled_when_the_worker_stops_and_given_back(deeds, serve):
    result = deeds.linger_long.enqueue()
    worker = serve("--grace", 1)
    wait_until(lambda: written_of(-4))
    worker.stop()
    assert written_of(-4) == ["began", "cleaned up"]
    assert (state(result), result.attempts) == ("READY", 0)


def written_of(number):
    return list(Ledger.objects.filter(task=number).order_by("pk").values_list("worker", flat=True))


@pytest.mark.vendor("postgresql")  # the process that dies is the same everywhere
def test_task_that_can_not_be_interrupted_is_ended_with_its_process_and_its_neighbour_is_not(deeds, serve):
    result, neighbour = deeds.swallow.enqueue(-1), deeds.do.enqueue("doze 3", number=-2)
    worker = serve("--threads", 2, "--grace", 6)
    wait_until(lambda: runs(-1) and runs(-2))
    stuck = process_of(result)
    wait_until(is_done(result, neighbour))
    assert (state(result), result.attempts, runs(-1)) == ("FAILED", 1, 1)
    assert result.errors[0].exception_class_path == "modelqueue.exceptions.TimedOut"
    assert "until its process was killed" in result.errors[0].traceback
    assert stuck not in worker.members()
    assert (state(neighbour), neighbour.attempts) == ("SUCCESSFUL", 1)


def test_task_that_is_canceled_while_it_runs_hears_of_it_and_ends_failed(deeds, serve):
    result = deeds.do.enqueue("watch", number=-1)
    worker = serve()
    wait_until(lambda: runs(-1))
    backend = result.task.get_backend()
    assert state(result) == "RUNNING"
    assert backend.cancel(result.id)
    began = time.monotonic()
    assert state(result) == "FAILED"
    wait_until(lambda: "its outcome finish is dropped; it was canceled meanwhile" in worker.output)
    assert time.monotonic() - began < within(LEASE / 3 + 1)
    assert (state(result), result.attempts) == ("FAILED", 1)
    assert "canceled while it ran" in result.errors[0].traceback
    assert not backend.cancel(result.id)
    assert worker.stop()[0] == 0
    assert state(result) == "FAILED"
