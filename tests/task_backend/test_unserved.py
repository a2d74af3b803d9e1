"""Tasks that are left behind when their backend, or their queue, is taken from TASKS are told of."""

import json
import logging
from contextlib import suppress
from io import StringIO

import pytest
from django.core.management import call_command
from django.db import OperationalError, connection
from django.test.utils import CaptureQueriesContext

from modelqueue import Status
from modelqueue.management import doctor
from modelqueue.task_backend import unserved
from modelqueue.task_backend.models import QueuedTask
from modelqueue.worker import upkeep as upkeep_module
from modelqueue.worker.upkeep import Upkeep
from tests.processes import wait_until
from tests.task_backend.backends import BACKEND, TASKS, queue_of, row_of, run_all, tasks

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
        ("warning", "default", f"{number} in no queue that the setting TASKS has in the database {place}.")
        for number, place in (
            ("2 tasks are", "'default': of the backend 'default', in its queue 'reports'"),
            ("1 task is", "'default': of the backend 'other', in its queue 'blue'"),
        )
    ]


def test_doctor_tells_of_them_once_whichever_queue_it_looks_at(settings):
    leave_behind(settings)
    assert len(found("mail")) == len(found("default", "mail")) == 2


@pytest.mark.parametrize("database", ["default", "other"])
def test_cure_gives_them_to_another_queue_and_leaves_those_that_are_over(database, settings):
    options = {"OPTIONS": {"database": database}}
    settings.TASKS = {name: one | options for name, one in TASKS.items()}
    over = tasks.add.using(queue_name="reports").enqueue(0)
    run_all()
    leave_behind(settings, {name: one | options for name, one in LESS.items()})
    ran = run_all()
    for one in found():
        expression = one["cure"].partition("have them: ")[2].partition(".update(")[0]
        rows = eval(expression, {"QueuedTask": QueuedTask})
        rows.update(backend_name="default", queue_name="mail")
    assert found() == []
    assert (len(ran), len(run_all("mail"))) == (1, 3)
    assert row_of(over, database).queue_name == "reports"


def test_one_whose_worker_has_died_is_left_behind_too(settings):
    tasks.add.using(queue_name="reports").enqueue(1)
    QueuedTask.objects.update(status=Status.working())
    settings.TASKS = LESS
    assert "1 task is" in found()[0]["finding"]


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
    moved = TASKS["other"] | {"OPTIONS": {"database": "other"}}
    leave_behind(settings, TASKS | {"other": moved})
    (one,) = found()
    assert one["database"] == "default"
    assert "in the database 'default': of the backend 'other', in its queue 'blue'" in one["finding"]


@pytest.mark.parametrize("name", ["Mail", "m\N{LATIN SMALL LETTER A WITH ACUTE}il"])
def test_names_that_the_database_takes_for_one_are_one(name, settings, vendor):
    """MySQL and MariaDB do not tell a from A, nor from other kinds of it: the queue serves those rows."""
    tasks.add.using(queue_name=name).enqueue(1)
    settings.TASKS = LESS
    assert len(found()) == (vendor != "mysql")
    assert len(run_all()) == (vendor == "mysql")


def test_many_are_not_counted_to_the_end(settings, monkeypatch):
    monkeypatch.setattr(unserved, "CAP", 1)
    leave_behind(settings)
    assert [one["finding"].partition(" are in no")[0] for one in found()][:1] == ["1+ tasks"]


@pytest.mark.parametrize("rows", [1, 40])
def test_look_takes_as_many_queries_however_many_tasks_there_are(rows, settings):
    for _ in range(rows):
        leave_behind(settings)
        settings.TASKS = TASKS
    with CaptureQueriesContext(connection) as queries:
        assert len(list(unserved.unserved("default", {("default", "mail")}, 60))) == 2
    assert len(queries) == 10


@pytest.mark.parametrize("names", [1, 40])
def test_look_passes_over_all_names_of_a_backend_that_takes_any(names):
    """There may be one for each user of the project."""
    for number in range(names):
        tasks.add.using(queue_name=f"of user {number}").enqueue(1)
    with CaptureQueriesContext(connection) as queries:
        assert list(unserved.unserved("default", {("default", None)}, 60)) == []
    assert len(queries) == 2


