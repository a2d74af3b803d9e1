"""What the claimer of a worker's only process hears, and when that is passed on."""

import math
import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
from django.core.management import call_command
from django.db import OperationalError, connection, connections

from modelqueue import State, Status
from modelqueue.engines import Engine, engine_for
from modelqueue.engines.notify import Hearing, may_listen
from modelqueue.worker import ears as module
from modelqueue.worker import prober
from modelqueue.worker.ears import Ears
from modelqueue.worker.questions import Questions
from tests.actions import stored
from tests.pace import within
from tests.processes import wait_until
from tests.testapp.models import Errand
from tests.testapp.queues import do_errand, review
from tests.worker.test_process import start

__all__ = ["start"]

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.vendor("postgresql")]

ERRANDS, REVIEWS = "testapp.do_errand", "testapp.review"
TABLES = {"default": {"testapp_errand": [ERRANDS]}}
BOTH = {"default": {"testapp_errand": [ERRANDS, REVIEWS]}}


@pytest.fixture(autouse=True)
def _trigger():
    engine = engine_for("default")
    execute(engine.create_notify_trigger("testapp_errand", "status"))
    yield
    execute(engine.drop_notify_trigger("testapp_errand", "status"))


def execute(statements):
    with connection.cursor() as cursor:
        for sql in statements:
            cursor.execute(sql)


@pytest.fixture
def hearings(monkeypatch):
    """The sessions that have begun to listen."""
    begun = []

    class Noted(Hearing):
        def __init__(self, connection):
            super().__init__(connection)
            begun.append(self)

    monkeypatch.setattr(module, "Hearing", Noted)
    return begun


def is_finished(errand):
    return stored(errand).state == State.finished


def end_session(hearing):
    execute([f"SELECT pg_terminate_backend({hearing._driver.info.backend_pid})"])


# In a process


def test_process_that_listens_claims_a_new_task_without_a_word(start, hearings):
    process = start(ERRANDS)
    process.pipe.send(("listen", TABLES))
    wait_until(lambda: hearings)
    for _ in range(3):
        errand = Errand.objects.create()
        wait_until(lambda errand=errand: is_finished(errand))
    process.wait_for("heard")


def test_session_that_is_ended_is_opened_again(start, hearings):
    process = start(ERRANDS)
    process.pipe.send(("listen", TABLES))
    for count in (1, 2, 3):
        wait_until(lambda count=count: len(hearings) == count)
        errand = Errand.objects.create()
        wait_until(lambda errand=errand: is_finished(errand))
        end_session(hearings[-1])


