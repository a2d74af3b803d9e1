"""A Galera cluster: no node sees the locks of another, and who commits first wins.

`make galera` lets workers run 3,000 tasks there, where the suite has 300.
"""

import os
import re
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from unittest import mock

import pytest
from django.db import OperationalError, connection

import modelqueue
from modelqueue import verbs
from modelqueue.engines import engine_for
from modelqueue.engines.base import Engine
from tests import servers
from tests.actions import heard, stored, write_down
from tests.processes import Processes, make_tables, wait_until
from tests.soak.signs import FOLDER, make_folders
from tests.testapp.models import Ledger, Project, Task
from tests.worker.workers import Workers

TASKS = int(os.environ.get("MODELQUEUE_TEST_TASKS", "300"))
KINDS = ("plain", "atomic", "async")
QUEUES = ("soak.plain", "soak.atomic", "soak.asynchronous")
#: How many take longer than the lease of these queues, which is 4 s.
LONG = 18


@pytest.fixture(scope="module")
def cluster():
    """The databases on each node, and the nodes."""
    if os.environ.get("MODELQUEUE_TEST_SERVER", "sqlite") != "mariadb":
        pytest.skip("only MariaDB has Galera here")
    try:
        with servers.start_cluster() as nodes:
            databases = [servers.databases(node.connection) for node in nodes]
            with Processes(databases[0]) as processes:
                processes.start(make_tables, "Task", "Ledger", "Project").result()
            yield databases, nodes
    except servers.Unavailable as reason:
        pytest.skip(str(reason))


# Workers


def make_tasks(count, seconds):
    Task.objects.bulk_create([Task(data=f"{KINDS[number % 3]} {seconds}") for number in range(count)])


def tasks_and_runs():
    """The kind, state and attempts of each task, and how often it was run (if atomic: has had an effect)."""
    runs = Counter(Ledger.objects.values_list("task", flat=True))
    return [
        [task.pk, task.data.split()[0], task.status.state.name, task.status.attempts, runs[task.pk]]
        for task in Task.objects.all()
    ]


@pytest.fixture
def other(cluster):
    """A session of the test with the first node."""
    other = connection.copy()
    other.settings_dict = {**other.settings_dict, **cluster[0][0]["default"]}
    yield other
    other.close()


@pytest.fixture
def commits(other, django_db_blocker):
    """Return whether something can be committed, which may take a while to find out."""

    def commit():
        with django_db_blocker.unblock(), suppress(OperationalError), other.cursor() as cursor:
            cursor.execute("INSERT INTO testapp_project (name) VALUES ('')")
            return True

    return commit


@pytest.fixture
def count_finished(other, django_db_blocker):
    """Return how many are finished."""
    first, last = modelqueue.Status.minimum("finished"), modelqueue.Status.maximum("finished")

    def count():
        with django_db_blocker.unblock(), other.cursor() as cursor:
            cursor.execute(f"SELECT count(*) FROM testapp_task WHERE status BETWEEN {first} AND {last}")
            return cursor.fetchone()[0]

    return count


def claimed_by(worker):
    """The tasks that it was the first to claim, as far as it has learned that they are claimed."""
    first = r"testapp\.Task (\d+) status: claimed \[working, 0 attempts\]"
    return {int(pk) for pk in re.findall(first, worker.output)}


