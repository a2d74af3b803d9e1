"""A server that gives no more connections: the worker says what to set, and leaves nothing behind.

Other tests run on the server of the suite meanwhile, so here is one of its own, which allows few connections.
"""

import os

import pytest

from modelqueue import Status
from tests import servers
from tests.processes import Processes, make_tables, wait_until
from tests.testapp.models import Errand
from tests.testapp.queues import review
from tests.worker.workers import Workers

CONNECTIONS = 40


@pytest.fixture
def databases():
    name = os.environ.get("MODELQUEUE_TEST_SERVER", "sqlite")
    if name == "sqlite":
        pytest.skip("SQLite has no server")
    with servers.start_guarded_server(name, CONNECTIONS) as server:
        yield servers.databases(server.connection)


def make_errands(count):
    waiting = Status.waiting()
    # Longer than the slowest machine takes to make that many connections: each keeps its own so long.
    Errand.objects.bulk_create(
        [Errand(title="read 60", status=Status.created(1), review_status=waiting) for _ in range(count)]
    )


def count():
    return review.tally()


def test_worker_says_what_to_set_when_the_server_gives_no_more_connections(databases):
    with Processes(databases) as processes, Workers() as workers:
        processes.start(make_tables, "Errand", "Ledger").result()
        processes.start(make_errands, 2 * CONNECTIONS).result()
        worker = workers.start("testapp.review", "--grace", 0, databases=databases)
        wait_until(lambda: f"connections of the {CONNECTIONS} that it allows" in worker.output)
        assert worker.stop()[0] == 0
        assert "testapp.review: the database server has " in worker.output
        assert "fewer slots" in worker.output
        assert processes.start(count).result()["working"] == 0
