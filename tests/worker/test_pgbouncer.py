"""A worker behind PgBouncer in transaction mode, where a session is another one after each transaction."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from django.db import connection, connections

from modelqueue import State
from tests.actions import stored
from tests.processes import wait_until
from tests.servers import owner_of
from tests.testapp.models import Errand, Ledger
from tests.testapp.queues import do_errand

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.vendor("postgresql")]

CONFIGURATION = """
[databases]
* = host={host} port={port} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 4
max_client_conn = 200
pidfile = {folder}/pid
logfile = {folder}/log
"""


@pytest.fixture
def pooled():
    """Run a pooler before the server of the test; return the databases as they are behind it."""
    if shutil.which("pgbouncer") is None:
        pytest.skip("this machine has no PgBouncer")
    with tempfile.TemporaryDirectory(prefix="modelqueue-") as folder, start_pooler(Path(folder)) as port:
        behind = {"HOST": "127.0.0.1", "PORT": port}
        yield {alias: connections[alias].settings_dict | behind for alias in connections}


@contextlib.contextmanager
def start_pooler(folder):
    settings, port, owner = connection.settings_dict, free_port(), owner_of(folder, "postgres", "nobody")
    configuration = folder / "ini"
    configuration.write_text(
        CONFIGURATION.format(
            host=settings["HOST"],
            port=settings["PORT"] or 5432,
            user=settings["USER"] or "postgres",
            listen=port,
            folder=folder,
        )
    )
    process = subprocess.Popen(["pgbouncer", "-q", configuration], **owner)
    try:
        wait_until(lambda: answers(port) or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        yield port
    finally:
        process.terminate()
        process.wait()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def answers(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def test_worker_behind_a_pooler_runs_each_task_once_and_survives_a_crash(pooled, workers):
    Errand.objects.bulk_create([Errand(title="") for _ in range(200)])
    (slow,) = [Errand.objects.create(title="sleep 60")]
    worker = workers.start("--processes", 2, databases=pooled)
    wait_until(lambda: Ledger.objects.filter(task=slow.pk).exists())
    Errand.objects.filter(pk=slow.pk).update(title="")
    os.kill(int(Ledger.objects.get(task=slow.pk).worker), signal.SIGKILL)
    wait_until(lambda: do_errand.tally()["finished"] == 201)
    assert worker.stop()[0] == 0
    assert (stored(slow).state, stored(slow).attempts) == (State.finished, 2)
    times = Counter(Ledger.objects.values_list("task", flat=True))
    attempts = dict(Errand.objects.values_list("pk", "status__attempts"))
    assert set(attempts.values()) == {1, 2}
    # What the killed process had begun, and of which no outcome was committed, was charged and run once more;
    # one in each of its threads perhaps before it had written that it runs. Nothing else was.
    assert times.keys() == attempts.keys()
    assert all(times[pk] <= attempts[pk] for pk in attempts)
    assert sum(attempts.values()) - sum(times.values()) <= 4


def test_worker_behind_a_pooler_stops_in_order_under_load(pooled, workers):
    Errand.objects.bulk_create([Errand(title="") for _ in range(300)])
    worker = workers.start("--threads", 4, databases=pooled)
    wait_until(lambda: do_errand.tally()["finished"] > 50)
    assert worker.stop()[0] == 0
    assert do_errand.tally()["working"] == 0
    assert set(Errand.objects.values_list("status__attempts", flat=True)) <= {0, 1}
    assert set(Counter(Ledger.objects.values_list("task", flat=True)).values()) == {1}