def test_process_goes_on_where_nobody_can_listen_and_tries_again(start, hearings, monkeypatch):
    tried = []

    def fail(connection):
        tried.append(connection)
        raise OperationalError("in recovery")

    monkeypatch.setattr(module, "_PAUSE", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(module, "Hearing", fail)
        process = start(ERRANDS)
        process.pipe.send(("listen", TABLES))
        wait_until(lambda: len(tried) > 3)
        errand = Errand.objects.create()
        process.pipe.send(("due", [ERRANDS]))
        wait_until(lambda: is_finished(errand))
    wait_until(lambda: hearings)
    errand = Errand.objects.create()
    wait_until(lambda: is_finished(errand))


# By itself


@pytest.fixture
def told(monkeypatch):
    """Return ears that listen, to both queues, and have nothing to pass on; they always ask."""
    monkeypatch.setattr(module, "_DEAR", math.inf)
    return listening([do_errand, review], BOTH)


def listening(queues, tables):
    connection.ensure_connection()
    ears = Ears(queues)
    ears.listen_to(tables)
    ears.heard()  # all, as nobody has heard what was told before
    time.sleep(module._INTERVAL * 2)
    assert ears.heard() == []
    return ears


def heard(ears):
    return wait_until(ears.heard)


def test_all_is_passed_on_when_it_begins_to_listen():
    """Nobody has heard what was told before."""
    connection.ensure_connection()
    ears = Ears([do_errand])
    ears.listen_to(TABLES)
    assert ears.heard() == [ERRANDS]


def test_of_several_queues_on_a_table_those_are_passed_on_that_have_due_tasks(told):
    errand = Errand.objects.create()
    assert heard(told) == [ERRANDS]
    Errand.objects.filter(pk=errand.pk).update(status=Status.finished())
    Errand.objects.create(status=Status.finished(), review_status=Status.waiting())
    execute(["SELECT pg_notify('modelqueue', 'testapp_errand')"])
    assert heard(told) == [REVIEWS]


def test_queue_that_is_alone_on_its_table_is_passed_on_without_a_question(monkeypatch):
    ears, asked = listening([do_errand], TABLES), []
    monkeypatch.setattr(Questions, "perhaps_due", lambda self, *arguments, **_: asked.append(arguments))
    Errand.objects.create()
    assert heard(ears) == [ERRANDS]
    assert asked == []


def test_where_queues_can_not_be_asked_all_are_passed_on(told, monkeypatch):
    def fail(self, using, queues, is_whole):
        raise OperationalError("a column is missing")

    (hearing,) = told.files
    monkeypatch.setattr(Questions, "perhaps_due", fail)
    Errand.objects.create()
    assert set(heard(told)) == {ERRANDS, REVIEWS}
    assert not hearing.has_ended  # else it would begin to listen, ask and fail again and again


def test_session_that_ends_while_queues_are_asked_is_closed(told, monkeypatch):
    def fail(self, using, queues, is_whole):
        raise OperationalError("away")

    monkeypatch.setattr(Questions, "perhaps_due", fail)
    monkeypatch.setattr(Engine, "is_connected", lambda engine: False)
    Errand.objects.create()
    assert set(heard(told)) == {ERRANDS, REVIEWS}
    assert connection.connection is None


def test_what_is_told_in_a_short_time_is_passed_on_at_once_and_then_together(monkeypatch):
    ears = listening([do_errand], TABLES)
    monkeypatch.setattr(module, "_INTERVAL", 60.0)
    Errand.objects.create()
    assert heard(ears) == [ERRANDS]
    Errand.objects.create()
    wait_until(lambda: ears.heard() == [] and ears._told)
    assert 30 < ears.pause <= 60
    assert ears.files == []  # it would wake up for each one more
    ears._not_before = 0.0
    assert ears.pause == 0
    assert ears.heard() == [ERRANDS]


def test_it_says_once_that_something_was_heard():
    ears = listening([do_errand], TABLES)
    assert ears.has_heard()
    assert not ears.has_heard()
    Errand.objects.create()
    assert heard(ears) == [ERRANDS]
    assert ears.has_heard()
    assert not ears.has_heard()


def test_what_is_told_while_it_is_asked_which_queues_have_tasks_is_passed_on_next(told, monkeypatch):
    asked, real = [], Questions.perhaps_due

    def perhaps_due(self, *arguments, **options):
        due = real(self, *arguments, **options)
        if not asked:
            Errand.objects.create()
            execute(["SELECT 1"])  # with its answer, at the latest, comes what was told
        asked.append(arguments)
        return due

    monkeypatch.setattr(Questions, "perhaps_due", perhaps_due)
    Errand.objects.create()
    assert heard(told) == [ERRANDS]
    assert told.pause < math.inf
    assert heard(told) == [ERRANDS]


def test_session_that_something_closes_again_and_again_listens_again_after_a_pause(monkeypatch):
    """A callable that gives the queryset, for example, each time that it is asked."""
    ears = listening([do_errand], TABLES)
    monkeypatch.setattr(module, "_PAUSE", 60.0)
    ears._listen_from["default"] = 0.0
    for listens in (True, False):
        connection.close()
        connection.ensure_connection()
        time.sleep(module._INTERVAL * 2)
        assert ears.heard() == [ERRANDS]
        assert bool(ears.files) == listens
    assert 30 < ears.pause <= 60


def test_where_it_takes_long_to_ask_all_are_passed_on_for_a_while(told, monkeypatch):
    asked, real = [], Questions.perhaps_due

    def perhaps_due(self, *arguments, **options):
        asked.append(arguments)
        return real(self, *arguments, **options)

    monkeypatch.setattr(Questions, "perhaps_due", perhaps_due)
    monkeypatch.setattr(module, "_DEAR", 0.0)
    monkeypatch.setattr(module, "_PAUSE", 60.0)
    Errand.objects.create()
    assert heard(told) == [ERRANDS]
    Errand.objects.create()
    assert set(heard(told)) == {ERRANDS, REVIEWS}
    assert len(asked) == 1


def test_notifications_of_other_tables_and_of_unknown_queues_are_passed_over():
    ears = listening([do_errand], {"default": {"testapp_errand": ["gone"], "testapp_task": [ERRANDS]}})
    seen = []
    execute(
        f"SELECT pg_notify('modelqueue', '{table}')" for table in ("other", "testapp_errand", "testapp_task")
    )
    wait_until(lambda: seen.extend(ears.heard()) or ERRANDS in seen)
    assert set(seen) == {ERRANDS}


def test_connection_that_is_closed_is_not_opened_to_listen():
    ears = listening([do_errand], TABLES)
    connection.close()
    assert ears.heard() == [ERRANDS]  # perhaps somebody has told something meanwhile
    assert ears.files == []
    assert connection.connection is None
    assert ears.pause == math.inf  # the claim opens it, and has its own pauses where nobody answers


def test_session_that_is_ended_is_closed_and_all_is_claimed():
    ears = listening([do_errand], TABLES)
    (hearing,) = ears.files
    other = connections["default"].copy()
    with other.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [hearing._driver.info.backend_pid])
    other.close()
    assert heard(ears) == [ERRANDS]
    assert ears.files == []
    assert connection.connection is None
    assert ears.pause == math.inf


