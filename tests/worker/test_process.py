"""One process of a worker, run in threads of the test: what it does with the database away, with rows that do
not load, with each message of its supervisor."""

import asyncio
import itertools
import logging
import multiprocessing
import threading
import time
from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import pytest
from django.db import IntegrityError, InternalError, OperationalError, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

import modelqueue
from modelqueue import Retry, State, Status, attempts, leases, signals, verbs
from modelqueue.attempts import AsyncAttempt, AtomicAttempt, Attempt
from modelqueue.clock import now
from modelqueue.engines import Engine, RowLocked, engine_for, note_full
from modelqueue.exceptions import Interrupted, TimedOut
from modelqueue.worker import child, completer, limits, loop, running, slots, threads
from modelqueue.worker import process as process_module
from modelqueue.worker.bell import Bell
from modelqueue.worker.board import Board
from modelqueue.worker.options import Options
from modelqueue.worker.process import Process
from modelqueue.worker.running import Claimed, Register, Running
from modelqueue.worker.system import interrupt_thread
from tests.actions import SECOND, heard, row, stored, succeed, unexpected, write_down
from tests.pace import within
from tests.processes import wait_until
from tests.testapp.models import Delivery, Errand, Job, Ledger, Paper, PrintJob, Task
from tests.testapp.queues import do_errand, review

pytestmark = pytest.mark.django_db(transaction=True)


class Started:
    """A process in a thread, and the end of the pipe that its supervisor has."""

    def __init__(self, *names, places=10, **options):
        self.pipe, theirs = multiprocessing.Pipe()
        self.heard = []
        self.board = Board(places, names)
        self._process = Process(
            Options(names=names, **{"grace": 5.0, **options}), theirs, self.board, Bell(names)
        )
        self.thread = threading.Thread(target=self._process.run)
        self.thread.start()
        self.wait_for("ready")

    def wait_for(self, message):
        def is_heard():
            self.listen()
            return [one for one in self.heard if one[0] == message]

        return wait_until(is_heard)[-1][1:]

    def listen(self):
        with suppress(EOFError):
            while self.pipe.poll():
                self.heard.append(self.pipe.recv())

    def held(self):
        """What its supervisor would give back if it died now, each with what stands on the board."""
        self.listen()
        told = [one for message, *told in self.heard if message == "claimed" for one in told[0]]
        places = {one.place: one for one in told}
        held = []
        for place, note in self.board.read_all().items():
            claimed = Claimed(place, note.number, note.queue, note.row) if note.queue else places[place]
            assert claimed.number == note.number
            held.append((claimed, note))
        return held

    def ended(self):
        self.wait_for("ended")
        counts = {}
        for message, *arguments in self.heard:
            if message == "ended":
                for how, count in arguments[0].items():
                    counts[how] = counts.get(how, 0) + count
        return counts

    def stop(self, grace=5.0):
        self.pipe.send(("stop", grace))
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def start(monkeypatch):
    """Start a process; at the end it is stopped."""
    exits = []
    monkeypatch.setattr(process_module.os, "_exit", exits.append)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    monkeypatch.setattr(threads, "_LONGEST_WAIT", 60.0)  # nothing is given back because the machine is slow
    started = []

    def start(*names, **options):
        started.append(Started(*names, **options))
        return started[-1]

    start.exits = exits
    yield start
    for one in started:
        if one.thread.is_alive():
            one.stop(0.0)
    for keeper in leases._keepers.values():  # of tasks that were left: else they are renewed for ever
        for group in keeper._groups.values():
            group.held.clear()
        with keeper._changed:  # nor is a connection to be kept, as by a process
            keeper._is_reserved = False
            keeper._changed.notify_all()
        wait_until(lambda one=keeper: not one._is_connected)


def make(title="", **options):
    return Errand.objects.create(title=title, **options)


NOT_TO_DO = Status.created(1)


def test_tasks_are_run_until_there_are_none_and_reported(start):
    errands = [make(), make("fail"), make("miss")]
    process = start("testapp.do_errand")

    def is_done():
        process.pipe.send(("due", ["testapp.do_errand"]))
        return sum(process.ended().values()) == 4

    wait_until(is_done)
    assert process.ended() == {"finish": 1, "fail": 3}  # the last attempt is left to another process
    assert stored(errands[0]).state == State.finished


@pytest.mark.parametrize("atomic", [False, True])
def test_task_that_failed_waits_under_the_priority_that_its_queue_chooses(atomic, start, declare):
    def fail(task):
        raise ValueError("no")

    options = {"retry": 1, "atomic": atomic, "next_priority": lambda task, moment: 10**17 - 1}  # never due
    declare(Task, "status", name="tasks", **options)(fail)
    task = Task.objects.create()
    start("tasks")
    wait_until(lambda: stored(task) == Status.waiting(10**17 - 1, 1))


def test_due_tasks_are_claimed_when_the_supervisor_says_so(start):
    process = start("testapp.do_errand")
    time.sleep(0.2)
    errand = make()
    time.sleep(0.3)
    assert stored(errand).state == State.waiting
    process.pipe.send(("due", ["testapp.do_errand"]))
    wait_until(lambda: stored(errand).state == State.finished)


def test_supervisor_knows_what_a_process_has_claimed_and_begun_and_under_which_lease(start):
    errand = make("doze 60", status=Status.waiting(5))
    process = start("testapp.do_errand")
    ((claimed, note),) = wait_until(process.held)
    wait_until(lambda: process.held()[0][1].has_begun)
    assert (claimed.queue, claimed.row.pk, claimed.row.status) == (
        "testapp.do_errand",
        errand.pk,
        Status.waiting(5),
    )
    first = stored(errand)
    assert note.leases == {first}
    assert not [message for message, *_ in process.heard if message == "claimed"]  # it stands on the board
    wait_until(lambda: stored(errand) > first)  # it was renewed
    assert stored(errand) in process.held()[0][1].leases
    process.stop(0.1)
    assert process.held() == []


@pytest.mark.parametrize("name", ["testapp.do_errand", "testapp.review"])
def test_attempt_has_begun_when_the_receivers_of_its_claim_are_called(name, start):
    """They may be what kills the process, and the same claim would come again and again."""
    seen = []

    def look(sender, **facts):
        seen.append([note.has_begun for _, note in process.held()])

    field = "status" if name == "testapp.do_errand" else "review_status"
    process = start(name)
    signals.task_claimed.connect(look)
    try:
        make(**{"status": NOT_TO_DO, field: Status.waiting()})
        process.pipe.send(("due", [name]))
        wait_until(lambda: seen)
    finally:
        signals.task_claimed.disconnect(look)
    assert seen == [[True]]


def test_tasks_for_which_the_board_has_no_place_are_run_all_the_same(start):
    """The code was changed since, and its queue has more slots."""
    errands = [make("doze 0.5") for _ in range(3)]
    process = start("testapp.do_errand", places=1)
    wait_until(lambda: all(stored(errand).state == State.finished for errand in errands))
    assert len(process.held()) == 0


def test_claims_that_can_not_be_told_are_run_all_the_same(start, monkeypatch, caplog):
    """Their primary key is of a class that can not be pickled."""
    caplog.set_level(logging.DEBUG, "modelqueue")
    monkeypatch.setattr(Board, "can_name", lambda board, row: False)
    monkeypatch.setattr(
        running, "Claimed", lambda *given: SimpleNamespace(queue="errands", row=threading.Lock())
    )
    errand = make()
    start("testapp.do_errand")
    wait_until(lambda: stored(errand).state == State.finished)
    assert "Claims can not be told, of namespace(queue='errands', " in caplog.text


LAST = Status.waiting(5, do_errand.policy.retry)


def test_task_on_its_last_attempt_is_left_to_a_process_for_these(start):
    last, other = make(status=LAST), make(status=Status.waiting(6, 1))
    start("testapp.do_errand")
    wait_until(lambda: stored(other).state == State.finished)
    assert stored(last) == LAST
    start("testapp.do_errand", threads=1, alone=True)
    wait_until(lambda: stored(last).state == State.finished)


def test_process_for_last_attempts_runs_one_at_a_time_and_nothing_else(start):
    first, second = make("doze 0.3", status=LAST), make("doze 0.3", status=LAST)
    other = make(status=Status.waiting(4))
    process = start("testapp.do_errand", "testapp.review", threads=1, alone=True)
    seen = set()

    def are_finished():
        seen.add(do_errand.tally()["working"])
        process.pipe.send(("due", ["testapp.do_errand"]))
        return stored(first).state == stored(second).state == State.finished

    wait_until(are_finished)
    assert seen <= {0, 1}
    assert stored(other) == Status.waiting(4)


def test_process_for_last_attempts_ends_when_there_was_none_for_long(start, monkeypatch):
    monkeypatch.setattr(process_module, "_LONGEST_IDLE", 0.3)
    process = start("testapp.do_errand", threads=1, alone=True)
    assert process.wait_for("full") == ("has no last attempts to run any more",)


@pytest.mark.parametrize("name", ["testapp.do_errand", "testapp.review"])
def test_task_that_has_failed_before_begins_when_earlier_outcomes_are_written(name, start, monkeypatch):
    """It may kill its process, and they would be charged."""
    order, settle, begin = [], Attempt.settle, Register.begin

    def settle_slowly(attempt, error):
        order.append(("ended", attempt.claim.row.pk))
        time.sleep(0.3)
        outcome = settle(attempt, error)
        order.append(("written", attempt.claim.row.pk))
        return outcome

    def note(register, running):
        order.append(("begun", running.attempt.claim.row.pk))
        begin(register, running)

    monkeypatch.setattr(Attempt, "settle", settle_slowly)
    monkeypatch.setattr(Register, "begin", note)
    field = "status" if name == "testapp.do_errand" else "review_status"

    def enqueue(attempts):
        return make(**{"status": NOT_TO_DO, field: Status.waiting(5, attempts)})

    fresh = enqueue(0)
    process = start(name)
    wait_until(lambda: ("ended", fresh.pk) in order)
    failed = enqueue(1)
    process.pipe.send(("due", [name]))
    wait_until(lambda: stored(failed, field).state == State.finished)
    assert order.index(("written", fresh.pk)) < order.index(("begun", failed.pk))


def test_process_says_how_many_tasks_it_runs(start):
    make("doze 1")
    process = start("testapp.do_errand")

    def is_one():  # a claim that is under way has four
        process.pipe.send(("due", []))
        return process.wait_for("answer") == (1,)

    wait_until(is_one)


