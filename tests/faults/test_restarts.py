"""A database server that restarts between a claim and its outcome.

Other tests run on the server of the suite meanwhile, so here is one of its own, whose commits are durable.
"""

import os
from unittest import mock

import pytest
from django.db import Error, connection

from modelqueue.engines import engine_for, sessions
from tests import servers
from tests.actions import stored
from tests.faults.trace import Trace
from tests.faults.workers import drain, run_next
from tests.processes import Processes, make_tables, wait_until
from tests.testapp.models import Ledger, Task


@pytest.fixture(scope="module")
def server():
    name = os.environ.get("MODELQUEUE_TEST_SERVER", "sqlite")
    if name == "sqlite":
        pytest.skip("SQLite has no server")
    with servers.start_guarded_server(name) as server:
        with Processes(servers.databases(server.connection)) as processes:
            processes.start(make_tables, "Task", "Ledger").result()
        yield server


def run_through_a_restart(is_atomic, patience, path):
    """Run a task while its server restarts, then what others have to do; return what came of it all."""
    trace = Trace(path)
    task = Task.objects.create()

    def wait():
        trace.note("waits")
        wait_until(lambda: trace.read("go on"))

    def note_retry(engine):
        trace.note("tries again")

    engine = type(engine_for("default"))
    with (
        trace.listening(),
        mock.patch.object(sessions.Session, "patience", patience),
        mock.patch.object(engine, "note_contention", note_retry),
    ):
        try:
            run_next(Task, is_atomic, trace.action(after=wait))
            did = "returns"
        except Error:
            did = "raises"
        trace.note(did)
    wait_until(lambda: trace.read("is up"))
    with trace.listening():
        drain(Task, is_atomic, trace)
    trace.check()
    attempts, effects = stored(task).attempts, Ledger.objects.filter(task=task.pk).count()
    with connection.cursor() as cursor:  # delete() would look for rows of other models, that have no table
        cursor.execute(f"DELETE FROM {Task._meta.db_table}")
    return [did, len(trace.read("begins")), attempts, effects]


# What run() does, how often the action begins in all, how many attempts are counted, how many effects stay.
RECORDED = ["returns", 1, 1, 1]
RUNS_AGAIN = ["raises", 2, 2, 2]
RUNS_AGAIN_WITH_ONE_EFFECT = ["raises", 2, 2, 1]

#: For so long that a server is back by then, however busy the machine is.
PATIENT = 60
IMPATIENT = 0.2


def wait_for(what, trace, worker):
    wait_until(lambda: trace.read(what) or not worker.alive)
    assert trace.read(what), worker.errors


#: How the server stops: after it has told its clients, or as if it had crashed.
IN_ORDER, AT_ONCE = False, True


@pytest.mark.parametrize(
    ("stop", "is_atomic", "patience", "up_again", "expected"),
    [
        (IN_ORDER, False, PATIENT, "before the action returns", RECORDED),
        (AT_ONCE, False, PATIENT, "before the action returns", RECORDED),
        (AT_ONCE, False, PATIENT, "while run() tries again", RECORDED),
        (IN_ORDER, False, IMPATIENT, "after run() has given up", RUNS_AGAIN),
        (AT_ONCE, True, PATIENT, "before the action returns", RUNS_AGAIN_WITH_ONE_EFFECT),
        (IN_ORDER, True, PATIENT, "while run() tries again", RUNS_AGAIN_WITH_ONE_EFFECT),
    ],
)
def test_server_that_restarts_during_an_action(
    server, stop, is_atomic, patience, up_again, expected, tmp_path
):
    trace = Trace(tmp_path / "trace")
    with Processes(servers.databases(server.connection)) as processes:
        worker = processes.start(run_through_a_restart, is_atomic, patience, str(trace.path))
        wait_for("waits", trace, worker)
        server.stop(stop)
        try:
            if up_again == "while run() tries again":
                trace.note("go on")
                wait_for("tries again", trace, worker)
            elif up_again == "after run() has given up":
                trace.note("go on")
                wait_for("raises", trace, worker)
        finally:
            server.start()
        trace.note("go on")
        trace.note("is up")
        assert worker.result() == expected
