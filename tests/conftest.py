"""Fixtures and markers of the whole suite."""

from __future__ import annotations

import functools
import gc
import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from django.conf import settings
from django.db import connection, connections, transaction
from django.test import TransactionTestCase

import modelqueue
from modelqueue import Status, clock, execution, queues
from modelqueue.engines import prepared
from modelqueue.fields import declared_on
from tests import disks
from tests.processes import Processes
from tests.worker.workers import Workers


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Look for no garbage among the thousands of tests, then or later: that took a sixth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_make_parametrize_id(val):
    """Name a status without its time: in words it is another one a second later, in the other worker."""
    return val.state.name if isinstance(val, Status) else None


@pytest.fixture(scope="session")
def django_db_modify_db_settings(django_db_modify_db_settings_parallel_suffix):
    """SQLite in files: other threads and other processes have to see the same database.

    In memory where the system has a folder for that, as each commit would wait for the disk.
    """
    with TemporaryDirectory(prefix="modelqueue-", dir=disks.in_memory(100)) as folder:
        for alias, database in settings.DATABASES.items():
            if database["ENGINE"].endswith("sqlite3"):
                database.setdefault("TEST", {})["NAME"] = str(Path(folder) / f"{alias}.sqlite3")
        yield


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup):
    """Empty the tables after a test at the least cost: Django's way took a quarter of the time of the suite.

    It asks for their names, writes to each, and fills others, as it does after `migrate`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransactionTestCase, "_fixture_teardown", empty_tables)
        yield


def empty_tables(case):
    for alias in case._databases_names(include_mirrors=False):
        one = connections[alias]
        with one.constraint_checks_disabled(), transaction.atomic(using=alias), one.cursor() as cursor:
            for table in filled_tables(alias, cursor):
                cursor.execute(f"DELETE FROM {table}")


def filled_tables(alias, cursor):
    tables = names_of_tables(alias)
    cursor.execute(f"SELECT {', '.join(f'EXISTS (SELECT 1 FROM {table})' for table in tables)}")
    return itertools.compress(tables, cursor.fetchone())


@functools.cache
def names_of_tables(alias):
    """The tables of all models, quoted."""
    one = connections[alias]
    return [one.ops.quote_name(name) for name in one.introspection.django_table_names(only_existing=True)]


@pytest.fixture(autouse=True)
def _skip_by_marker(request):
    """Skip what `@pytest.mark.vendor` and `@pytest.mark.db_feature` say this database is not for."""
    if (vendor := request.node.get_closest_marker("vendor")) and connection.vendor not in vendor.args:
        pytest.skip(f"for {' and '.join(vendor.args)} only")
    if feature := request.node.get_closest_marker("db_feature"):
        # Some features are known only after a question to the server.
        request.getfixturevalue("django_db_setup")
        with request.getfixturevalue("django_db_blocker").unblock():
            missing = [name for name in feature.args if not getattr(connection.features, name)]
        if missing:
            pytest.skip(f"{connection.display_name} lacks {', '.join(missing)}")


@pytest.fixture(autouse=True)
def _recovery_is_due():
    """Let the first `run` of each test recover, as that of a new process does."""
    execution._last_recovery.clear()


@pytest.fixture(autouse=True)
def _clock_of_the_machine():
    """Forget the clock of a database that a worker in an earlier test has followed."""
    clock.shift(None)


@pytest.fixture(autouse=True)
def _no_content_types():
    """Forget the content types that earlier tests have made: their rows are rolled back, or deleted."""
    from django.contrib.contenttypes.models import ContentType  # which is no model before the set-up

    ContentType.objects.clear_cache()


@pytest.fixture
def declare():
    """`modelqueue.queue`, whose queues are forgotten after the test."""
    before = dict(queues._declared)
    yield modelqueue.queue
    for name, made in list(queues._declared.items()):
        if before.get(name) is not made:
            del queues._declared[name]
            declared_on(made.field).remove(made)
    queues._declared.update(before)


@pytest.fixture
def table():
    """Make the table of a model for one test."""
    made = []

    def make(model):
        with connection.schema_editor() as editor:
            editor.create_model(model)
        made.append(model)
        return model

    yield make
    for model in reversed(made):
        with connection.schema_editor() as editor:
            editor.delete_model(model)


@pytest.fixture
def step_by_step(settings):
    """Tasks are claimed in the steps of the portable engine, which a test may stand between."""
    settings.MODELQUEUE = {"ENGINE": "portable"}


@pytest.fixture
def bystander():
    """Another session, in an open transaction; what it locks stays locked until the test is over."""
    other = connection.copy()
    other.set_autocommit(False)
    yield other
    other.rollback()
    other.close()


@pytest.fixture
def vendor() -> str:
    """Django's name of the database: sqlite, postgresql, mysql (MariaDB too)."""
    return connection.vendor


@pytest.fixture
def processes(transactional_db):
    """Real processes on the database of this test; see `tests.processes`."""
    with Processes() as started:
        yield started


@pytest.fixture
def workers(transactional_db):
    """Real workers on the database of this test; see `tests.worker.workers`."""
    with Workers() as started:
        yield started


@pytest.fixture
def unprepared(monkeypatch):
    """No statement is prepared, so that what is sent does not depend on what a session has sent before."""
    monkeypatch.setattr(prepared, "_WORTH_IT", 10**6)
