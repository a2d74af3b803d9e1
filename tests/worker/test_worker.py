"""The worker, as real processes with real signals: what it runs, how it stops, what dies with it."""

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress

import pytest
from django.db import OperationalError, connection
from django.urls import reverse

import modelqueue
from modelqueue import State, Status
from tests.actions import row, stored
from tests.faults.ahead import claimed_ahead
from tests.pace import within
from tests.processes import wait_until
from tests.testapp.models import Errand, Ledger
from tests.testapp.queues import LEASE, do_errand, review
from tests.worker.workers import is_gone

pytestmark = pytest.mark.django_db(transaction=True)

#: Of processes and signals alone, which are the same on every database: run on the one that costs least.
of_processes = pytest.mark.vendor("sqlite")


def make(*titles, **options):
    """Make errands that wait, and nothing to review."""
    return [Errand.objects.create(title=title, **options) for title in titles]


def runs(errand):
    """How often the action of an errand has begun."""
    return Ledger.objects.filter(task=errand.pk).count()


def is_running(*errands):
    return lambda: all(runs(errand) for errand in errands)


# Running


def test_worker_runs_what_is_declared_and_drains(workers):
    plain, failing, missing, reviewed = make("", "fail so", "miss it", "review")
    worker = workers.start("--drain", "--processes", 2, "--threads", 2)
    assert worker.process.wait(60) == 0, worker.output
    assert [stored(one).state for one in (plain, reviewed)] == [State.finished] * 2
    assert stored(reviewed, "review_status").state == State.finished
    assert row(reviewed).log == ["review", "reviewed"]
    assert (stored(failing).state, stored(failing).attempts, runs(failing)) == (State.canceled, 3, 3)
    assert (stored(missing).state, stored(missing).attempts) == (State.canceled, 1)
    assert "Serving 2 queues with 2 processes of 2 threads:\n" in worker.output
    assert "testapp.do_errand  testapp.Errand.status in default" in worker.output
    assert "Attempts: 4 failed, 3 finished; " in worker.output
    wait_until(is_gone(worker))


@of_processes
def test_drain_of_nothing_says_so(workers):
    worker = workers.start("--drain")
    assert worker.process.wait(60) == 0
    assert "Nothing was due." in worker.output
    assert "with 1 process of 4 threads" in worker.output


def test_each_of_many_tasks_is_run_once(workers):
    Errand.objects.bulk_create([Errand() for _ in range(300)])
    others = [workers.start("--drain", "--processes", 2) for _ in range(2)]
    assert [worker.process.wait(90) for worker in others] == [0, 0]
    assert do_errand.tally()["finished"] == 300
    assert set(Counter(Ledger.objects.values_list("task", flat=True)).values()) == {1}


@of_processes
def test_task_that_comes_later_is_found(workers):
    worker = workers.start("--poll", 0.2)
    wait_until(lambda: "Stop it with Ctrl-C" in worker.output)
    (errand,) = make("")
    wait_until(lambda: stored(errand).state == State.finished)
    assert worker.stop()[0] == 0


# Leases


#: Seconds of a task that takes longer than its lease.
LONG = float(os.environ.get("MODELQUEUE_TEST_LONG", 2.5 * LEASE.total_seconds()))


def test_task_that_takes_longer_than_its_lease_is_run_once(workers):
    (errand,) = make(f"sleep {LONG}")
    worker = workers.start("--processes", 3, "--drain")
    wait_until(is_running(errand))
    first = stored(errand)
    assert worker.process.wait(60) == 0
    assert (stored(errand).state, stored(errand).attempts, runs(errand)) == (State.finished, 1, 1)
    assert first.state == State.working


@of_processes
def test_tasks_of_a_killed_process_can_run_again_within_two_seconds(workers):
    errands = make(*["sleep 60"] * 2)
    workers.start("--threads", 2)
    wait_until(is_running(*errands))
    Errand.objects.update(title="")
    os.kill(int(Ledger.objects.first().worker), signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: do_errand.tally()["working"] == 0 or runs(errands[0]) == 2)
    given_back = time.monotonic() - killed
    wait_until(lambda: do_errand.tally()["finished"] == 2)
    print(f"\ngiven back {given_back:.1f} s, run again {time.monotonic() - killed:.1f} s after the kill")
    assert given_back < within(2)
    assert [(stored(one).attempts, runs(one)) for one in errands] == [(2, 2)] * 2