def test_doctor_says_that_it_could_not_look_at_all_queues(settings, monkeypatch):
    leave_behind(settings)
    monkeypatch.setattr(doctor, "EXAMINE_SECONDS", -1.0)
    (one,) = found()
    assert (one["severity"], one["cost"]) == ("info", "Others may have tasks that nobody runs.")
    assert "-1 s were over before the queue 'mail' of TASKS['default']." in one["finding"]


def test_doctor_asks_also_where_another_queue_has_the_table(declare, settings):
    declare(QueuedTask.objects.filter(function="x"), "status", name="a_first_one")(lambda task: None)
    leave_behind(settings)
    assert len(found()) == 2


def test_worker_warns_of_them_once_when_it_starts(settings, workers):
    less = TASKS | {"other": {"BACKEND": BACKEND, "QUEUES": ["red"]}}
    leave_behind(settings, less)
    worker = workers.start("--poll", 0.1, variables={"MODELQUEUE_TEST_TASK_BACKENDS": json.dumps(less)})
    wait_until(lambda: "'blue'" in worker.output)
    tasks.add.enqueue(1)
    wait_until(lambda: not QueuedTask.objects.filter(queue_name="default").exclude(status__state="finished"))
    assert worker.output.count("Ask manage.py modelqueue doctor.") == 1
    assert worker.stop()[0] == 0


@pytest.fixture
def upkeep(monkeypatch):
    """Start the upkeep of queues, as a worker does; at the end it is stopped."""
    monkeypatch.setattr(upkeep_module, "_EXAMINE_SECONDS", 60.0)  # however slow the machine is
    started = []

    def start(*queues):
        started.append(Upkeep([*queues]))
        started[-1].start()

    yield start
    for one in started:
        one.stop()
        wait_until(lambda one=one: one.has_ended)


def test_look_that_fails_is_told_once_and_holds_up_nothing(settings, upkeep, caplog, monkeypatch):
    def fail(*arguments):
        looks.append(1)
        raise OperationalError("canceling statement due to statement timeout")

    leave_behind(settings)
    rounds, looks = [], []
    with caplog.at_level(logging.WARNING, "modelqueue"):
        for name in ("default", "mail"):
            monkeypatch.setattr(queue_of(name), "upkeep", lambda name=name: rounds.append(name))
            monkeypatch.setattr(queue_of(name), "examine", fail)
        upkeep(queue_of("default"), queue_of("mail"))
        wait_until(lambda: len(rounds) >= 6)
    assert len(looks) == caplog.text.count("default: can not be examined: canceling statement") == 1


def test_look_that_has_failed_is_made_again_after_a_while(settings, upkeep, caplog, monkeypatch):
    def fail_at_first(*arguments):
        looks.append(1)
        for finding in examine(*arguments):
            yield finding
            if len(looks) <= 2:
                raise OperationalError("the database is shutting down")

    leave_behind(settings)
    looks, rounds, examine = [], [], queue_of("mail").examine
    monkeypatch.setattr(upkeep_module, "_EXAMINE_INTERVAL", 0.0)
    with caplog.at_level(logging.WARNING, "modelqueue"):
        monkeypatch.setattr(queue_of("mail"), "upkeep", lambda: rounds.append(1))
        monkeypatch.setattr(queue_of("mail"), "examine", fail_at_first)
        upkeep(queue_of("mail"))
        wait_until(lambda: len(rounds) >= 5)
    assert len(looks) == 3
    assert caplog.text.count("the database is shutting down") == 1
    assert caplog.text.count("Ask manage.py modelqueue doctor.") == 2


def test_two_queues_tell_of_them_once(settings, upkeep, caplog, monkeypatch):
    leave_behind(settings)
    rounds = []
    with caplog.at_level(logging.WARNING, "modelqueue"):
        monkeypatch.setattr(queue_of("mail"), "upkeep", lambda: rounds.append(1))
        upkeep(queue_of("default"), queue_of("mail"))
        wait_until(lambda: len(rounds) >= 2)
    assert caplog.text.count("Ask manage.py modelqueue doctor.") == 2