def test_async_task_is_run_and_its_failure_recorded(start, declare):
    async def fail(task):
        raise ValueError("no")

    declare(Task, "status", name="failing", retry=0)(fail)
    task = Task.objects.create()
    reviewed = make(status=NOT_TO_DO, review_status=Status.waiting(0))
    start("testapp.review", "failing")
    wait_until(lambda: stored(task).state == State.canceled)
    wait_until(lambda: review.tally()["finished"] == 1)
    assert Errand.objects.get(pk=reviewed.pk).log == ["reviewed"]


@pytest.mark.parametrize("atomic", [False, True])
def test_task_with_atomic_is_run(atomic, start, declare):
    declare(Task, "status", name="tasks", atomic=atomic)(lambda task: None)
    task = Task.objects.create()
    process = start("tasks")
    wait_until(lambda: stored(task).state == State.finished)
    wait_until(lambda: process.ended() == {"finish": 1})


def test_message_that_a_process_does_not_know_is_answered_and_ends_nothing(start):
    """Of a supervisor with other code: without an answer it would take the process for one that hangs."""
    process = start("testapp.do_errand")
    process.pipe.send(("new words", 1, 2))
    process.wait_for("answer")
    errand = make()
    process.pipe.send(("due", ["testapp.do_errand"]))
    wait_until(lambda: stored(errand).state == State.finished)


class FragileError(Exception):
    """Raised by rows that do not load."""


@pytest.mark.parametrize("kind", ["plain", "atomic", "async"])
def test_row_that_does_not_load_is_a_failed_attempt(kind, start, declare, monkeypatch):
    def from_db(cls, *arguments):
        raise FragileError

    async def never(task):
        unexpected(task)

    action = never if kind == "async" else unexpected
    declare(Job, "status", name="jobs", retry=0, atomic=kind == "atomic", error_field="error")(action)
    job = Job.objects.create()
    monkeypatch.setattr(Job, "from_db", classmethod(from_db))
    start("jobs")
    wait_until(lambda: Job.objects.filter(status__state="canceled").values_list("pk"))
    assert "FragileError" in Job.objects.values_list("error", flat=True).get(pk=job.pk)


def test_queue_that_is_broken_takes_no_turns_from_another(start, declare, monkeypatch):
    def rows():
        if is_broken:
            raise LookupError("broken")
        return Task.objects.all()

    is_broken = []
    declare(rows, "status", name="broken")(succeed)
    is_broken.append(True)
    Errand.objects.bulk_create([Errand() for _ in range(100)])
    process = start("testapp.do_errand", "broken")
    began = time.monotonic()

    def is_done():
        process.pipe.send(("due", ["testapp.do_errand", "broken"]))
        return process.ended() == {"finish": 100}

    wait_until(is_done)
    # A pause of a second with each turn took longer than a minute.
    assert time.monotonic() - began < within(10)


def test_queue_that_is_gone_from_the_code_ends_nothing(start, caplog):
    process = start("testapp.do_errand", "testapp.gone")
    errand = make()
    process.pipe.send(("due", ["testapp.gone", "testapp.do_errand"]))
    wait_until(lambda: stored(errand).state == State.finished)
    assert "The code has no queue any more of the name testapp.gone" in caplog.text


@pytest.mark.parametrize("harm", [SystemExit, KeyboardInterrupt, None])
def test_action_that_leaves_the_event_loop_does_not_end_it(harm, start, declare, caplog):
    async def leave():
        raise harm

    async def act(task):
        if task.data:
            return
        if harm is None:
            asyncio.get_running_loop().stop()
        else:
            await asyncio.gather(leave())

    declare(Task, "status", name="tasks", retry=0)(act)
    first = Task.objects.create()
    process = start("tasks")
    expected = State.finished if harm is None else State.canceled
    wait_until(lambda: stored(first).state == expected)
    second = Task.objects.create(data="sound")
    process.pipe.send(("due", ["tasks"]))
    wait_until(lambda: stored(second).state == State.finished)
    assert "event loop" in caplog.text


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_transaction_that_an_action_leaves_open_elsewhere_does_not_swallow_the_next(start, declare, caplog):
    def act(task):
        Task.objects.using("other").create(data=task.data)
        if task.data == "first":
            transaction.atomic(using="other").__enter__()

    declare(Task, "status", name="tasks")(act)
    first = Task.objects.create(data="first")
    process = start("tasks", threads=1)
    wait_until(lambda: stored(first).state == State.finished)
    second = Task.objects.create(data="second")
    process.pipe.send(("due", ["tasks"]))
    wait_until(lambda: stored(second).state == State.finished)
    assert set(Task.objects.using("other").values_list("data", flat=True)) == {"first", "second"}
    assert "has left a transaction open on the database 'other'" in caplog.text


# Stopping


@pytest.mark.parametrize("is_ready", [False, True])
def test_process_that_is_told_to_stop_before_it_began_claims_nothing(is_ready, monkeypatch):
    """A started process has Django loaded only where the main module of the worker has done so."""
    calls = []

    def note(name):
        return lambda *arguments: calls.append(name)

    monkeypatch.setattr(process_module, "apps", SimpleNamespace(ready=is_ready))
    monkeypatch.setattr(process_module.django, "setup", note("setup"))
    monkeypatch.setattr(process_module, "leave_stop_signals_to_the_supervisor", note("deaf to signals"))
    monkeypatch.setattr(process_module, "end_without_fail", note("end"))
    errand = make()
    ours, theirs = multiprocessing.Pipe()
    ours.send(("stop", 0.0))
    process_module.main(
        Options(names=("testapp.do_errand",)),
        theirs,
        Board(1, ["testapp.do_errand"]),
        Bell(["testapp.do_errand"]),
    )
    assert calls == ["deaf to signals", *([] if is_ready else ["setup"]), "end"]
    assert ours.recv() == ("answer", 0)
    assert not ours.poll()
    assert stored(errand) == errand.status


def test_task_whose_thread_comes_to_run_it_only_after_the_grace_time_is_given_back_unbegun(
    start, monkeypatch
):
    run, interrupt = threads.Threads.run, threads.Threads.interrupt
    interrupted = threading.Event()

    def run_late(self, running, *given):
        assert interrupted.wait(30)
        run(self, running, *given)

    def note(self):
        interrupt(self)
        interrupted.set()

    monkeypatch.setattr(threads.Threads, "run", run_late)
    monkeypatch.setattr(threads.Threads, "interrupt", note)
    errand = make(status=Status.waiting(5))
    process = start("testapp.do_errand")
    wait_until(lambda: stored(errand).state == State.working)
    process.stop(0.1)
    assert process.ended() == {"release": 1}
    assert stored(errand) == Status.waiting(5)
    assert not Ledger.objects.exists()


@pytest.mark.parametrize("name", ["testapp.do_errand", "testapp.review"])
def test_what_can_be_interrupted_is_given_back_by_the_process(name, start):
    field = "status" if name == "testapp.do_errand" else "review_status"
    title = "doze 60" if field == "status" else "sleep 60"
    errand = make(title, **{"status": NOT_TO_DO, field: Status.waiting(5, 1)})
    process = start(name)
    wait_until(lambda: stored(errand, field).state == State.working)
    time.sleep(0.2)
    process.stop(0.1)
    assert stored(errand, field) == Status.waiting(5, 1)
    assert start.exits == []


def test_what_can_not_be_interrupted_is_left_to_the_supervisor(start, monkeypatch, declare):
    monkeypatch.setattr(process_module, "_LAST_MOMENTS", 0.2)
    # What pends for a thread that is blocked makes the tracer of coverage spin, with Python 3.11.
    monkeypatch.setattr("modelqueue.worker.threads.interrupt_thread", lambda *arguments: None)
    has_begun, go_on = threading.Event(), threading.Event()
    declare(Task, "status", name="tasks")(lambda task: has_begun.set() or go_on.wait(60))
    task = Task.objects.create(status=Status.waiting(5))
    process = start("tasks")
    assert has_begun.wait(60)
    process.stop(0.1)
    [(claimed, note)] = process.held()
    assert (claimed.queue, claimed.row.pk, claimed.row.status) == ("tasks", task.pk, Status.waiting(5))
    assert note.leases == {stored(task)}
    assert note.has_begun
    assert start.exits == [0]
    go_on.set()


@pytest.mark.parametrize("is_interrupted", [True, False])
def test_what_a_claim_has_set_is_put_back_with_the_status(is_interrupted, start, monkeypatch, declare):
    """By the process itself or, where it can not interrupt the action, by the supervisor."""
    monkeypatch.setattr(process_module, "_LAST_MOMENTS", 0.2)
    if not is_interrupted:
        monkeypatch.setattr("modelqueue.worker.threads.interrupt_thread", lambda *arguments: None)
    has_begun, may_go_on = threading.Event(), threading.Event()

    def hang(task):
        has_begun.set()
        while not may_go_on.is_set():
            time.sleep(0.01)

    queue = declare(Task, "status", name="tasks", claim_values=lambda: {"data": "by alpha"})(hang)
    task = Task.objects.create(status=Status.waiting(5), data="old")
    process = start("tasks")
    assert has_begun.wait(60)
    assert row(task).data == "by alpha"
    process.stop(0.1)
    if not is_interrupted:
        [(claimed, note)] = process.held()
        assert verbs.release(queue.source(), claimed.row, note.leases)
    may_go_on.set()
    assert (stored(task), row(task).data) == (Status.waiting(5), "old")


def test_process_stops_in_order_when_its_supervisor_is_gone(start):
    errand = make("doze 0.5")
    process = start("testapp.do_errand")
    wait_until(Ledger.objects.exists)  # its action has begun
    process.pipe.close()
    process.thread.join(30)
    assert not process.thread.is_alive()
    assert stored(errand).state == State.finished


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tasks": 2}, "has run 2 tasks"),
        ({"max_seconds": 0.2}, "has run for 0.2 s"),
        ({"max_memory": 1}, "MiB of memory"),
    ],
)
def test_process_that_is_to_be_replaced_says_why_and_stops(options, reason, start):
    for _ in range(3):
        make()
    process = start("testapp.do_errand", **options)
    assert reason in process.wait_for("full")[0]
    process.thread.join(30)
    assert not process.thread.is_alive()
    assert do_errand.tally()["working"] == 0