@of_processes
def test_tasks_of_a_killed_group_run_again_within_the_lease_and_five_seconds(workers):
    errands = make(*["sleep 60"] * 2)
    victim = workers.start("--threads", 2)
    wait_until(is_running(*errands))
    Errand.objects.update(title="")
    victim.kill_group()
    workers.start()
    killed = time.monotonic()
    wait_until(lambda: do_errand.tally()["finished"] == 2)
    seconds = time.monotonic() - killed
    print(f"\nrun again {seconds:.1f} s after the kill, with a lease of {LEASE.total_seconds():.0f} s")
    # The database of one writer gives a lease as long as a renewal may have to wait.
    assert seconds < within(do_errand.recovery().lease.total_seconds() + 5)
    assert [(stored(one).attempts, runs(one)) for one in errands] == [(2, 2)] * 2


@of_processes
def test_process_that_died_is_replaced_and_its_death_is_told(workers):
    (errand,) = make("sleep 60")
    worker = workers.start()
    wait_until(is_running(errand))
    Errand.objects.update(title="")
    os.kill(int(Ledger.objects.get().worker), signal.SIGKILL)
    wait_until(lambda: "was killed by SIGKILL" in worker.output)
    (later,) = make("")
    wait_until(lambda: stored(later).state == State.finished)


# Bystanders

BYSTANDERS = int(os.environ.get("MODELQUEUE_TEST_TASKS", "60"))


def cells():
    """All on PostgreSQL. Elsewhere each once, as what is recorded of one does not depend on the other."""
    if connection.vendor == "postgresql":
        return [(victim, threads) for victim in ("process", "group") for threads in (1, 8)]
    return [("process", 1), ("group", 8)]


@pytest.mark.parametrize(("victim", "threads"), cells())
def test_task_that_kills_its_worker_ends_canceled_and_no_other_because_of_it(victim, threads, workers):
    before, after = BYSTANDERS // 2, BYSTANDERS - BYSTANDERS // 2
    make(*["sleep 0.05"] * before)
    (killer,) = make("die all" if victim == "group" else "die")
    make(*["sleep 0.05"] * after)
    codes, deadline = Counter(), time.monotonic() + 90
    while do_errand.tally()["waiting"] or do_errand.tally()["working"]:
        worker = workers.start("--drain", "--threads", threads, variables=claimed_ahead(BYSTANDERS))
        codes[worker.process.wait(max(1.0, deadline - time.monotonic()))] += 1
    assert codes[-signal.SIGKILL] == (3 if victim == "group" else 0)
    assert (stored(killer).state, stored(killer).attempts, runs(killer)) == (State.canceled, 3, 3)
    assert do_errand.tally() | {"finished": BYSTANDERS, "canceled": 1} == do_errand.tally()


def test_task_on_its_last_attempt_runs_in_a_process_that_runs_nothing_else(workers):
    last, *others = [
        Errand.objects.create(title="sleep 0.5", status=Status.waiting(5, count)) for count in (2, 0, 1)
    ]
    worker = workers.start("--drain")
    assert worker.process.wait(60) == 0
    by_process = dict(Ledger.objects.values_list("task", "worker"))
    assert by_process[last.pk] not in {by_process[other.pk] for other in others}
    assert do_errand.tally()["finished"] == 3


# Time limits, and cancel while running


def make_reviews(*titles):
    """Make errands of which only the review is to be run."""
    return make(*titles, status=Status.created(1), review_status=Status.waiting(5))


