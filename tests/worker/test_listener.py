"""The listener: what it hears, when it does without, and what becomes of it when something fails."""

import multiprocessing
import signal
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from django.core.management import call_command
from django.db import OperationalError, connection, connections

from modelqueue import State, Status
from modelqueue.engines import engine_for
from modelqueue.engines.notify import Ear, Hearing
from modelqueue.worker import listener as module
from modelqueue.worker import prober
from modelqueue.worker.listener import Listener
from tests.actions import stored, succeed
from tests.pace import within
from tests.processes import wait_until
from tests.testapp.models import Errand, Task
from tests.testapp.queues import do_errand, review

pytestmark = pytest.mark.django_db(transaction=True)
on_postgresql = pytest.mark.vendor("postgresql")

BOTH = ["testapp.do_errand", "testapp.review"]


def execute(statements):
    with connection.cursor() as cursor:
        for sql in statements:
            cursor.execute(sql)


def create_trigger(table="testapp_errand"):
    execute(engine_for("default").create_notify_trigger(table, "status"))


def drop_trigger(table="testapp_errand"):
    execute(engine_for("default").drop_notify_trigger(table, "status"))


@pytest.fixture
def trigger():
    create_trigger()
    yield
    drop_trigger()


@pytest.fixture
def ears(monkeypatch):
    """The sessions that the listeners of this test have opened."""
    opened = []

    class Noted(Ear):
        def __init__(self, using):
            super().__init__(using)
            opened.append(self)

    monkeypatch.setattr(module, "Ear", Noted)
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "_TICK", 0.05)
    return opened


@pytest.fixture
def listen(ears):
    """Start a listener of some queues; return it, with what it has heard."""
    started = []

    def listen(*queues, hand_over=None):
        heard = []
        one = Listener(list(queues), heard.append, hand_over)
        one.start()
        started.append(one)
        return one, heard

    yield listen
    for one in started:
        one.stop()
        for thread in one.threads:
            thread.join(10)
            assert not thread.is_alive()


def is_open(ear):
    return ear._connection.connection is not None


@on_postgresql
def test_new_task_is_heard_of_at_once(trigger, listen):
    one, heard = listen(do_errand, review)
    wait_until(lambda: heard == [BOTH])  # what was told before it listened
    Errand.objects.create()
    wait_until(lambda: heard == [BOTH] * 2)
    assert not one.has_ended


@on_postgresql
def test_nothing_is_heard_of_tables_without_a_queue(trigger, listen):
    create_trigger("testapp_task")
    try:
        _, heard = listen(do_errand)
        wait_until(lambda: len(heard) == 1)
        Task.objects.create()
        Errand.objects.create()
        wait_until(lambda: len(heard) == 2)
    finally:
        drop_trigger("testapp_task")
    assert heard == [["testapp.do_errand"]] * 2


def test_without_a_trigger_nothing_listens(listen, ears, vendor, caplog):
    one, heard = listen(do_errand, review)
    if vendor != "postgresql":
        assert one.threads == []
        return
    wait_until(lambda: ears and not is_open(ears[0]))
    assert one.threads[0].is_alive()
    assert heard == []
    assert len(ears) == 1
    assert caplog.text == ""


@on_postgresql
def test_trigger_that_comes_later_is_found_and_one_that_goes_is_not_waited_for(listen, ears, monkeypatch):
    monkeypatch.setattr(module, "_INTERVAL", 0.05)
    _, heard = listen(do_errand)
    wait_until(lambda: len(ears) > 2)
    create_trigger()
    wait_until(lambda: heard)
    drop_trigger()
    count = len(ears)
    wait_until(lambda: len(ears) > count + 1)
    del heard[:]
    Errand.objects.create()
    count = len(ears)
    wait_until(lambda: len(ears) > count + 1)
    assert heard == []


@on_postgresql
def test_connection_that_is_ended_comes_back_and_that_is_told_once(trigger, listen, ears, caplog):
    _, heard = listen(do_errand)
    wait_until(lambda: heard)
    for _ in range(2):
        del heard[:]
        execute([f"SELECT pg_terminate_backend({ears[-1]._connection.connection.info.backend_pid})"])
        wait_until(lambda: heard)
        del heard[:]
        Errand.objects.create()
        wait_until(lambda: heard)
    assert caplog.text.count("The worker can not listen to the database 'default', trying again: ") == 2
    assert caplog.text.count("New tasks are heard of again from the database 'default'.") == 2
    assert [is_open(ear) for ear in ears] == [False, False, True]