def end_as_supervisor(process):
    process.pipe.close()


def tell_to_stop(process):
    process.pipe.send(("stop", 2.0))


@pytest.mark.parametrize("end", [end_as_supervisor, tell_to_stop])
def test_process_that_is_being_replaced_has_the_grace_time_from_when_it_is_told(end, start, declare):
    """It may take its time as long as nobody wants to stop; what runs then is not interrupted at once."""
    declare(Task, "status", name="tasks")(doze)
    task = Task.objects.create(data="2.4")
    process = start("tasks", max_seconds=0.1, grace=2.0)
    wait_until(lambda: stored(task).state == State.working)
    process.wait_for("full")
    time.sleep(1.2)
    end(process)
    process.thread.join(30)
    assert (stored(task).state, stored(task).attempts) == (State.finished, 1)
    assert start.exits == []


def test_last_moments_of_a_process_end_before_it_is_killed():
    moments = process_module._LAST_MOMENTS + process_module._LAST_RENEWALS
    assert moments + process_module._TICK * 3 < child._EXTRA - 0.5


def test_process_all_of_which_hangs_says_in_time_what_it_leaves(start, monkeypatch, declare):
    """Else it is killed before that, and all of it is charged."""
    monkeypatch.setattr(process_module, "_LAST_MOMENTS", 0.4)
    monkeypatch.setattr(process_module, "_ONE_MOMENT", 0.2)
    monkeypatch.setattr(process_module, "_LAST_RENEWALS", 0.1)
    monkeypatch.setattr("modelqueue.worker.threads.interrupt_thread", lambda *arguments: None)
    waited, go_on = [], threading.Event()

    def hang(self, seconds):
        waited.append(max(0.0, seconds))
        time.sleep(waited[-1])
        return False

    declare(Task, "status", name="tasks")(lambda task: go_on.wait(60))
    tasks = [Task.objects.create() for _ in range(3)]
    process = start("tasks")
    wait_until(lambda: all(stored(task).state == State.working for task in tasks))
    interrupt, stop_completer = process._process._threads.interrupt, process._process._completer.stop

    def begin_to_hang():  # the grace time is over
        interrupt()
        monkeypatch.setattr(process_module.Claimer, "join", hang)
        monkeypatch.setattr(process_module.Register, "wait_for_all", hang)
        monkeypatch.setattr(process_module.Completer, "stop", hang)
        monkeypatch.setattr(leases.Lease, "end", hang)

    monkeypatch.setattr(process._process._threads, "interrupt", begin_to_hang)
    process.stop(0.1)
    assert len(process.held()) == 3
    assert len(waited) == 6
    assert sum(waited) <= 0.51
    go_on.set()
    stop_completer(5.0)


def test_process_that_is_being_replaced_outlives_its_supervisor_by_the_grace_time_alone(start, declare):
    declare(Task, "status", name="tasks")(doze)
    task = Task.objects.create(data="60", status=Status.waiting(5))
    process = start("tasks", max_seconds=0.1, grace=0.2)
    wait_until(lambda: stored(task).state == State.working)
    process.wait_for("full")
    process.pipe.close()
    process.thread.join(30)
    assert stored(task) == Status.waiting(5)


def doze(task):
    until = time.monotonic() + float(task.data)
    while time.monotonic() < until:
        time.sleep(0.01)


# The database is away


def failing(times, function, error=None):
    """Let a function raise so many times before it works."""
    left = [times]

    def call(*arguments, **options):
        if left[0]:
            left[0] -= 1
            raise error or OperationalError("away")
        return function(*arguments, **options)

    return call


def failing_late(times, function):
    """Let a function raise so many times when it has done its work."""
    left = [times]

    def call(*arguments):
        result = function(*arguments)
        if left[0]:
            left[0] -= 1
            raise OperationalError("away")
        return result

    return call


def test_outcome_that_can_not_be_written_is_written_later(start, monkeypatch, caplog):
    monkeypatch.setattr(Attempt, "settle", failing(2, Attempt.settle))
    errand = make()
    process = start("testapp.do_errand")
    wait_until(lambda: stored(errand).state == State.finished)
    wait_until(lambda: process.ended() == {"finish": 1})
    assert "its outcome can not be written yet: away" in caplog.text


@pytest.mark.db_feature("has_select_for_update_skip_locked")
@pytest.mark.parametrize("changes", [False, True])
def test_locked_row_holds_up_no_other_outcome(changes, start, declare):
    def act(task):
        locked.wait(30)
        if task == free:
            time.sleep(0.2)  # the other one comes first
        task.data = "changed" if changes else task.data

    locked = threading.Event()
    declare(Task, "status", name="tasks")(act)
    held, free = Task.objects.create(), Task.objects.create()
    process = start("tasks")
    wait_until(lambda: stored(free).state == State.working)
    with transaction.atomic():
        Task.objects.select_for_update().get(pk=held.pk)
        locked.set()
        wait_until(lambda: stored(free).state == State.finished)
        time.sleep(0.3)  # it is tried again, and still locked
        assert stored(held).state == State.working
    wait_until(lambda: process.ended() == {"finish": 2})
    assert stored(held).state == State.finished


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_lock_in_the_other_table_of_a_model_holds_up_no_other_outcome(start, declare):
    def act(task):
        locked.wait(30)
        if task == free:
            time.sleep(0.2)  # the other one comes first
        task.pages = 2

    locked = threading.Event()
    declare(PrintJob, "status", name="jobs")(act)
    held, free = PrintJob.objects.create(), PrintJob.objects.create()
    process = start("jobs")
    wait_until(lambda: stored(free).state == State.working)
    with transaction.atomic():
        with connections["default"].cursor() as cursor:
            cursor.execute("SELECT pages FROM testapp_printjob WHERE job_ptr_id = %s FOR UPDATE", [held.pk])
        locked.set()
        wait_until(lambda: stored(free).state == State.finished)
        assert stored(held).state == State.working
    wait_until(lambda: process.ended() == {"finish": 2})
    assert PrintJob.objects.filter(pages=2).count() == 2


def test_lease_of_what_can_not_be_written_yet_is_renewed(start, monkeypatch):
    monkeypatch.setattr(leases, "_SHARE", 0.01)  # never by itself
    is_away = threading.Event()
    settle = Attempt.settle

    def settle_later(attempt, error):
        if is_away.is_set():
            attempt.renewal.end()
            raise OperationalError("away")
        return settle(attempt, error)

    monkeypatch.setattr(Attempt, "settle", settle_later)
    is_away.set()
    errand = make()
    start("testapp.do_errand")
    wait_until(lambda: stored(errand).state == State.working)
    first = stored(errand)
    wait_until(lambda: stored(errand) > first)
    assert stored(errand).state == State.working
    is_away.clear()
    wait_until(lambda: stored(errand).state == State.finished)


def test_while_the_database_is_away_one_outcome_asks_for_it(start, declare, monkeypatch):
    """With each the timeout of a connection would pass, and those of other databases wait for that."""
    settle, asked = Attempt.settle, []

    def settle_later(attempt, error):
        asked.append(attempt)
        if len(asked) < 5:
            raise OperationalError("away")
        return settle(attempt, error)

    def act(task):
        go_on.wait(30)

    def away(engine, source, changes):
        raise OperationalError("away")

    go_on = threading.Event()
    monkeypatch.setattr(Attempt, "settle", settle_later)
    monkeypatch.setattr(Engine, "set_statuses", away)
    monkeypatch.setattr(type(engine_for("default")), "meets_everybody", lambda engine, error: True)
    declare(Task, "status", name="tasks")(act)
    Task.objects.bulk_create([Task() for _ in range(4)])
    process = start("tasks")
    wait_until(lambda: Task.objects.filter(status__state="working").count() == 4)
    go_on.set()
    wait_until(lambda: len(asked) == 2)
    # Between two questions the leases of all are renewed.
    wait_until(lambda: sum(len(group.held) for group in leases.keeper_for("default")._groups.values()) == 4)
    wait_until(lambda: process.ended() == {"finish": 4})
    assert len(set(map(id, asked[:5]))) == 1
    assert len(asked) == 8


def test_outcome_that_is_refused_for_long_is_given_up(start, monkeypatch, caplog):
    monkeypatch.setattr(completer, "_LONGEST_REFUSAL", 0.2)
    monkeypatch.setattr(Attempt, "settle", failing(5, Attempt.settle, IntegrityError("no")))
    errand = make()
    process = start("testapp.do_errand")
    wait_until(lambda: process.ended() == {"lost": 1})
    assert stored(errand).state == State.working
    assert "it is left to its recovery" in caplog.text


def test_outcome_is_not_given_up_because_the_database_was_away_for_long_before_it_refused_it(
    start, monkeypatch
):
    """A standby that takes over answers at first, but writes nothing."""
    monkeypatch.setattr(completer, "_LONGEST_REFUSAL", 0.3)
    began, settle = [], Attempt.settle

    def settle_late(self, error):
        began.append(time.monotonic())
        if time.monotonic() < began[0] + 0.5:
            raise OperationalError("away")
        if len(refused) < 1:
            refused.append(time.monotonic())
            raise InternalError("read-only")
        return settle(self, error)

    refused = []
    monkeypatch.setattr(Attempt, "settle", settle_late)
    monkeypatch.setattr(Engine, "meets_everybody", lambda self, error: isinstance(error, OperationalError))
    errand = make()
    process = start("testapp.do_errand")
    wait_until(lambda: process.ended() == {"finish": 1})
    assert refused
    assert stored(errand).state == State.finished


REFUSED, AWAY, FULL = InternalError("read-only"), OperationalError("away"), OperationalError("full")


class Settled:
    """A completer whose time stands still, and one of its tasks for each list of errors."""

    def __init__(self, monkeypatch, *errors):
        self.now, self.ended = 0.0, []
        monkeypatch.setattr(completer, "time", SimpleNamespace(monotonic=lambda: self.now))
        register = SimpleNamespace(end=lambda ended: self.ended.extend(how for _, how in ended))
        self.completer = completer.Completer(register)
        self.tasks = [completer._Ended(self.running(list(each)), None) for each in errors]

    def running(self, errors):
        def settle(error):
            if errors:
                raise errors.pop(0)
            return SimpleNamespace(ending="finish", error=None)

        engine = SimpleNamespace(
            meets_everybody=lambda error: error is AWAY,
            is_full=lambda error: error is FULL,
            give_way=lambda: None,
        )
        source = SimpleNamespace(using="default")
        attempt = SimpleNamespace(source=source, engine=engine, settle=settle, resume_renewal=lambda: None)
        return SimpleNamespace(attempt=attempt)

    def settle(self, task):
        """Take the next step with a task, long after the last one."""
        self.now += completer._LONGEST_REFUSAL + 1
        self.completer._settle(task)