def test_actions_that_can_not_be_ended_are_ended_with_their_process_and_neighbors_finish(
    workers, monkeypatch
):
    monkeypatch.setenv("MODELQUEUE_TEST_TIMEOUT", "1.5")
    stuck = make("receive", "swallow")
    neighbor, lasting = make_reviews("sleep 4.5", "sleep 60")
    worker = workers.start("--threads", 2, "--grace", 4)
    wait_until(is_running(*stuck))
    began = time.monotonic()
    Errand.objects.filter(pk__in=[one.pk for one in stuck]).update(title="doze 1")
    first = int(Ledger.objects.first().worker)
    (later,) = make("")
    wait_until(lambda: stored(later).state == State.finished)
    assert first in worker.members()  # another one was started beside it
    assert [stored(one).state for one in stuck] == [State.working] * 2
    for one in stuck:
        wait_until(lambda one=one: row(one).error)
        assert row(one).error.startswith(
            "modelqueue.exceptions.TimedOut: the action took longer than its timeout of 0:00:01.500000"
        )
    print(f"\nended after {time.monotonic() - began:.1f} s, with a timeout of 1.5 s and a grace time of 4 s")
    assert first not in worker.members()
    assert (stored(neighbor, "review_status").state, row(neighbor).log) == (State.finished, ["reviewed"])
    assert stored(lasting, "review_status").attempts == 0
    wait_until(lambda: all(stored(one).state == State.finished for one in stuck))
    assert [(stored(one).attempts, runs(one)) for one in stuck] == [(2, 2)] * 2


def test_async_action_that_is_canceled_in_the_admin_is_canceled_within_a_third_of_the_lease(
    workers, admin_client
):
    (errand,) = make_reviews("sleep 60")
    worker = workers.start("testapp.review")
    wait_until(lambda: stored(errand, "review_status").state == State.working)
    chosen = {"action": "make_review_status_state_canceled", "_selected_action": [errand.pk]}
    admin_client.post(reverse("admin:testapp_errand_changelist"), chosen)
    began, canceled = time.monotonic(), stored(errand, "review_status")
    assert canceled.state == State.canceled
    wait_until(lambda: "its outcome release is dropped; it was canceled meanwhile" in worker.output)
    seconds = time.monotonic() - began
    print(f"\ncanceled after {seconds:.1f} s, with a lease of {LEASE.total_seconds():.0f} s")
    assert seconds < within(LEASE.total_seconds() / 3 + 1)
    assert worker.stop()[0] == 0
    assert stored(errand, "review_status") == canceled
    assert row(errand).log == []


# Stopping


@of_processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_idle_worker_stops_at_once(number, workers):
    (errand,) = make("")
    worker = workers.start("--processes", 2)
    wait_until(lambda: stored(errand).state == State.finished)
    code, seconds = worker.stop(number)
    assert code == 0
    assert seconds < within(5)
    wait_until(is_gone(worker))


@of_processes
def test_running_action_may_end(workers):
    (errand,) = make("doze 1.5")
    worker = workers.start("--grace", 20)
    wait_until(is_running(errand))
    assert worker.stop()[0] == 0
    assert (stored(errand).state, runs(errand)) == (State.finished, 1)
    wait_until(is_gone(worker))


@of_processes
@pytest.mark.parametrize("title", ["doze 60", "sleep 60"])
def test_action_that_outlasts_the_grace_time_is_given_back_uncharged(title, workers):
    """Also one that can not be interrupted: then its process is dead before the task is given back."""
    (errand,) = make(title)
    before = stored(errand)
    worker = workers.start("--grace", 0.5)
    wait_until(is_running(errand))
    code, seconds = worker.stop()
    assert (code, stored(errand)) == (0, before)
    assert seconds < within(6)
    wait_until(is_gone(worker))


@of_processes
def test_second_signal_ends_it_now(workers):
    (errand,) = make("doze 60")
    before = stored(errand)
    worker = workers.start("--grace", 60)
    wait_until(is_running(errand))
    worker.send(signal.SIGINT)
    wait_until(lambda: "Stopping: running tasks may end" in worker.output)
    code, seconds = worker.stop(signal.SIGINT)
    assert (code, stored(errand)) == (0, before)
    assert seconds < within(6)


@of_processes
def test_async_action_is_canceled_at_the_end_of_the_grace_time(workers):
    errand = Errand.objects.create(
        title="sleep 60", status=Status.created(1), review_status=Status.waiting(5)
    )
    worker = workers.start("testapp.review", "--grace", 0.5)
    wait_until(lambda: stored(errand, "review_status").state == State.working)
    assert worker.stop()[0] == 0
    assert stored(errand, "review_status") == Status.waiting(5)