@on_postgresql
def test_failure_is_told_once_however_long_it_lasts(trigger, listen, ears, caplog, monkeypatch):
    tried = []

    def fail(self):
        tried.append(self)
        raise OperationalError("in recovery")

    with monkeypatch.context() as patch:
        patch.setattr(Ear, "listen", fail)
        one, heard = listen(do_errand)
        wait_until(lambda: len(tried) > 3)
        assert heard == []
    wait_until(lambda: heard)
    assert caplog.text.count("trying again: in recovery") == 1
    assert one.threads[0].is_alive()


@on_postgresql
def test_failure_is_not_told_where_nobody_has_seen_a_trigger(listen, ears, caplog, monkeypatch):
    tried = []

    def fail(self, tables):
        tried.append(self)
        raise OperationalError("away")

    monkeypatch.setattr(Ear, "tables_with_trigger", fail)
    listen(do_errand)
    wait_until(lambda: len(tried) > 3)
    assert "away" not in caplog.text


@on_postgresql
def test_session_that_hears_nothing_is_told_once_and_closed(trigger, listen, ears, caplog, monkeypatch):
    """As that of PgBouncer in transaction mode."""
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    monkeypatch.setattr(module, "_DEAF", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(Hearing, "read", lambda self: set())
        _, heard = listen(do_errand)
        wait_until(lambda: len(ears) > 3)
        assert heard == []
        assert not is_open(ears[0])
    wait_until(lambda: heard)
    assert caplog.text.count("hears nothing from the database 'default': perhaps there is a pooler") == 1
    assert caplog.text.count("New tasks are heard of again") == 1


@on_postgresql
def test_what_others_are_to_listen_to_is_handed_over_now_and_then_and_tested_once(
    trigger, listen, ears, monkeypatch, caplog
):
    handed, tests, hears = [], [], Ear.hears
    monkeypatch.setattr(module, "_INTERVAL", 0.05)
    monkeypatch.setattr(Ear, "hears", lambda self, seconds: tests.append(self) or hears(self, seconds))
    _, heard = listen(do_errand, hand_over=lambda *given: handed.append(given))
    wait_until(lambda: len(handed) > 2)
    assert handed[:2] == [("default", {"testapp_errand": ["testapp.do_errand"]})] * 2
    assert len(tests) == 1
    assert heard == []
    wait_until(lambda: len(ears) > 1 and not is_open(ears[0]))
    with monkeypatch.context() as patch:
        patch.setattr(Ear, "tables_with_trigger", lambda self, tables: 1 / 0)
        count = len(ears)
        wait_until(lambda: len(ears) > count + 2)
    del handed[:]
    wait_until(lambda: handed)
    assert len(tests) == 1
    assert caplog.text == ""  # who listens does so all the while


@on_postgresql
def test_nothing_is_handed_over_that_is_not_heard(trigger, listen, ears, monkeypatch):
    handed = []
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    monkeypatch.setattr(module, "_DEAF", 0.05)
    monkeypatch.setattr(Hearing, "read", lambda self: set())
    listen(do_errand, hand_over=lambda *given: handed.append(given))
    wait_until(lambda: len(ears) > 3)
    assert handed == []


@on_postgresql
def test_where_sessions_are_of_a_pool_the_listener_keeps_one_of_its_own(trigger, listen, monkeypatch):
    handed = []
    monkeypatch.setattr(module, "may_listen", lambda connection: False)
    _, heard = listen(do_errand, hand_over=lambda *given: handed.append(given))
    wait_until(lambda: heard)
    assert handed == []


def test_queue_whose_queryset_fails_costs_the_others_nothing(listen, declare, vendor):
    def away():
        raise LookupError("away")

    broken = declare(Task, "status", name="broken")(succeed)
    broken.source = away
    one, _ = listen(broken, do_errand)
    assert len(one.threads) == (vendor == "postgresql")


@on_postgresql
def test_listening_takes_no_connection_of_a_pool(monkeypatch):
    options = {"pool": {"max_size": 4}, "application_name": "listener"}
    monkeypatch.setitem(connections["default"].settings_dict, "OPTIONS", options)
    ear = Ear("default")
    assert getattr(ear._connection, "pool", None) is None
    assert ear._connection.settings_dict["OPTIONS"] == {"application_name": "listener"}
    assert connections["default"].settings_dict["OPTIONS"]["pool"] == {"max_size": 4}


@on_postgresql
def test_session_is_in_autocommit_whatever_the_settings_say(trigger, monkeypatch):
    monkeypatch.setitem(connections["default"].settings_dict, "AUTOCOMMIT", False)
    ear = Ear("default")
    try:
        ear.listen()
        assert ear.hears(5)
    finally:
        ear.close()


@on_postgresql
def test_table_of_another_schema_is_found():
    execute(["CREATE SCHEMA other", 'CREATE TABLE other."Odd tasks" (status bigint)'])
    create_trigger('other"."Odd tasks')
    ear = Ear("default")
    try:
        found = ear.tables_with_trigger(['other"."Odd tasks', "testapp_errand", "nowhere"])
        assert found == {"Odd tasks": ['other"."Odd tasks']}
    finally:
        ear.close()
        execute(["DROP SCHEMA other CASCADE"])
        drop_trigger()


@on_postgresql
def test_parts_of_a_partitioned_table_are_heard_of_by_their_own_names():
    execute(
        [
            "CREATE TABLE parted (part int, status bigint) PARTITION BY LIST (part)",
            "CREATE TABLE parted_first PARTITION OF parted FOR VALUES IN (1) PARTITION BY LIST (part)",
            'CREATE TABLE "First of parted" PARTITION OF parted_first FOR VALUES IN (1)',
        ]
    )
    create_trigger("parted")
    one = module._Listening("default", {"parted": BOTH}, lambda names: None, threading.Event())
    ear = Ear("default")
    try:
        queues = one._find_triggers(ear)
        ear.listen()
        execute([f"INSERT INTO parted VALUES (1, {int(Status.waiting())})"])
        told = wait_until(lambda: ear.wait(1))
        assert [queues[name] for name in told] == [BOTH]
    finally:
        ear.close()
        drop_trigger("parted")
        execute(["DROP TABLE parted"])


@on_postgresql
def test_what_comes_with_the_answer_to_a_statement_is_heard(trigger):
    ear = Ear("default")
    try:
        ear.listen()
        Errand.objects.create()
        time.sleep(0.2)  # until it has come
        ear.tables_with_trigger([])
        assert ear.wait(5) == {"testapp_errand"}
        assert ear.wait(0) == set()
    finally:
        ear.close()


@on_postgresql
def test_psycopg_2_is_read_in_its_own_way():
    reader, writer = multiprocessing.Pipe(duplex=False)
    told = [SimpleNamespace(payload="a"), SimpleNamespace(payload="b"), SimpleNamespace(payload="a")]

    def poll():
        driver.notifies += told if reader.poll() else []

    driver = SimpleNamespace(fileno=reader.fileno, notifies=[], poll=poll)
    ear = Ear("default")
    said = []
    cursor = SimpleNamespace(execute=said.append)
    ear._connection = SimpleNamespace(connection=driver, cursor=lambda: nullcontext(cursor))
    ear.listen()
    assert said == ["LISTEN modelqueue"]
    assert ear.wait(0) == set()
    writer.send_bytes(b".")
    assert ear.wait(5) == {"a", "b"}
    assert driver.notifies == []


# The worker


def idle_worker():
    """A worker that looks twice a minute when it has nothing to do, also just after it had."""
    prober._LATELY, prober._GROWTH = 0.0, 1000.0
    call_command("modelqueue", "worker", "--poll", "30", "--processes", "2")


def finish(worker):
    """Enqueue an errand; return how many seconds it took until it was finished."""
    began = time.monotonic()
    errand = Errand.objects.create()
    wait_until(lambda: stored(errand).state == State.finished or not worker.alive)
    assert worker.alive, worker.errors
    return time.monotonic() - began


@on_postgresql
def test_idle_worker_begins_a_new_task_at_once(trigger, processes):
    worker = processes.start(idle_worker)
    finish(worker)
    listening = set(wait_until(sessions_that_listen))
    time.sleep(1)  # it looks once more, and has nothing to do after that
    seconds = [finish(worker) for _ in range(3)]
    print(f"\nfinished after {', '.join(f'{1000 * one:.0f}' for one in seconds)} ms")
    assert max(seconds) < within(5)
    execute(f"SELECT pg_terminate_backend({pid})" for pid in listening)
    wait_until(lambda: set(sessions_that_listen()) - listening)
    assert finish(worker) < within(5)
    worker.signal(signal.SIGTERM)
    assert worker.wait(30) == 0


def sessions_that_listen():
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle' "
            "AND pid <> pg_backend_pid() AND query LIKE 'LISTEN %'"
        )
        return [pid for (pid,) in cursor.fetchall()]