def test_workers_on_all_nodes_go_on_when_one_is_killed(cluster, count_finished, commits, tmp_path):
    """Each task has one owner, and none is run a second time but what the worker of that node had."""
    databases, nodes = cluster
    make_folders(tmp_path)
    variables = {"MODELQUEUE_TEST_APPS": "tests.soak", FOLDER: str(tmp_path)}
    options = (*QUEUES, "--processes", 2, "--threads", 4, "-v", 2)
    with Processes(databases[0]) as processes, Workers() as workers:
        started = [workers.start(*options, databases=one, variables=variables) for one in databases]
        *others, cut_off = started
        first = 0
        while not all(map(claimed_by, started)):  # or some could do all before the last one has begun
            processes.start(make_tasks, 24, 0.05).result()
            first += 24
        processes.start(make_tasks, LONG, 8).result()
        processes.start(make_tasks, TASKS, 0.05).result()
        wait_until(lambda: count_finished() > first + TASKS / 5)
        nodes[-1].stop(True)
        killed, at_kill = time.monotonic(), count_finished()
        members = cut_off.members()
        wait_until(commits)
        commits_again = time.monotonic()
        wait_until(lambda: count_finished() == first + LONG + TASKS, 300)
        done = time.monotonic()
        had = claimed_by(cut_off)
        nodes[-1].start()
        returned = time.monotonic()
        more = 0
        while not claimed_by(cut_off) - had:  # or the others could do all of them
            assert time.monotonic() < returned + 300
            processes.start(make_tasks, 24, 0.05).result()
            more += 24
        went_on = time.monotonic()
        wait_until(lambda: count_finished() == first + LONG + TASKS + more)

        found = processes.start(tasks_and_runs).result()
        again = {pk for pk, _, _, attempts, _ in found if attempts > 1}
        taken = Counter(index for index, worker in enumerate(started) for _ in claimed_by(worker))
        print(
            f"\n{count_finished()} tasks, claimed by the workers of the nodes: {dict(taken)}"
            f"\n{at_kill} were finished at the kill"
            f"\nnothing was committed for {commits_again - killed:.1f} s"
            f"\nall was done after {done - killed:.1f} s"
            f"\nthe node was started in {returned - done:.1f} s"
            f"\nits worker went on {went_on - returned:.1f} s later"
            f"\n{len(again)} tasks were charged for it, of {len(had)} that its worker had claimed"
        )
        assert {state for _, _, state, _, _ in found} == {"finished"}
        assert {runs for _, kind, _, _, runs in found if kind == "atomic"} == {1}
        assert all(runs == 1 for pk, _, _, _, runs in found if pk not in had)
        assert not again & {pk for worker in others for pk in claimed_by(worker)}
        atomic = {pk for pk, kind, *_ in found if kind == "atomic"}
        for sign in (tmp_path / "twice").iterdir():
            pk, which, process, _ = sign.name.split()
            # An atomic one whose commit was overruled has begun once more.
            assert int(process) in members or (which == "ended" and int(pk) in atomic)
        for worker in started:
            assert worker.stop()[0] == 0
            assert "(1213, " not in worker.output
        assert cut_off.output.count("The database 'default' does not answer") == 1
        assert cut_off.output.count("The database 'default' answers again") == 1
        for worker in others:
            assert "does not answer" not in worker.output
            assert "Traceback" not in worker.output
            assert " ERROR " not in worker.output


# What two nodes do to one row


class Other:
    """A session with another node, in autocommit."""

    def __init__(self, database):
        self.connection = connection.copy()
        self.connection.settings_dict = {**connection.settings_dict, "HOST": database["HOST"]}

    def send(self, sql, *params):
        with self.connection.cursor() as cursor:
            cursor.execute(sql, params)
            return cursor.fetchall()

    def sees(self, task):
        return lambda: self.send(
            "SELECT 1 FROM testapp_task WHERE id = %s AND status = %s", task.pk, int(stored(task))
        )

    def cancel(self, task):
        wait_until(self.sees(task))
        status = int(modelqueue.Status.combine("canceled", 1, 0))
        self.send("UPDATE testapp_task SET status = %s WHERE id = %s", status, task.pk)

    def close(self):
        self.connection.close()


def end_of(task, events):
    return [stored(task).state.name, stored(task).attempts, [name for name, _ in events]]


def claim_that_another_node_is_faster_with(other):
    """Both have locked the row."""
    task = Task.objects.create()
    claim_row = Engine._claim_row

    def claim_it_there_first(self, *arguments):
        if not again.called:
            other.send(
                "UPDATE testapp_task SET status = %s WHERE id = %s AND status = %s",
                int(modelqueue.Status.working()),
                task.pk,
                int(task.status),
            )
        return claim_row(self, *arguments)

    wait_until(other.sees(task))
    with (
        mock.patch.object(Engine, "_claim_row", claim_it_there_first),
        mock.patch.object(Engine, "note_contention") as again,
        heard() as events,
    ):
        assert modelqueue.run(Task.objects, "status", write_down) is None
    again.assert_called_once()
    return end_of(task, events)


def cancel_that_another_node_is_faster_than(other):
    """It has locked the row when that is enqueued on the other node."""
    task = Task.objects.create(status=modelqueue.Status.created())
    unlocked = Engine.unlocked

    def enqueue_it_there_first(self, rows):
        for part in unlocked(self, rows):
            if not again.called:
                status = int(modelqueue.Status.waiting())
                other.send("UPDATE testapp_task SET status = %s WHERE id = %s", status, task.pk)
            yield part

    wait_until(other.sees(task))
    with (
        mock.patch.object(Engine, "unlocked", enqueue_it_there_first),
        mock.patch.object(Engine, "note_contention") as again,
        heard() as events,
    ):
        assert verbs.cancel(Task.objects.filter(pk=task.pk), "status") == 1
    again.assert_called_once()
    return end_of(task, events)


def atomic_action_that_another_node_is_faster_than(other):
    """Both have changed a row of neither's task."""
    task, project = Task.objects.create(), Project.objects.create()
    ran = []

    def act(task):
        ran.append(task)
        write_down(task)
        Project.objects.update(name="ours")
        if len(ran) == 1:
            other.send("UPDATE testapp_project SET name = 'theirs'")

    wait_until(lambda: other.send("SELECT 1 FROM testapp_project WHERE id = %s", project.pk))
    with heard("task_finished", "lease_lost") as events:
        modelqueue.run(Task.objects, "status", act, atomic=True, retry=0)
    assert [Project.objects.get().name, len(ran), Ledger.objects.filter(task=task.pk).count()] == [
        "ours",
        2,
        1,
    ]
    return end_of(task, events)