#: Root alone can do so without a namespace of users, and its files are not all seen in one of those.
NOT_ROOT = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
AS_FIRST = ["unshare", *NOT_ROOT, "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.fixture
def as_first():
    """Signals the first process of a namespace, as in a container: what it does not handle does nothing."""
    if shutil.which("unshare") is None or subprocess.run([*AS_FIRST, "true"], check=False).returncode:
        pytest.skip("this system makes no namespaces of processes")

    def stop(worker):
        _, first = worker.members("-m django modelqueue worker")  # that of unshare has it, too
        began = time.monotonic()
        os.kill(first, signal.SIGTERM)
        return worker.process.wait(30), time.monotonic() - began

    return stop


@of_processes
def test_worker_as_the_first_process_of_a_container_stops_in_order(workers, as_first):
    (errand,) = make("doze 1")
    worker = workers.start("--grace", 20, launcher=AS_FIRST)
    wait_until(is_running(errand))
    assert as_first(worker)[0] == 0
    assert (stored(errand).state, runs(errand)) == (State.finished, 1)
    wait_until(is_gone(worker))


@of_processes
def test_first_process_of_a_container_ends_though_its_fork_server_died(workers, as_first):
    """It inherits the processes, which stay there as if alive unless it waits for them."""
    (errand,) = make("doze 60")
    before = stored(errand)
    worker = workers.start("--grace", 1, launcher=AS_FIRST)
    wait_until(is_running(errand))
    for pid in worker.members("multiprocessing.forkserver"):
        os.kill(pid, signal.SIGKILL)
        break
    code, seconds = as_first(worker)
    assert (code, stored(errand)) == (0, before)
    assert seconds < within(10)
    wait_until(is_gone(worker))


@of_processes
def test_thread_that_an_action_has_left_does_not_keep_its_process(workers):
    first, second = make("linger 60", "")
    worker = workers.start("--max-tasks", 1, "--threads", 1)
    began = time.monotonic()
    wait_until(lambda: {stored(first).state, stored(second).state} == {State.finished})
    wait_until(lambda: worker.output.count("has run 1 task and is replaced") == 2)
    assert time.monotonic() - began < within(30)
    assert worker.stop()[1] < within(5)
    wait_until(is_gone(worker))


@of_processes
def test_processes_stop_in_order_when_their_supervisor_is_killed(workers):
    (errand,) = make("doze 1.5")
    worker = workers.start("--processes", 2)
    wait_until(is_running(errand))
    worker.send(signal.SIGKILL)
    wait_until(lambda: stored(errand).state == State.finished)
    wait_until(is_gone(worker))
    assert (stored(errand).attempts, runs(errand)) == (1, 1)


@of_processes
@pytest.mark.parametrize("is_first", [True, False], ids=["the first", "the next"])
def test_signal_to_the_whole_group_is_as_one_to_the_supervisor(is_first, workers):
    """As service managers and terminals do it. The fork server must outlive the processes."""
    worker = workers.start("--processes", 2, "--grace", 20)
    wait_until(lambda: "Stop it with Ctrl-C" in worker.output)
    server = wait_until(lambda: worker.fork_server)
    if not is_first:
        os.kill(server, signal.SIGKILL)
        server = wait_until(lambda dead=server: worker.fork_server if worker.fork_server != dead else 0)
    (errand,) = make("doze 1.5")
    wait_until(is_running(errand))
    os.killpg(worker.pid, signal.SIGTERM)
    wait_until(lambda: "Stopping" in worker.output)
    assert worker.fork_server == server
    assert worker.process.wait(30) == 0
    assert (stored(errand).state, runs(errand)) == (State.finished, 1)
    wait_until(is_gone(worker))


@of_processes
def test_process_that_hangs_holds_up_neither_the_others_nor_the_stop(workers):
    (errand,) = make("sleep 60")
    worker = workers.start("--processes", 2, "--threads", 1, "--grace", 0.5)
    wait_until(is_running(errand))
    hung = int(Ledger.objects.get().worker)
    os.kill(hung, signal.SIGSTOP)
    later = make(*[""] * 30)
    wait_until(lambda: all(stored(one).state == State.finished for one in later))
    code, seconds = worker.stop()
    assert code == 0
    assert seconds < within(10)
    assert "does not stop and is killed" in worker.output
    wait_until(is_gone(worker))


@of_processes
def test_program_that_an_action_starts_can_be_terminated(workers):
    (errand,) = make("terminate")
    workers.start()
    wait_until(lambda: stored(errand).state == State.finished)
    assert row(errand).log == ["terminated by 15"]


@of_processes
def test_process_that_is_to_be_replaced_lets_its_tasks_end_however_long_they_take(workers):
    (errand,) = make("doze 3")
    worker = workers.start("--max-seconds", 1, "--grace", 0.5, "--drain")
    assert worker.process.wait(30) == 0
    assert (stored(errand).state, runs(errand)) == (State.finished, 1)


@of_processes
def test_worker_that_can_not_write_its_health_file_goes_on(workers, tmp_path):
    worker = workers.start("--health-file", tmp_path / "nowhere" / "health")
    (errand,) = make("")
    wait_until(lambda: stored(errand).state == State.finished)
    wait_until(lambda: "nowhere/health can not be written" in worker.output)
    assert worker.stop()[0] == 0


@pytest.mark.vendor("postgresql", "mysql")
def test_worker_whose_sessions_the_server_has_ended_goes_on(workers):
    (first,) = make("")
    worker = workers.start()
    wait_until(lambda: stored(first).state == State.finished)
    if connection.vendor == "postgresql":
        assert names_of_other_sessions() == {f"modelqueue worker {modelqueue.__version__}"}
    end_other_sessions()
    wait_until(lambda: "answers again" in worker.output)
    (second,) = make("")
    wait_until(lambda: stored(second).state == State.finished)


def names_of_other_sessions():
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT application_name FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid != pg_backend_pid() "
            "AND backend_type = 'client backend'"
        )
        return {name for (name,) in cursor.fetchall()}