@pytest.mark.parametrize("other", [AWAY, RowLocked("held")], ids=["away", "locked"])
def test_outcome_is_refused_for_as_long_as_it_is_refused_and_for_nothing_else(other, monkeypatch):
    """The database was away meanwhile, or somebody had locked the row: it is tried as often as at first."""
    one = Settled(monkeypatch, [REFUSED, other, REFUSED])
    for _ in range(4):
        one.settle(*one.tasks)
    assert one.ended == ["finish"]


def test_outcome_waits_for_room_however_long_the_disk_is_full(monkeypatch):
    one = Settled(monkeypatch, 4 * [FULL])
    for _ in range(5):
        one.settle(*one.tasks)
    assert one.ended == ["finish"]


def test_process_tells_its_supervisor_that_a_disk_is_full(start):
    process = start("testapp.do_errand")
    note_full("default")
    assert process.wait_for("no room") == (["default"],)


def test_outcome_is_not_refused_while_it_waits_for_another_that_asks_for_the_database(monkeypatch):
    one = Settled(monkeypatch, [AWAY], [REFUSED, REFUSED])
    first, second = one.tasks
    for task in (second, first, second, first, second, second):
        one.settle(task)
    assert one.ended == ["finish", "finish"]


def test_attempt_is_not_charged_when_its_queue_can_not_choose_a_priority_as_the_database_is_away(
    start, declare, monkeypatch
):
    tries = []

    def choose(task, moment):
        tries.append(1)
        if len(tries) < 3:
            raise OperationalError("away")
        return moment

    def once(task):
        if len(tries) == 0:
            raise Retry

    monkeypatch.setattr(
        Engine, "is_of_the_database_itself", lambda self, error: isinstance(error, OperationalError)
    )
    monkeypatch.setattr(Engine, "patiently", lambda self, function, reconnect=False: function())
    declare(Task, "status", name="tasks", retry=0, next_priority=choose)(once)
    task = Task.objects.create()
    process = start("tasks")

    def is_finished():
        process.pipe.send(("due", ["tasks"]))
        return stored(task).state == State.finished

    wait_until(is_finished)
    assert (len(tries), stored(task).attempts) == (3, 1)


def test_what_was_decided_stands_when_it_is_written_later(start, declare, monkeypatch):
    def put_back(task):
        task.status = Status.created(7)

    monkeypatch.setattr(Attempt, "write_status", failing_late(2, Attempt.write_status))
    declare(Task, "status", name="tasks")(put_back)
    task = Task.objects.create()
    process = start("tasks")
    wait_until(lambda: process.ended() == {"assign": 1})
    assert stored(task) == Status.created(7)


def test_traces_of_a_save_that_was_rolled_back_are_not_written_later(start, declare, monkeypatch):
    """It has read what the action did not change, which somebody has edited since."""

    def change(paper):
        Paper.objects.update(pages=3)
        paper.title = "changed"

    save_merged = attempts.save_merged

    def fail_once(*arguments):
        save_merged(*arguments)
        if not failed.is_set():
            failed.set()
            raise OperationalError("away")

    failed = threading.Event()
    monkeypatch.setattr(attempts, "save_merged", fail_once)
    monkeypatch.setattr(Engine, "is_of_the_database_itself", lambda engine, error: True)
    monkeypatch.setattr(completer, "_FIRST_PAUSE", 1.0)
    declare(Paper, "status", name="papers")(change)
    paper = Paper.objects.create()
    process = start("papers")
    assert failed.wait(30)
    wait_until(lambda: Paper.objects.update(pages=5))
    wait_until(lambda: process.ended() == {"finish": 1})
    assert Paper.objects.values_list("title", "pages").get(pk=paper.pk) == ("changed", 5)


def test_outcome_whose_answer_was_lost_is_not_taken_for_a_lost_lease(start, declare, monkeypatch):
    monkeypatch.setattr(Attempt, "write_status_if_free", failing_late(1, Attempt.write_status_if_free))
    monkeypatch.setattr(Engine, "is_of_the_database_itself", lambda engine, error: True)
    declare(Task, "status", name="tasks")(succeed)
    task = Task.objects.create()
    with heard("lease_lost", "task_finished") as events:
        process = start("tasks")
        wait_until(lambda: process.ended() == {"finish": 1})
    assert [name for name, _ in events] == ["task_finished"]
    assert stored(task).state == State.finished


def test_outcome_that_fails_by_a_fault_of_ours_stops_nothing(start, monkeypatch, caplog):
    monkeypatch.setattr(Attempt, "settle", failing(1, Attempt.settle, RuntimeError("a fault")))
    errands = [make(), make()]
    process = start("testapp.do_errand", threads=1)
    wait_until(lambda: do_errand.tally()["finished"] == 1)
    wait_until(lambda: process.ended() == {"lost": 1, "finish": 1})
    assert [stored(one).state for one in errands] == [State.working, State.finished]
    assert "it is left to its recovery" in caplog.text


def test_claim_that_fails_is_tried_again_and_told_once(start, monkeypatch, caplog):
    monkeypatch.setattr(verbs, "claim", failing(3, verbs.claim))
    errand = make()
    start("testapp.do_errand")
    wait_until(lambda: stored(errand).state == State.finished)
    assert caplog.text.count("its tasks can not be claimed, trying again: away") == 1
    assert caplog.text.count("its tasks can be claimed again") == 1


def test_claim_that_fails_by_a_fault_of_ours_stops_nothing(start, monkeypatch, caplog):
    monkeypatch.setattr(verbs, "claim", failing(1, verbs.claim, RuntimeError("a fault")))
    process = start("testapp.do_errand")
    wait_until(lambda: "its tasks can not be claimed" in caplog.text)
    errand = make()
    process.pipe.send(("due", ["testapp.do_errand"]))
    wait_until(lambda: stored(errand).state == State.finished)


def test_lack_of_connections_is_told_with_what_to_set(start, declare, monkeypatch, caplog):
    def fail(task):
        raise OperationalError("too many")

    engine = type(modelqueue.engines.engine_for("default"))
    monkeypatch.setattr(engine, "connections_in_use", lambda self: (300, 300))
    declare(Task, "status", name="tasks", retry=0)(fail)
    Task.objects.bulk_create([Task(), Task()])
    start("tasks")
    wait_until(lambda: "has 300 connections of the 300 that it allows" in caplog.text)
    wait_until(lambda: Task.objects.filter(status__state="canceled").count() == 2)
    assert caplog.text.count("has 300 connections of the 300 that it allows") == 1


@pytest.mark.parametrize(
    "answer", [None, (30, 300), OperationalError("too many"), RuntimeError("a fault")], ids=repr
)
def test_no_advice_is_given_where_connections_are_not_known_to_be_scarce(
    answer, start, declare, monkeypatch, caplog
):
    def fail(task):
        raise OperationalError("no such table")

    def count(engine):
        asked.append(engine)
        if isinstance(answer, Exception):
            raise answer
        return answer

    asked = []
    monkeypatch.setattr(completer, "_COUNT_INTERVAL", 0.0)
    monkeypatch.setattr(type(engine_for("default")), "connections_in_use", count)
    declare(Task, "status", name="tasks", retry=0)(fail)
    Task.objects.bulk_create([Task(), Task()])
    process = start("tasks", threads=1)
    wait_until(lambda: process.ended() == {"fail": 2})
    wait_until(lambda: asked)  # once or twice, as the two may be written together
    assert "connections of the" not in caplog.text


def test_server_tells_its_connections(vendor):
    found = modelqueue.engines.engine_for("default").connections_in_use()
    if vendor == "sqlite":
        assert found is None
    else:
        assert 0 < found[0] <= found[1]


def test_coroutine_that_is_canceled_by_itself_has_failed(start, declare):
    """Given back uncharged it would be the next one again, and again."""

    async def cancel_itself(task):
        raise asyncio.CancelledError

    declare(Task, "status", name="tasks", retry=0)(cancel_itself)
    task = Task.objects.create()
    start("tasks")
    wait_until(lambda: stored(task).state == State.canceled)


@pytest.mark.parametrize("is_late", [True, False])
def test_coroutine_that_had_ended_when_it_was_canceled_has_ended_well(is_late):
    class Ended:
        def cancelled(self):
            return False

        def exception(self):
            return None

        def result(self):
            return None, asyncio.CancelledError()

    put = []
    one = loop.Loop(SimpleNamespace(put=lambda running, error: put.append((running, error))))
    canceled = running.Running(None, None, 1)
    one._tasks[canceled] = Ended()
    one._canceled[canceled] = TimedOut() if is_late else None
    one._end(canceled, Ended())
    assert put == [(canceled, None)]


def test_coroutine_that_is_canceled_before_it_has_begun_is_given_back(start, monkeypatch):
    """Its slot would be taken for ever."""
    begin = loop.Loop._begin

    def begin_and_cancel(self, running):
        begin(self, running)
        self._cancel(running)

    monkeypatch.setattr(loop.Loop, "_begin", begin_and_cancel)
    errand = make(status=NOT_TO_DO, review_status=Status.waiting(5))
    process = start("testapp.review")
    wait_until(lambda: process.ended() == {"release": 1})
    assert stored(errand, "review_status") == Status.waiting(5)


def test_coroutine_that_fails_by_a_fault_of_ours_is_a_failed_attempt(start, monkeypatch):
    async def fail(self, action, task):
        raise RuntimeError("a fault")

    monkeypatch.setattr(AsyncAttempt, "await_action", fail)
    errand = make(status=NOT_TO_DO, review_status=Status.waiting(5, 2))
    start("testapp.review")
    wait_until(lambda: stored(errand, "review_status").attempts == 3)
    assert stored(errand, "review_status").state == State.waiting