@pytest.mark.parametrize(
    ("setting", "value", "may"),
    [("OPTIONS", {}, True), ("OPTIONS", {"pool": True}, False), ("AUTOCOMMIT", False, False)],
)
def test_session_of_a_pool_or_without_autocommit_does_not_listen(setting, value, may):
    settings = {"OPTIONS": {}, "AUTOCOMMIT": True, setting: value}
    assert may_listen(SimpleNamespace(settings_dict=settings)) == may


# The worker


def idle_worker():
    """A worker that looks twice a minute when it has nothing to do, also just after it had."""
    prober._LATELY, prober._GROWTH = 0.0, 1000.0
    prober.Prober.ask = lambda self, names: None  # nor does it look again as its process has heard something
    call_command("modelqueue", "worker", "--poll", "30")


def finish(worker):
    """Enqueue an errand; return how many seconds it took until it was finished."""
    began = time.monotonic()
    errand = Errand.objects.create()
    wait_until(lambda: is_finished(errand) or not worker.alive)
    assert worker.alive, worker.errors
    return time.monotonic() - began


def test_only_process_of_a_worker_listens_and_so_does_the_one_that_replaces_it(processes):
    worker = processes.start(idle_worker)
    finish(worker)
    time.sleep(1)  # it looks once more, and has nothing to do after that
    seconds = [finish(worker) for _ in range(3)]
    assert sessions_of_the_supervisor() == 0
    (process,) = grandchildren(worker.pid)  # its parent is the fork server
    os.kill(process, signal.SIGKILL)
    finish(worker)
    time.sleep(1)
    seconds += [finish(worker) for _ in range(3)]
    print(f"\nfinished after {', '.join(f'{1000 * one:.0f}' for one in seconds)} ms")
    assert max(seconds) < within(5)
    worker.signal(signal.SIGTERM)
    assert worker.wait(30) == 0


def grandchildren(pid):
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listed.splitlines())
    return [one for one, parent in parents.items() if parents.get(parent) == pid]


def sessions_of_the_supervisor():
    """How many sessions do nothing but listen."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle' "
            "AND pid <> pg_backend_pid() AND query LIKE 'LISTEN %'"
        )
        return cursor.fetchone()[0]