def atomic_action_that_is_canceled_on_another_node(other):
    task = Task.objects.create()

    def act(task):
        write_down(task)
        other.cancel(task)

    with heard("task_finished", "lease_lost") as events:
        modelqueue.run(Task.objects, "status", act, atomic=True)
    assert not Ledger.objects.filter(task=task.pk).exists()
    return end_of(task, events)


def atomic_action_that_decides_on_its_row_by_a_queryset(other):
    task = Task.objects.create()

    def act(task):
        verbs.cancel(Task.objects.filter(pk=task.pk), "status")

    with heard("task_finished", "lease_lost") as events:
        modelqueue.run(Task.objects, "status", act, atomic=True)
    return end_of(task, events)


def outcome_on_a_node_that_lags_behind(other):
    """As behind a balancer: the claim was made on another node."""
    engine = type(engine_for("default"))
    catch_up, waits = engine.catch_up, threading.Event()

    def say_and_catch_up(self):
        waits.set()
        return catch_up(self)

    def unlock():
        waits.wait(60)
        sessions = "SELECT 1 FROM information_schema.processlist WHERE info = 'SELECT 1'"
        with suppress(TimeoutError):
            wait_until(lambda: other.send(sessions), timeout=5)
        other.send("UNLOCK TABLES")

    def act(task):
        connection.close()
        connection.settings_dict["HOST"] = other.connection.settings_dict["HOST"]

    task = Task.objects.create()
    wait_until(other.sees(task))
    other.connection.inc_thread_sharing()
    unlocking = threading.Thread(target=unlock)
    unlocking.start()
    home = connection.settings_dict["HOST"]
    other.send("LOCK TABLES testapp_ledger READ")
    Ledger.objects.create(task=0)  # what comes after it has to wait there
    try:
        with (
            mock.patch.object(engine, "catch_up", say_and_catch_up),
            heard("task_finished", "lease_lost") as events,
        ):
            modelqueue.run(Task.objects, "status", act)
    finally:
        waits.set()
        unlocking.join()
        connection.close()
        connection.settings_dict["HOST"] = home
    wait_until(lambda: stored(task).state.name != "working")
    return end_of(task, events)


def outcome_while_the_node_is_cut_off(other):
    """It answers, but refuses all."""
    task = Task.objects.create()
    again = threading.Event()
    isolate = "SET GLOBAL wsrep_provider_options = 'gmcast.isolate={}'"
    with closing(Other(connection.settings_dict)) as admin:
        admin.connection.inc_thread_sharing()

        def act(task):
            admin.send(isolate.format(1))
            wait_until(lambda: admin.send("SHOW STATUS LIKE 'wsrep_ready'")[0][1] == "OFF")

        def let_it_return():
            again.wait(60)
            admin.send(isolate.format(0))

        returning = threading.Thread(target=let_it_return)
        returning.start()
        try:
            with (
                mock.patch.object(Engine, "note_contention", side_effect=again.set),
                heard("task_finished", "lease_lost") as events,
            ):
                modelqueue.run(Task.objects, "status", act)
        finally:
            again.set()
            returning.join()
    return end_of(task, events)


def go_through(names, database):
    """Call these functions, on one node, with a session with another one; return what each has returned."""
    found = {}
    clear()
    for name in names:
        with closing(Other(database)) as other:
            found[name] = globals()[name](other)
        clear()
    return found


def clear():
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM testapp_task")
        cursor.execute("DELETE FROM testapp_project")


#: How each task ends, with how many attempts, and what is told of it.
ENDS = {
    "claim_that_another_node_is_faster_with": ["working", 0, []],
    "cancel_that_another_node_is_faster_than": ["canceled", 0, []],
    "atomic_action_that_another_node_is_faster_than": ["finished", 1, ["task_finished"]],
    "atomic_action_that_is_canceled_on_another_node": ["canceled", 0, ["lease_lost"]],
    "atomic_action_that_decides_on_its_row_by_a_queryset": ["canceled", 0, ["task_finished"]],
    "outcome_on_a_node_that_lags_behind": ["finished", 1, ["task_finished"]],
    "outcome_while_the_node_is_cut_off": ["finished", 1, ["task_finished"]],
}


def test_what_two_nodes_do_to_one_row(cluster):
    """In one test, as the nodes take long to start."""
    databases, _ = cluster
    with Processes(databases[0]) as processes:
        assert processes.start(go_through, list(ENDS), databases[1]["default"]).result() == ENDS