def test_task_that_can_not_be_begun_is_given_back(start, monkeypatch, caplog):
    submit = failing(1, threads.Threads.submit, RuntimeError("can't start new thread"))
    monkeypatch.setattr(threads.Threads, "submit", submit)
    errand = make(status=Status.waiting(5))
    process = start("testapp.do_errand")
    wait_until(lambda: process.ended() == {"release": 1})
    assert stored(errand) == Status.waiting(5)
    process.pipe.send(("due", ["testapp.do_errand"]))
    wait_until(lambda: stored(errand).state == State.finished)


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_atomic_task_that_is_given_back_holds_up_no_other_while_its_row_is_locked(
    start, declare, monkeypatch
):
    def submit_next(self, some):
        if is_claimed.is_set():
            return submit(self, some)
        is_claimed.set()
        assert is_locked.wait(30)
        raise RuntimeError("can't start new thread")

    submit, is_claimed, is_locked = threads.Threads.submit, threading.Event(), threading.Event()
    monkeypatch.setattr(threads.Threads, "submit", submit_next)
    declare(Task, "status", name="atomic", atomic=True)(succeed)
    task, bystander = Task.objects.create(), connections["default"].copy()
    process = start("atomic", "testapp.do_errand")
    assert is_claimed.wait(30)
    try:
        with bystander.cursor() as cursor:
            cursor.execute("BEGIN")
            cursor.execute("SELECT * FROM testapp_task FOR UPDATE")
        is_locked.set()
        errand = make(status=Status.waiting(5))
        process.pipe.send(("due", ["testapp.do_errand"]))
        wait_until(lambda: stored(errand).state == State.finished)
        assert stored(task).state == State.working
    finally:
        bystander.close()
    wait_until(lambda: process.pipe.send(("due", ["atomic"])) or stored(task).state == State.finished)


def test_threads_that_are_there_run_what_a_missing_one_can_not(start, declare, monkeypatch, caplog):
    def start_one_only(self):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start_thread(self)

    started, start_thread = [], threads._Thread.start
    monkeypatch.setattr(threads._Thread, "start", start_one_only)
    declare(Task, "status", name="tasks")(succeed)
    Task.objects.bulk_create([Task() for _ in range(5)])
    process = start("tasks", threads=2)
    wait_until(lambda: process.pipe.send(("due", ["tasks"])) or process.ended() == {"finish": 5})
    assert caplog.text.count("so 1 of 2 run the tasks") == 1


def test_task_that_can_be_neither_begun_nor_given_back_is_left_to_the_supervisor(start, monkeypatch):
    """It has no lease that is renewed, which must hinder neither the next try nor the end of the process."""

    def no_thread(*arguments):
        raise RuntimeError("can't start new thread")

    def settle(attempt, error):
        tries.append(error)
        raise OperationalError("away")

    tries = []
    monkeypatch.setattr(leases.Keeper, "hold_all", no_thread)
    monkeypatch.setattr(Attempt, "settle", settle)
    errand = make(status=Status.waiting(5))
    process = start("testapp.do_errand")
    wait_until(lambda: len(tries) >= 2)
    process.stop(0.1)
    [(claimed, note)] = process.held()
    assert (claimed.row.pk, claimed.row.status) == (errand.pk, Status.waiting(5))
    assert note.leases == {stored(errand)}
    assert not note.has_begun


def test_outcome_of_an_atomic_action_that_can_not_be_written_is_written_later(start, declare, monkeypatch):
    def fail(task):
        raise ValueError("no")

    monkeypatch.setattr(AtomicAttempt, "write_or_fail", failing(2, AtomicAttempt.write_or_fail))
    declare(Task, "status", name="tasks", atomic=True, retry=0)(fail)
    task = Task.objects.create()
    process = start("tasks")
    wait_until(lambda: process.ended() == {"fail": 1})
    assert (stored(task).state, stored(task).attempts) == (State.canceled, 1)


def lose_answer_of_commit(monkeypatch, calls):
    """Let the first commit after the action was called be done, but end with an error in its thread."""

    def commit_and_lose(wrapper):
        commit(wrapper)
        if calls and not lost and threading.current_thread().name == "modelqueue-action":
            lost.append(wrapper)
            raise OperationalError("answer lost")

    lost, commit = [], BaseDatabaseWrapper._commit
    monkeypatch.setattr(BaseDatabaseWrapper, "_commit", commit_and_lose)


@pytest.mark.parametrize("is_away", [False, True])
@pytest.mark.parametrize("writes", [False, True])
def test_atomic_action_whose_commit_was_answered_by_an_error_is_not_run_again(
    writes, is_away, start, declare, monkeypatch
):
    """Also where the database is away when that is to be found out."""

    def act(task):
        calls.append(task.pk)
        if writes:
            Task.objects.filter(pk=task.pk).update(status=Status.finished(7))

    calls = []
    lose_answer_of_commit(monkeypatch, calls)
    if is_away:
        monkeypatch.setattr(AtomicAttempt, "write_or_fail", failing(2, AtomicAttempt.write_or_fail))
    declare(Task, "status", name="tasks", atomic=True)(act)
    task = Task.objects.create()
    with heard("task_finished", "lease_lost") as events:
        process = start("tasks")
        wait_until(lambda: process.ended() == {"assign" if writes else "finish": 1})
    assert calls == [task.pk]
    assert [(name, facts["status"]) for name, facts in events] == [("task_finished", stored(task))]
    assert stored(task).state == State.finished


def test_lease_of_an_atomic_action_is_renewed_while_its_outcome_waits_for_the_completer(
    start, declare, monkeypatch
):
    """Where another outcome asks for the database, that may take long."""

    def fail(task):
        raise ValueError("no")

    waiting, put = [], completer.Completer.put
    monkeypatch.setattr(leases, "_SHARE", 30)
    monkeypatch.setattr(completer.Completer, "put", lambda *arguments: waiting.append(arguments))
    monkeypatch.setattr(AtomicAttempt, "write_or_fail", failing(1, AtomicAttempt.write_or_fail))
    declare(Task, "status", name="tasks", atomic=True, retry=0, lease=3 * SECOND)(fail)
    task = Task.objects.create()
    process = start("tasks")
    wait_until(lambda: waiting)
    before = stored(task)
    wait_until(lambda: stored(task) > before)
    put(*waiting[0])
    wait_until(lambda: process.ended() == {"fail": 1})
    assert stored(task).state == State.canceled


def test_atomic_attempt_that_could_not_begin_as_the_database_was_away_is_not_charged(
    start, declare, monkeypatch
):
    monkeypatch.setattr(AtomicAttempt, "hold", failing(1, AtomicAttempt.hold))
    monkeypatch.setattr(AtomicAttempt, "write_or_fail", failing(2, AtomicAttempt.write_or_fail))
    declare(Task, "status", name="tasks", atomic=True, retry=0)(succeed)
    task = Task.objects.create()
    process = start("tasks")

    def is_finished():
        process.pipe.send(("due", ["tasks"]))
        return stored(task).state == State.finished

    wait_until(is_finished)
    assert stored(task).attempts == 1
    wait_until(lambda: process.ended() == {"release": 1, "finish": 1})


def test_attempt_of_an_atomic_action_is_not_charged_either_when_its_queue_can_not_choose_a_priority(
    start, declare, monkeypatch
):
    """Its own error is decided on once more, not that of the database."""
    monkeypatch.setattr(AtomicAttempt, "placed", failing(2, AtomicAttempt.placed))
    tries = []

    def once(task):
        tries.append(1)
        if len(tries) == 1:
            raise Retry

    declare(Task, "status", name="tasks", retry=0, atomic=True)(once)
    task = Task.objects.create()
    process = start("tasks")

    def is_finished():
        process.pipe.send(("due", ["tasks"]))
        return stored(task).state == State.finished

    wait_until(is_finished)
    assert (len(tries), stored(task).attempts) == (2, 1)


@pytest.mark.parametrize("error", [RuntimeError("a fault")])
def test_atomic_action_of_which_nothing_can_be_decided_is_left_to_its_recovery(
    error, start, declare, monkeypatch, caplog
):
    """It was rolled back, so nothing is lost with it."""

    def act(task):
        Ledger.objects.create(task=task.pk)
        if task == first:
            raise ValueError("no")

    monkeypatch.setattr(AtomicAttempt, "decide", failing(1, AtomicAttempt.decide, error))
    declare(Task, "status", name="tasks", atomic=True)(act)
    first, second = Task.objects.create(), Task.objects.create()
    process = start("tasks", threads=1)
    wait_until(lambda: stored(second).state == State.finished)
    wait_until(lambda: process.ended() == {"lost": 1, "finish": 1})
    assert stored(first).state == State.working
    assert list(Ledger.objects.values_list("task", flat=True)) == [second.pk]
    assert f"tasks {first.pk}: its outcome can not be written; it is left to its recovery" in caplog.text


def test_system_exit_of_a_hook_stops_nothing(start, monkeypatch):
    monkeypatch.setattr(Attempt, "settle", failing(1, Attempt.settle, SystemExit()))
    for _ in range(2):
        make()
    process = start("testapp.do_errand", threads=1)
    wait_until(lambda: process.ended() == {"lost": 1, "finish": 1})


@pytest.mark.parametrize("part", ["claimer", "completer"])
def test_process_one_part_of_which_is_dead_ends(part, start, monkeypatch):
    process = start("testapp.do_errand")
    monkeypatch.setattr(type(getattr(process._process, f"_{part}")), "is_alive", False)
    wait_until(lambda: start.exits[:1] == [1])


@pytest.mark.parametrize("part", ["loop", "completer"])
def test_process_one_part_of_which_dies_while_it_runs_its_last_tasks_ends(part, start, monkeypatch):
    """Else it would be there for ever, and its leases be renewed."""
    make("doze 60")
    process = start("testapp.do_errand", max_seconds=0.1)
    wait_until(lambda: do_errand.tally()["working"] == 1)
    process.wait_for("full")
    assert start.exits == []
    monkeypatch.setattr(type(getattr(process._process, f"_{part}")), "is_alive", False)
    wait_until(lambda: start.exits[:1] == [1])
    process.stop(0.0)


# Leases


def test_async_action_that_has_saved_its_own_outcome_may_go_on(start, declare, monkeypatch):
    """Its lease has ended, but is not lost: to give the task back would run it again, and again."""
    monkeypatch.setattr(leases, "_SHARE", 30)

    async def act(task):
        task.status = Status.finished()
        await task.asave()
        await asyncio.sleep(1)
        runs.append(task.pk)

    runs = []
    declare(Task, "status", name="tasks", lease=3 * SECOND)(act)
    task = Task.objects.create()
    process = start("tasks")
    wait_until(lambda: process.ended() == {"assign": 1})
    assert (runs, stored(task).state) == ([task.pk], State.finished)