def end_other_sessions():
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid != pg_backend_pid()"
            )
            return
        cursor.execute(
            "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id != CONNECTION_ID()"
        )
        for (number,) in cursor.fetchall():
            with suppress(OperationalError):  # it has just ended by itself
                cursor.execute(f"KILL {number}")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=of_processes)])
def test_stop_in_the_midst_of_short_tasks_leaves_none_working_and_charges_none(number, workers):
    """Outcomes are being written all the time."""
    Errand.objects.bulk_create([Errand() for _ in range(2000)])
    for _ in range(2):
        before = do_errand.tally()["finished"]
        worker = workers.start("--processes", 2)
        wait_until(lambda before=before: do_errand.tally()["finished"] > before + 20)
        code, seconds = worker.stop(number)
        assert code == 0
        assert seconds < within(5)
        wait_until(is_gone(worker))
    tally = do_errand.tally()
    assert (tally["working"], tally["canceled"]) == (0, 0)
    assert tally["waiting"] > 0
    assert Ledger.objects.count() == tally["finished"]
    attempts = Errand.objects.values_list("status__state", "status__attempts").distinct()
    assert set(attempts) == {(State.finished, 1), (State.waiting, 0)}


#: For a longer run: as many as 30, one each two seconds.
RESTARTS = int(os.environ.get("MODELQUEUE_TEST_RESTARTS", "2"))


def test_rolling_restarts_lose_and_charge_nothing(workers):
    count = 60 * RESTARTS
    Errand.objects.bulk_create([Errand(title="doze 0.1") for _ in range(count)])
    worker = workers.start("--grace", 10)
    wait_until(lambda: Ledger.objects.count() > 5)
    for _ in range(RESTARTS):
        following = workers.start("--grace", 10)
        began = time.monotonic()
        wait_until(lambda one=following: "Stop it with Ctrl-C" in one.output)
        if RESTARTS > 2:
            time.sleep(max(0.0, began + 2 - time.monotonic()))
        assert worker.stop()[0] == 0
        # The threads of the other one, and as many tasks of which the outcome is still to be written.
        assert do_errand.tally()["working"] <= 8
        worker = following
    wait_until(lambda: do_errand.tally()["finished"] == count)
    assert worker.stop()[0] == 0
    assert set(Errand.objects.values_list("status__attempts", flat=True)) == {1}
    assert Ledger.objects.count() == count


