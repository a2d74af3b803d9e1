"""The helper that other tests trust: processes of a test work on that test's own database."""

import pytest
from django.db import connection

from tests.processes import wait_until
from tests.testapp.models import Task


def add(data, using="default"):
    Task.objects.using(using).create(data=data)
    return Task.objects.using(using).count()


def add_for_ever(data):
    while True:
        add(data)


def fail():
    raise ValueError("on purpose")


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize("alias", ["default", "other"])
def test_process_works_on_the_database_of_the_test(processes, alias):
    Task.objects.using(alias).create(data="test")
    assert processes.start(add, "process", alias).result() == 2
    assert Task.objects.using(alias).filter(data="process").exists()


def test_killed_process_is_gone(processes):
    process = processes.start(add_for_ever, "x")
    wait_until(Task.objects.exists)
    assert process.alive
    process.kill()
    assert not process.alive
    count = Task.objects.count()
    assert Task.objects.count() == count


def test_result_of_a_failed_process_is_its_traceback(processes):
    with pytest.raises(RuntimeError, match="ValueError: on purpose"):
        processes.start(fail).result()


def test_wait_has_a_deadline():
    with pytest.raises(TimeoutError, match=r"not within 0\.05 s"):
        wait_until(lambda: False, timeout=0.05)


@pytest.mark.django_db
@pytest.mark.vendor("postgresql")
def test_vendor_marker_leaves_only_that_database():
    assert connection.vendor == "postgresql"


@pytest.mark.django_db
@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_feature_marker_leaves_only_databases_with_it(vendor):
    assert vendor != "sqlite"