@pytest.mark.parametrize("name", ["sync", "async"])
def test_outcome_that_an_interrupted_action_has_saved_stands(name, start, declare):
    def act(task):
        task.status = Status.finished()
        task.save()
        doze(task)

    async def act_async(task):
        task.status = Status.finished()
        await task.asave()
        await asyncio.sleep(60)

    declare(Task, "status", name="tasks")(act if name == "sync" else act_async)
    task = Task.objects.create(data="60")
    process = start("tasks")
    wait_until(lambda: stored(task).state == State.finished)
    time.sleep(0.2)
    process.stop(0.1)
    assert process.ended() == {"assign": 1}
    assert stored(task).state == State.finished


def test_attempt_whose_task_was_canceled_and_claimed_again_is_told(start, declare):
    """Though the lease that it had is looked at no more."""

    async def act(task):
        runs.append(task.pk)
        if len(runs) == 1:
            await asyncio.sleep(60)

    runs = []
    made = declare(Task, "status", name="tasks")(act)
    task = Task.objects.create()
    process = start("tasks")
    wait_until(lambda: runs)
    made.cancel()
    made.retry()
    process.pipe.send(("due", ["tasks"]))
    wait_until(lambda: sum(process.ended().values()) == 2)
    assert process.ended() == {"release": 1, "finish": 1}
    assert stored(task).state == State.finished


def test_async_action_whose_lease_is_lost_is_canceled(start, monkeypatch):
    monkeypatch.setattr(leases, "_SHARE", 30)
    errand = make("sleep 60", status=NOT_TO_DO, review_status=Status.waiting(0))
    process = start("testapp.review")
    wait_until(lambda: stored(errand, "review_status").state == State.working)
    Errand.objects.update(review_status=Status.canceled(5))
    wait_until(lambda: process.ended() == {"release": 1})
    assert stored(errand, "review_status") == Status.canceled(5)


def test_async_action_whose_lease_is_lost_before_it_begins_is_not_run(start, monkeypatch):
    """The first one of a process, for which there is no event loop yet: nothing tells it of that again."""
    start_attempt = AsyncAttempt.start

    def start_too_late(attempt):
        if attempt.claim.row.pk == canceled.pk:
            Errand.objects.filter(pk=canceled.pk).update(review_status=Status.canceled(5))
            assert not attempt.renewal.renew()
        return start_attempt(attempt)

    monkeypatch.setattr(AsyncAttempt, "start", start_too_late)
    canceled = make(status=NOT_TO_DO, review_status=Status.waiting(0))
    other = make(status=NOT_TO_DO, review_status=Status.waiting(1))
    process = start("testapp.review")
    wait_until(lambda: process.ended() == {"release": 1, "finish": 1})
    assert stored(canceled, "review_status") == Status.canceled(5)
    assert [one.log for one in Errand.objects.order_by("pk")] == [[], ["reviewed"]]
    assert stored(other, "review_status").state == State.finished


@pytest.mark.parametrize("atomic", [False, True])
def test_action_whose_lease_is_lost_before_it_begins_is_not_run(atomic, start, declare, monkeypatch):
    """Canceled while it waits, for the outcome of an earlier task for example."""

    def run_too_late(self, running, *given):
        assert made.cancel() == 1
        assert not running.attempt.renewal.renew()
        run(self, running, *given)

    run = threads.Threads.run
    monkeypatch.setattr(threads.Threads, "run", run_too_late)
    made = declare(Task, "status", name="tasks", atomic=atomic)(unexpected)
    task = Task.objects.create()
    with heard("lease_lost") as events:
        process = start("tasks")
        wait_until(lambda: process.ended() == {"release": 1})
    assert [facts["outcome"] for _, facts in events] == ["release"]
    assert stored(task).state == State.canceled


def test_lease_that_is_lost_between_an_async_action_and_its_outcome_ends_nothing(start, monkeypatch):
    def settle_too_late(attempt, error):
        if attempt.claim.row.pk == canceled.pk:
            Errand.objects.filter(pk=canceled.pk).update(review_status=Status.canceled(5))
            assert not attempt.renewal.renew()
        return settle(attempt, error)

    settle = AsyncAttempt.settle
    monkeypatch.setattr(AsyncAttempt, "settle", settle_too_late)
    canceled = make(status=NOT_TO_DO, review_status=Status.waiting(0))
    with heard("lease_lost") as events:
        process = start("testapp.review")
        wait_until(process.ended)
    assert [facts["outcome"] for _, facts in events] == ["finish"]
    assert stored(canceled, "review_status") == Status.canceled(5)
    other = make(status=NOT_TO_DO, review_status=Status.waiting(1))
    process.pipe.send(("due", ["testapp.review"]))
    wait_until(lambda: stored(other, "review_status").state == State.finished)


@pytest.mark.db_feature("has_select_for_update")
def test_process_that_stops_while_it_writes_an_outcome_writes_it(start):
    errand = make("doze 0.2")
    process = start("testapp.do_errand")
    wait_until(lambda: stored(errand).state == State.working)
    with transaction.atomic():
        Errand.objects.select_for_update().get()
        time.sleep(0.5)
        process.pipe.send(("stop", 10.0))
        time.sleep(0.3)
        assert process.thread.is_alive()
    process.thread.join(30)
    assert (stored(errand).state, stored(errand).attempts) == (State.finished, 1)


def test_threads_close_their_connections_when_idle(start, monkeypatch):
    monkeypatch.setattr("modelqueue.worker.threads._IDLE", 0.05)
    closed = threading.Event()
    make()
    start("testapp.do_errand")
    kind = type(connections["default"])
    close = kind.close_if_unusable_or_obsolete

    def note(self):
        closed.set()
        close(self)

    monkeypatch.setattr(kind, "close_if_unusable_or_obsolete", note)
    assert closed.wait(10)


# Time limits


def hang(task):
    """As code that can be interrupted, by nothing that is caught as an Exception."""
    while True:
        try:
            time.sleep(0.01)
        except Exception as error:
            task.data = str(error)


async def hang_async(task):
    await asyncio.sleep(60)


def hang_in_transaction(task):
    Ledger.objects.create(task=task.pk)
    hang(task)


@pytest.mark.parametrize("action", [hang, hang_async, hang_in_transaction])
def test_action_that_takes_too_long_has_failed(action, start, declare):
    options = {"atomic": action is hang_in_transaction, "error_field": "error", "retry": 0}
    declare(Job, "status", name="jobs", timeout=0.3 * SECOND, **options)(action)
    job = Job.objects.create()
    with heard("task_finished") as events:
        process = start("jobs")
        wait_until(lambda: process.ended() == {"fail": 1})
    assert (stored(job).state, stored(job).attempts) == (State.canceled, 1)
    first, *others = row(job).error.splitlines()
    told = "modelqueue.exceptions.TimedOut: the action took longer than its timeout of 0:00:00.300000"
    assert first == told
    assert any(action.__name__ in line for line in others)
    assert [type(facts["error"]) for _, facts in events] == [TimedOut]
    assert not Ledger.objects.exists()
    assert [message for message, *_ in process.heard if message in ("overdue", "full")] == []


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_action_that_ends_in_time_is_not_ended_later(kind, start, declare, monkeypatch):
    """Whether its outcome has to wait, or its thread runs the next one."""

    async def doze_async(task):
        await asyncio.sleep(float(task.data))

    monkeypatch.setattr(limits, "_PATIENCE", 0.1)
    monkeypatch.setattr(completer, "_FIRST_PAUSE", 4.0)
    cls = Attempt if kind == "sync" else AsyncAttempt
    monkeypatch.setattr(cls, "settle", failing(1, cls.settle))
    declare(Task, "status", name="tasks", timeout=4 * SECOND)(doze if kind == "sync" else doze_async)
    Task.objects.bulk_create([Task(data="2.2"), Task(data="2.2")])
    process = start("tasks", threads=1)
    wait_until(lambda: process.ended() == {"finish": 2})
    assert [message for message, *_ in process.heard if message == "overdue"] == []


def test_thread_whose_action_was_interrupted_gets_a_new_connection(start, declare):
    """Nobody knows what the old one was in the midst of."""

    def act(task):
        Ledger.objects.exists()
        used.append(connections["default"].connection)
        if len(used) == 1:
            hang(task)

    used = []
    declare(Task, "status", name="tasks", timeout=0.2 * SECOND)(act)
    Task.objects.bulk_create([Task(), Task()])
    process = start("tasks", threads=1)
    wait_until(lambda: process.ended() == {"fail": 1, "finish": 2})
    assert used[1] is not used[0]


@pytest.mark.parametrize(
    "kind",
    [
        "interrupted",
        "failed after that",
        pytest.param("failed", marks=pytest.mark.vendor("sqlite")),
        pytest.param("failed in a transaction", marks=pytest.mark.vendor("sqlite")),
    ],
)
def test_action_that_has_failed_in_the_midst_of_a_query_locks_nothing(kind, start, declare):
    """Its error is kept until its outcome is written, for which it would wait on SQLite."""

    def read_on(task):
        rows = Task.objects.iterator(chunk_size=1)
        next(rows)
        try:
            if kind in ("interrupted", "failed after that"):
                hang(task)
            raise ValueError(kind)
        except TimedOut as error:
            if kind == "interrupted":
                raise
            raise ValueError(kind) from error

    options = {"timeout": 0.2 * SECOND, "retry": 0, "atomic": kind == "failed in a transaction"}
    declare(Task, "status", name="tasks", **options)(read_on)
    others = Task.objects.bulk_create([Task(status=Status.created(1)) for _ in range(50)])
    Task.objects.create()
    process = start("tasks")
    wait_until(lambda: process.ended() == {"fail": 1}, 20)
    assert Task.objects.filter(pk=others[0].pk).update(data="written") == 1  # its thread has nothing to run


def test_time_limit_counts_from_the_begin_of_the_action(start, declare, monkeypatch):
    """Not from the claim."""
    run, begun, deadlines = threads.Threads.run, [], []

    def run_late(self, running, *given):
        time.sleep(0.5)
        begun.append(modelqueue.now())
        run(self, running, *given)

    def act(task):
        deadlines.append(modelqueue.current().deadline)

    monkeypatch.setattr(threads.Threads, "run", run_late)
    declare(Task, "status", name="tasks", timeout=60 * SECOND)(act)
    Task.objects.create()
    process = start("tasks")
    wait_until(lambda: process.ended() == {"finish": 1})
    assert deadlines[0] - begun[0] > 59.9 * SECOND


