"""Tasks that are left behind when their backend, or their queue, is taken from TASKS are told of."""

import json
import logging
from contextlib import suppress
from io import StringIO

import pytest
from django.core.management import call_command
from django.db import connection
from django.test.utils import CaptureQueriesContext

from modelqueue import Status
from modelqueue.task_backend import unserved
from modelqueue.task_backend.models import QueuedTask
from tests.processes import wait_until
from tests.task_backend.backends import BACKEND, TASKS, queue_of, run_all, tasks

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

#: Without the backend `other`, and with fewer queues.
LESS = {"default": {"BACKEND": BACKEND, "QUEUES": ["default", "mail"]}}


def found(*arguments):
    """The findings of the doctor about them."""
    output = StringIO()
    with suppress(SystemExit):  # as something is found
        call_command("modelqueue", "doctor", "--json", *arguments, stdout=output)
    return [one for one in json.loads(output.getvalue()) if one["check"] == "unserved"]


def leave_behind(settings, less=LESS):
    """Enqueue tasks that a setting without their queues leaves behind."""
    tasks.add.using(queue_name="reports").enqueue(1)
    tasks.add.using(queue_name="reports").enqueue(2)
    tasks.note_elsewhere.using(queue_name="blue").enqueue("x")
    tasks.add.using(queue_name="mail").enqueue(3)
    settings.TASKS = less


def test_doctor_tells_of_them(settings):
    leave_behind(settings)
    assert [(one["severity"], one["database"], one["finding"]) for one in found()] == [
        (
            "warning",
            "default",
            f"Nobody runs {what}: the setting TASKS has no such backend or queue any more.",
        )
        for what in (
            "2 tasks of TASKS['default'] in the queue 'reports'",
            "1 task of TASKS['other'] in the queue 'blue'",
        )
    ]


def test_doctor_tells_of_them_once_whichever_queue_it_looks_at(settings):
    leave_behind(settings)
    assert len(found("mail")) == len(found("default", "mail")) == 2


def test_cure_gives_them_to_another_queue(settings):
    leave_behind(settings)
    ran = run_all()
    for one in found():
        expression = one["cure"].partition("have them: ")[2].partition(".update(")[0]
        rows = eval(expression, {"QueuedTask": QueuedTask})
        rows.update(backend_name="default", queue_name="mail")
    assert found() == []
    assert (len(ran), len(run_all("mail"))) == (1, 3)


def test_one_whose_worker_has_died_is_left_behind_too(settings):
    tasks.add.using(queue_name="reports").enqueue(1)
    QueuedTask.objects.update(status=Status.working())
    settings.TASKS = LESS
    assert "1 task of" in found()[0]["finding"]


def test_one_that_is_over_is_not_left_behind(settings):
    tasks.add.using(queue_name="reports").enqueue(1)
    tasks.fail.using(queue_name="reports").enqueue()
    run_all()
    settings.TASKS = LESS
    assert found() == []


def test_backend_of_any_queue_leaves_none_behind(settings):
    leave_behind(settings, {name: {"BACKEND": BACKEND, "QUEUES": []} for name in TASKS})
    assert found() == []


def test_backend_that_has_moved_to_another_database_leaves_its_tasks_behind(settings):
    backend = {"BACKEND": BACKEND, "QUEUES": [], "OPTIONS": {"database": "other"}}
    leave_behind(settings, LESS | {"other": backend})
    assert [one["finding"].partition(":")[0] for one in found()] == [
        "Nobody runs 2 tasks of TASKS['default'] in the queue 'reports'",
        "Nobody runs 1 task of TASKS['other'] in the queue 'blue'",
    ]


def test_names_that_the_database_takes_for_one_are_one(settings, vendor):
    """MySQL and MariaDB do not tell a from A, so the queue serves those rows."""
    tasks.add.using(queue_name="Mail").enqueue(1)
    settings.TASKS = LESS
    assert len(found()) == (vendor != "mysql")
    assert len(run_all()) == (vendor == "mysql")


def test_many_are_not_counted_to_the_end(settings, monkeypatch):
    monkeypatch.setattr(unserved, "CAP", 1)
    leave_behind(settings)
    assert [one["finding"].split()[2] for one in found()] == ["1+", "1"]


@pytest.mark.parametrize("rows", [1, 40])
def test_look_takes_as_many_queries_however_many_tasks_there_are(rows, settings):
    for _ in range(rows):
        leave_behind(settings)
        settings.TASKS = TASKS
    with CaptureQueriesContext(connection) as queries:
        assert len(list(unserved.unserved("default", {("default", "mail")}))) == 2
    assert len(queries) == 8


def test_worker_warns_of_them_once_when_it_starts(settings, workers):
    less = TASKS | {"other": {"BACKEND": BACKEND, "QUEUES": ["red"]}}
    leave_behind(settings, less)
    worker = workers.start("--poll", 0.1, variables={"MODELQUEUE_TEST_TASK_BACKENDS": json.dumps(less)})
    wait_until(lambda: "'blue'" in worker.output)
    tasks.add.enqueue(1)
    wait_until(lambda: not QueuedTask.objects.filter(queue_name="default").exclude(status__state="finished"))
    assert worker.output.count("Nobody runs") == 1
    assert worker.stop()[0] == 0


def test_upkeep_tells_of_them_again_when_the_setting_has_changed(settings, caplog):
    leave_behind(settings)
    with caplog.at_level(logging.WARNING, "modelqueue"):
        for _ in range(2):
            queue_of().keep_up()
            queue_of("mail").keep_up()
        assert caplog.text.count("Ask manage.py modelqueue doctor.") == 2
        settings.TASKS = LESS
        queue_of().keep_up()
    assert caplog.text.count("Ask manage.py modelqueue doctor.") == 4
