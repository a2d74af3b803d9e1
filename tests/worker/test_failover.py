"""A worker whose database dies, and whose standby takes its place."""

import os
import time

import pytest
from django.db import Error, connection

from modelqueue import Status
from tests import servers
from tests.processes import Processes, make_tables, wait_until
from tests.testapp.models import Errand, Ledger
from tests.worker.workers import Workers

SHORT, LONG = 100, 4


@pytest.fixture
def pair():
    name = os.environ.get("MODELQUEUE_TEST_SERVER", "sqlite")
    if not name.startswith("postgres"):
        pytest.skip("only PostgreSQL has a standby here")
    with servers.start_pair(name) as pair:
        yield pair


def make_errands():
    Errand.objects.bulk_create([Errand(title="sleep 6") for _ in range(LONG)])
    Errand.objects.bulk_create([Errand(title="sleep 0.05") for _ in range(SHORT)])


def runs_of_long_ones():
    """How often each long one has begun, and how many attempts it has had."""
    long = Errand.objects.filter(title="sleep 6")
    return [[Ledger.objects.filter(task=one.pk).count(), one.status.attempts] for one in long]


@pytest.fixture
def count_finished(pair, django_db_blocker):
    """Return how many are finished; nobody knows while there is no server."""
    other = connection.copy()
    other.settings_dict = {**other.settings_dict, **servers.databases(pair.connection)["default"]}
    first, last = Status.minimum("finished"), Status.maximum("finished")

    def count():
        try:
            with django_db_blocker.unblock(), other.cursor() as cursor:
                cursor.execute(f"SELECT count(*) FROM testapp_errand WHERE status BETWEEN {first} AND {last}")
                return cursor.fetchone()[0]
        except Error:
            other.close()
            return None

    yield count
    other.close()


def test_worker_goes_on_with_the_standby_and_runs_nothing_twice_that_was_alive(pair, count_finished):
    databases = servers.databases(pair.connection)
    with Processes(databases) as processes, Workers() as workers:
        processes.start(make_tables, "Errand", "Ledger").result()
        processes.start(make_errands).result()
        worker = workers.start("--processes", 2, "--threads", 4, databases=databases)
        wait_until(lambda: (count_finished() or 0) > 20)
        pair.kill()
        killed = time.monotonic()
        wait_until(lambda: "does not answer, trying again" in worker.output)
        pair.promote()
        promoted = time.monotonic()
        wait_until(lambda: count_finished() == SHORT + LONG)
        print(
            f"\nthe standby led after {promoted - killed:.1f} s, "
            f"all was done {time.monotonic() - promoted:.1f} s later"
        )
        assert processes.start(runs_of_long_ones).result() == [[1, 1]] * LONG
        assert worker.stop()[0] == 0
        assert worker.output.count("The database 'default' does not answer") == 1
        assert worker.output.count("The database 'default' answers again") == 1