def test_timeout_may_be_the_last_attempt(start, declare):
    declare(Task, "status", name="tasks", timeout=0.2 * SECOND, cancel_on=TimedOut)(hang)
    task = Task.objects.create()
    process = start("tasks")
    wait_until(lambda: process.ended() == {"fail": 1})
    assert (stored(task).state, stored(task).attempts) == (State.canceled, 1)


@pytest.mark.parametrize("ending", ["finish", "fail"])
@pytest.mark.parametrize("name", ["stop", "time limit"])
def test_action_that_ends_just_when_it_is_to_be_interrupted_has_ended_normally(
    name, ending, start, declare, monkeypatch
):
    def interrupt_late(ident, error):
        may_end.set()
        time.sleep(0.2)
        interrupt_thread(ident, error)

    def act(task):
        has_begun.set()
        may_end.wait(60)
        if ending == "fail":
            raise ValueError("its own")

    has_begun, may_end = threading.Event(), threading.Event()
    monkeypatch.setattr(threads, "interrupt_thread", interrupt_late)
    timeout = 0.2 * SECOND if name == "time limit" else 60 * SECOND
    declare(Job, "status", name="jobs", retry=0, error_field="error", timeout=timeout)(act)
    job = Job.objects.create()
    process = start("jobs")
    assert has_begun.wait(30)
    if name == "stop":
        process.stop(0.1)
    wait_until(lambda: process.ended() == {ending: 1})
    first = row(job).error.partition("\n")[0]
    assert first == ("builtins.ValueError: its own" if ending == "fail" else "")


def test_action_that_is_interrupted_before_it_is_called_is_not_taken_for_ended(start, declare, monkeypatch):
    def begin_late(self):
        begun.append(self)
        for _ in range(100):
            time.sleep(0.01)

    begun = []
    monkeypatch.setattr(running.Running, "action_begins", begin_late)
    declare(Task, "status", name="tasks")(unexpected)
    task = Task.objects.create(status=Status.waiting(5))
    process = start("tasks")
    wait_until(lambda: begun)
    process.stop(0.0)
    assert process.ended() == {"release": 1}
    assert stored(task) == Status.waiting(5)


def test_thread_that_is_interrupted_just_before_it_calls_an_action_has_not_called_it():
    """What is raised there comes from no other function, as after the end of the action."""
    begins = asyncio.Future(loop=SimpleNamespace(get_debug=lambda: False))
    begins.set_exception(Interrupted())
    lane = SimpleNamespace(queue=SimpleNamespace(action=unexpected))
    one = SimpleNamespace(lane=lane, action_begins=begins.result, action_has_ended=list)
    with pytest.raises(Interrupted):
        threads._Call(one).run(None)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_action_that_ends_well_after_its_interruption_has_ended_well(kind, start, declare):
    def act(task):
        with suppress(TimedOut):
            hang(task)

    async def act_async(task):
        with suppress(asyncio.CancelledError):
            await hang_async(task)

    # Longer than it takes to come to where it is caught.
    declare(Task, "status", name="tasks", timeout=SECOND)(act if kind == "sync" else act_async)
    task = Task.objects.create()
    process = start("tasks")
    wait_until(lambda: process.ended() == {"finish": 1})
    assert stored(task).state == State.finished