# Fairness


def test_full_queue_does_not_starve_another(workers):
    Errand.objects.bulk_create([Errand(title="doze 0.01", status=Status.waiting(1)) for _ in range(10_000)])
    worker = workers.start()
    wait_until(lambda: Ledger.objects.count() > 20)
    waits = []
    for _ in range(5):
        trickle = Errand.objects.create(status=Status.created(1), review_status=Status.waiting())
        began = time.monotonic()
        wait_until(lambda task=trickle: stored(task, "review_status").state == State.finished)
        waits.append(time.monotonic() - began)
    assert do_errand.tally()["waiting"] > 0
    worker.send(signal.SIGKILL)
    print(f"\nthe trickle took {', '.join(f'{wait * 1000:.0f}' for wait in waits)} ms")
    assert sorted(waits)[2] < within(0.5)


@pytest.mark.parametrize("title", [pytest.param("sleep 1", marks=of_processes), "read 1"])
def test_many_async_actions_run_side_by_side(title, workers, vendor):
    Errand.objects.bulk_create(
        [Errand(title=title, status=Status.created(1), review_status=Status.waiting()) for _ in range(200)]
    )
    worker = workers.start("--drain", "testapp.review")
    wait_until(lambda: review.tally()["working"] + review.tally()["finished"] > 0)
    began = time.monotonic()
    wait_until(lambda: review.tally()["finished"] == 200)
    seconds = time.monotonic() - began
    print(f"\n200 tasks of 1 s took {seconds:.1f} s")
    assert seconds < within(6)
    assert worker.process.wait(20) == 0


# Recycling and health


@of_processes
def test_process_is_replaced_after_so_many_tasks(workers):
    Errand.objects.bulk_create([Errand() for _ in range(12)])
    worker = workers.start("--max-tasks", 4, "--threads", 1)
    wait_until(lambda: do_errand.tally()["finished"] == 12)
    wait_until(lambda: worker.output.count("has run 4 tasks and is replaced") == 3)
    assert worker.stop()[0] == 0
    assert set(Counter(Ledger.objects.values_list("worker", flat=True)).values()) == {4}


@of_processes
def test_health_file_is_written_while_the_database_answers(workers, tmp_path):
    path = tmp_path / "health"
    worker = workers.start("--health-file", path)
    wait_until(path.exists)
    first = path.stat().st_mtime_ns
    wait_until(lambda: path.stat().st_mtime_ns > first)
    assert worker.stop()[0] == 0


@of_processes
@pytest.mark.parametrize(("verbosity", "said"), [(0, False), (1, False), (2, True)])
def test_worker_says_as_much_as_it_is_told(verbosity, said, workers):
    (errand,) = make("")
    worker = workers.start("--drain", "-v", verbosity)
    assert worker.process.wait(30) == 0
    assert stored(errand).state == State.finished
    assert ("Serving" in worker.output) == (verbosity > 0)
    line = f"DEBUG testapp.do_errand, testapp.Errand {errand.pk} status: outcome finish"
    assert (line in worker.output) == said
    if not verbosity:
        assert "error" not in worker.output.lower()


# Wrong calls


@of_processes
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["testapp.do_erand"], "There is no queue 'testapp.do_erand'. Did you mean 'testapp.do_errand'?"),
        (["--exclude", "x"], "There is no queue 'x'. Declared are: testapp.do_errand, testapp.review."),
        (["--database", "nowhere"], "There is no database 'nowhere'. DATABASES has: default, other."),
        (["testapp.review", "--exclude", "testapp.review"], "--exclude leaves none of testapp.review."),
        (["--threads", "0"], "argument --threads: give a whole number, 1 or more, not '0'"),
    ],
)
def test_wrong_call_is_refused(arguments, text, workers):
    worker = workers.start(*arguments)
    assert worker.process.wait(30) == 2
    assert text in worker.output