class Deaf:
    """Actions that do not end when they are interrupted, until they may."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(limits, "_PATIENCE", 0.3)
        # What pends for a thread that is blocked makes the tracer of coverage spin, with Python 3.11.
        monkeypatch.setattr(threads, "interrupt_thread", lambda *arguments: None)
        self.may_end = threading.Event()

    def act(self, task):
        self.may_end.wait(60)

    async def act_async(self, task):
        while not self.may_end.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    async def block(self, task):
        self.may_end.wait(60)


@pytest.fixture
def deaf(monkeypatch):
    actions = Deaf(monkeypatch)
    yield actions
    actions.may_end.set()


@pytest.mark.parametrize("name", ["act", "act_async", "block"])
def test_process_whose_action_can_not_be_ended_is_to_be_replaced(
    name, start, declare, deaf, monkeypatch, caplog
):
    """Its supervisor learns which one it is, and its lease is renewed until the end."""
    monkeypatch.setattr(process_module, "_LAST_MOMENTS", 0.2)
    monkeypatch.setattr(leases, "_SHARE", 30)
    declare(Task, "status", name="deaf", timeout=0.2 * SECOND, lease=3 * SECOND)(getattr(deaf, name))
    declare(Job, "status", name="jobs")(doze_for_a_second)
    task, neighbor = Task.objects.create(), Job.objects.create()
    process = start("deaf", "jobs")
    (numbers,) = process.wait_for("overdue")
    found = {claimed.queue: claimed.number for claimed, _ in process.held()}
    assert numbers == [found["deaf"]]
    assert f"deaf {task.pk}: its action took longer than its timeout of 0:00:00.200000" in caplog.text
    later, before = Job.objects.create(), stored(task)
    process.pipe.send(("due", ["jobs"]))
    wait_until(lambda: stored(neighbor).state == State.finished)
    wait_until(lambda: stored(task) > before)
    assert stored(later).state == State.waiting
    process.stop(0.1)
    assert [claimed.number for claimed, _ in process.held()] == numbers
    assert start.exits == [0]
    assert [message for message, *_ in process.heard].count("overdue") == 1


def doze_for_a_second(job):
    time.sleep(1)


def test_process_that_is_being_replaced_tells_of_an_action_that_can_not_be_ended(
    start, declare, deaf, monkeypatch
):
    """Else it would be there for ever."""
    monkeypatch.setattr(process_module, "_LAST_MOMENTS", 0.2)
    declare(Task, "status", name="deaf", timeout=0.5 * SECOND)(deaf.act)
    Task.objects.create()
    process = start("deaf", max_seconds=0.1)
    process.wait_for("full")
    process.wait_for("overdue")
    process.stop(0.1)
    assert start.exits == [0]


def test_action_that_ends_by_itself_after_all_has_ended_so(start, declare, deaf):
    """And so does its process, as nothing is left to be killed."""
    declare(Task, "status", name="deaf", timeout=0.2 * SECOND)(deaf.act)
    task = Task.objects.create()
    process = start("deaf")
    process.wait_for("overdue")
    deaf.may_end.set()
    process.thread.join(30)
    assert not process.thread.is_alive()
    assert process.ended() == {"finish": 1}
    assert (stored(task).state, process.held(), start.exits) == (State.finished, [], [])


@pytest.mark.parametrize("is_child", [False, True])
def test_action_that_another_one_keeps_from_ending_is_not_blamed(is_child, start, declare, deaf):
    """That one does not let the event loop go on, itself or in a task that it has made; it has the time."""

    async def block(task):
        await (asyncio.create_task(deaf.block(task)) if is_child else deaf.block(task))

    declare(Task, "status", name="tasks", timeout=0.5 * SECOND)(hang_async)
    declare(Job, "status", name="blocking")(block)
    task = Task.objects.create()
    process = start("tasks", "blocking")
    wait_until(lambda: stored(task).state == State.working)
    Job.objects.create()
    process.pipe.send(("due", ["blocking"]))
    time.sleep(1.5)
    process.pipe.send(("due", []))
    process.wait_for("answer")
    assert [message for message, *_ in process.heard if message == "overdue"] == []
    deaf.may_end.set()
    wait_until(lambda: process.ended() == {"fail": 1, "finish": 1})


def test_time_limit_holds_for_the_last_tasks_of_a_process_too(start, declare):
    declare(Task, "status", name="tasks", timeout=0.8 * SECOND)(hang)
    Task.objects.create()
    process = start("tasks", max_seconds=0.1)
    process.wait_for("full")
    process.thread.join(30)
    assert process.ended() == {"fail": 1}


# Cancel while running


def test_action_that_is_canceled_learns_of_it(start, declare, monkeypatch):
    def act(task):
        has_begun.set()
        wait_until(lambda: modelqueue.current().cancel_requested)
        told.append(task.pk)

    monkeypatch.setattr(leases, "_SHARE", 30)
    told, has_begun = [], threading.Event()
    made = declare(Task, "status", name="tasks", lease=3 * SECOND)(act)
    task = Task.objects.create()
    process = start("tasks")
    assert has_begun.wait(60)  # before that it is not begun any more
    assert made.cancel() == 1
    canceled = stored(task)
    wait_until(lambda: process.ended() == {"finish": 1})
    assert (told, stored(task)) == ([task.pk], canceled)


# Claimed ahead


@pytest.fixture
def ahead(monkeypatch):
    """Queues that claim 20 tasks more than they have threads for."""
    monkeypatch.setattr(slots.Lane, "note_claim", lambda self, seconds: None)
    make_lane = slots.Lane.__init__

    def make(self, *arguments):
        make_lane(self, *arguments)
        self.ahead = 20

    monkeypatch.setattr(slots.Lane, "__init__", make)


def test_short_tasks_that_were_claimed_together_are_run_and_their_outcomes_written_together(
    start, ahead, declare, monkeypatch
):
    sizes, write = [], Engine.set_statuses

    def see(self, source, changes):
        sizes.append(len(changes))
        return write(self, source, changes)

    monkeypatch.setattr(Engine, "set_statuses", see)
    declare(Task, "status", name="tasks")(write_down)
    tasks = Task.objects.bulk_create([Task() for _ in range(200)])
    with heard("task_claimed", "task_finished", "lease_lost") as events:
        process = start("tasks", threads=1)
        wait_until(lambda: process.pipe.send(("due", ["tasks"])) or process.ended() == {"finish": 200})
    assert Counter(name for name, _ in events) == {"task_claimed": 200, "task_finished": 200}
    assert set(Task.objects.values_list("status__state", "status__attempts")) == {(State.finished, 1)}
    assert sorted(Ledger.objects.values_list("task", flat=True)) == [task.pk for task in tasks]
    assert max(sizes) > 1


def test_what_was_claimed_ahead_and_waits_for_long_is_given_back(start, ahead, declare, monkeypatch):
    monkeypatch.setattr(threads, "_LONGEST_WAIT", 0.2)
    go_on = threading.Event()
    declare(Task, "status", name="tasks")(lambda task: go_on.wait(30))
    Task.objects.bulk_create([Task(status=Status.waiting(number)) for number in range(10)])
    before = list(Task.objects.order_by("pk").values_list("status", flat=True))
    process = start("tasks", threads=2)
    wait_until(lambda: process.ended() == {"release": 8})
    after = list(Task.objects.order_by("pk").values_list("status", flat=True))
    assert [one.state for one in after[:2]] == [State.working] * 2
    assert after[2:] == before[2:]
    go_on.set()
    wait_until(lambda: process.pipe.send(("due", ["tasks"])) or process.ended().get("finish") == 10)


def test_task_that_is_never_retried_is_not_kept_waiting_claimed_ahead(start, ahead, declare):
    """The death of a machine charges what it has claimed, and would cancel it."""
    go_on = threading.Event()
    declare(Delivery, "status", name="tasks", retry="retries")(lambda task: go_on.wait(30))
    before = [Status.waiting(number) for number in range(10)]
    Delivery.objects.bulk_create(
        [Delivery(retries=number % 2, status=status) for number, status in enumerate(before)]
    )
    process = start("tasks", threads=2)
    wait_until(lambda: process.ended() == {"release": 4})
    after = list(Delivery.objects.order_by("pk").values_list("status", flat=True))
    assert after[2::2] == before[2::2]  # neither begun nor charged
    assert {one.state for one in [after[0], *after[1::2]]} == {State.working}
    go_on.set()
    wait_until(lambda: process.pipe.send(("due", ["tasks"])) or process.ended().get("finish") == 10)


#: For a completer to which tasks are put that have no slots.
NO_SLOTS = SimpleNamespace(leave=lambda running: None)


def test_what_is_called_after_the_others_is_called_before_later_outcomes_are_written(monkeypatch):
    done = []
    one = completer.Completer(NO_SLOTS)
    monkeypatch.setattr(one, "_settle_together", lambda ended: done.append([each.running for each in ended]))
    for number in (1, 2):
        one.put(number, None)
    one.call_after_the_others(lambda: done.append("called"))
    for number in (3, 4):
        one.put(number, None)
    one.start()
    one.stop(10.0)
    assert done == [[1, 2], "called", [3, 4]]


def test_no_more_outcomes_are_written_together_than_one_statement_takes(monkeypatch):
    monkeypatch.setattr(completer, "_MOST_TOGETHER", 3)
    done = []
    one = completer.Completer(NO_SLOTS)
    monkeypatch.setattr(one, "_settle_together", lambda ended: done.append(len(ended)))
    for number in range(7):
        one.put(number, None)
    one.start()
    one.stop(10.0)
    assert done == [3, 3, 1]


def test_slot_is_left_before_anybody_can_write_the_outcome(monkeypatch):
    """Who writes it takes back what it has left, and would not find it yet."""
    done = []
    one = completer.Completer(SimpleNamespace(leave=lambda running: done.append("left")))
    monkeypatch.setattr(one, "_ended", SimpleNamespace(put=lambda ended: done.append("put")))
    one.put(None, None)
    assert done == ["left", "put"]


def test_outcome_waits_for_others_while_more_tasks_wait_for_a_thread(monkeypatch):
    def rest(seconds):
        slept.append(seconds)
        for number in (2, 3):
            one.put(number, None)
        waiting.clear()

    done, slept, waiting = [], [], [1, 2, 3]
    one = completer.Completer(NO_SLOTS, lambda: len(waiting))
    monkeypatch.setattr(one, "_settle_together", lambda ended: done.append([each.running for each in ended]))
    monkeypatch.setattr(completer, "time", SimpleNamespace(monotonic=time.monotonic, sleep=rest))
    one.put(1, None)
    one.start()
    one.stop(10.0)
    assert done == [[1, 2, 3]]
    assert slept == [completer._LINGER]


def test_outcomes_of_a_queue_with_an_error_field_are_written_together_where_it_stays_as_it_is(
    start, ahead, declare, monkeypatch
):
    sizes, write = [], Engine.set_statuses

    def see(self, source, changes):
        sizes.append(len(changes))
        return write(self, source, changes)

    monkeypatch.setattr(Engine, "set_statuses", see)
    declare(Job, "status", name="jobs", error_field="error")(succeed)
    Job.objects.bulk_create([Job() for _ in range(50)])
    Job.objects.bulk_create([Job(error="of the last attempt") for _ in range(10)])
    process = start("jobs", threads=2)
    wait_until(lambda: process.pipe.send(("due", ["jobs"])) or process.ended() == {"finish": 60})
    assert set(Job.objects.values_list("error", flat=True)) == {""}
    assert 0 < sum(sizes) <= 50


@pytest.mark.parametrize("error", [OperationalError("no"), RuntimeError("a fault of ours")], ids=repr)
def test_outcomes_that_can_not_be_written_together_are_written_one_by_one(
    error, start, ahead, declare, monkeypatch
):
    def fail(engine, source, changes):
        tried.append(len(changes))
        raise error

    tried = []
    monkeypatch.setattr(Engine, "set_statuses", fail)
    declare(Task, "status", name="tasks")(succeed)
    Task.objects.bulk_create([Task() for _ in range(100)])
    process = start("tasks", threads=1)
    wait_until(lambda: process.pipe.send(("due", ["tasks"])) or process.ended() == {"finish": 100})
    assert tried


def test_task_whose_row_does_not_load_has_failed_together_with_others(start, ahead, declare, monkeypatch):
    written, write = [], Engine.set_statuses
    monkeypatch.setattr(
        Engine, "set_statuses", lambda *arguments: written.append(write(*arguments)) or written[-1]
    )
    monkeypatch.setattr(Task, "from_db", classmethod(fail_to_load))
    declare(Task, "status", name="tasks", retry=1, delay=60 * SECOND)(unexpected)
    Task.objects.bulk_create([Task() for _ in range(20)])
    process = start("tasks", threads=20)
    wait_until(lambda: process.ended() == {"fail": 20})
    assert set(Task.objects.values_list("status__state", "status__attempts")) == {(State.waiting, 1)}
    assert any(written)


def fail_to_load(*arguments):
    raise ValueError("not to be loaded")


def test_signal_receiver_that_ends_the_thread_leaves_the_outcome_and_the_completer(
    start, ahead, declare, monkeypatch
):
    """A receiver of a signal, which may raise what is no Exception."""
    conclude, left = Attempt.conclude_prepared, [SystemExit("no")]

    def leave(attempt, *arguments):
        conclude(attempt, *arguments)
        if left:
            raise left.pop()

    monkeypatch.setattr(Attempt, "conclude_prepared", leave)
    declare(Task, "status", name="tasks")(succeed)
    Task.objects.bulk_create([Task() for _ in range(100)])
    process = start("tasks", threads=1)
    wait_until(lambda: process.pipe.send(("due", ["tasks"])) or sum(process.ended().values()) == 100)
    assert process.ended() == {"finish": 99, "lost": 1}
    assert set(Task.objects.values_list("status__state", flat=True)) == {State.finished}


def test_process_that_ends_its_last_tasks_gives_back_what_waits_for_a_thread(
    start, ahead, declare, monkeypatch
):
    monkeypatch.setattr(threads, "_LONGEST_WAIT", 0.3)
    go_on = threading.Event()
    declare(Task, "status", name="tasks")(lambda task: go_on.wait(30))
    Task.objects.bulk_create([Task() for _ in range(10)])
    process = start("tasks", threads=2, max_tasks=10)
    process.wait_for("full")
    wait_until(lambda: process.ended() == {"release": 8})
    go_on.set()


@pytest.fixture
def ended(declare):
    """A completer, and what claims tasks and returns them as if their actions had ended."""

    def ended():
        claims = verbs.claim(queue.source(), 3)
        found = [Running(lane, queue.attempt(claim, queue.source()), next(numbers)) for claim in claims]
        return [completer._Ended(one, None) for one in found]

    queue, numbers = declare(Task, "status", name="tasks")(succeed), itertools.count(1)
    lane = slots.Lane(queue, 1)
    one = completer.Completer(SimpleNamespace(end=lambda ended: None))
    return one, ended


@pytest.mark.parametrize("is_failed", [True, False])
@pytest.mark.parametrize("first", [0, 1])
def test_of_two_attempts_on_one_row_that_end_together_the_older_one_has_lost_it(ended, first, is_failed):
    task = Task.objects.create(status=Status.waiting(0))
    one, make_ended = ended
    both = make_ended()
    wait_until(lambda: Status.working(now()) > stored(task))
    Task.objects.update(status=Status.waiting(0))
    both += make_ended()
    both[0].error = ValueError("no") if is_failed else None
    with heard("task_finished", "lease_lost") as events:
        one._settle_together([both[first], both[1 - first]])
    assert Counter(name for name, _ in events) == {"task_finished": 1, "lease_lost": 1}
    (lost,) = [event for name, event in events if name == "lease_lost"]
    assert lost["lease"] == both[0].running.attempt.lease
    assert stored(task).state == State.finished


@pytest.mark.parametrize(("is_prepared", "others"), [(True, 2), (False, 3)])
def test_leases_are_renewed_while_outcomes_wait_for_others(is_prepared, others, start, ended, monkeypatch):
    def settle(attempt, error):
        held.append(len(attempt.renewal._group.held))
        return SimpleNamespace(ending="finish", error=None)

    one, make_ended = ended
    Task.objects.bulk_create([Task(), Task(), Task()])
    all_ended, held = make_ended(), []
    for attempt in [each.running.attempt for each in all_ended]:
        attempt.renewal = leases.keeper_for("default").hold(attempt, 30.0)
        attempt.may_be_of_status_alone = lambda error, engine: is_prepared
    monkeypatch.setattr(Attempt, "settle", settle)
    monkeypatch.setattr(Engine, "set_statuses", lambda *arguments: set())
    one._settle_together(all_ended)
    assert held == [others] * 3


def test_outcomes_that_are_written_together_use_the_connection_of_who_writes_them(ended):
    one, make_ended = ended
    Task.objects.bulk_create([Task(), Task(), Task()])
    all_ended = make_ended()
    for each in all_ended:
        each.running.attempt.engine = None  # that of the thread of its action
    one._settle_together(all_ended)
    assert {each.running.attempt.engine.connection for each in all_ended} == {connections["default"]}
