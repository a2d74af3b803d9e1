"""The supervisor with processes that the test plays: what it does when they die, hang or say something."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from django.db import OperationalError, connections, transaction

from modelqueue import Status, now, verbs
from modelqueue.engines import Candidate
from modelqueue.worker import supervisor as module
from modelqueue.worker.options import Options
from modelqueue.worker.running import Left
from modelqueue.worker.supervisor import Child, Supervisor
from modelqueue.worker.system import is_alive
from tests.actions import stored
from tests.processes import wait_until
from tests.testapp.models import Errand
from tests.testapp.queues import do_errand, review

pytestmark = pytest.mark.django_db(transaction=True)


class Played(Child):
    """A process that does what the test says."""

    started = []

    def __init__(self, options):
        self.pipe, self.theirs = multiprocessing.Pipe()
        self._lives, self._death = multiprocessing.Pipe(duplex=False)
        self.process = SimpleNamespace(
            exitcode=None, sentinel=self._lives, join=lambda timeout=None: None, kill=lambda: self.die(-9)
        )
        self.pid = 10**9 + len(self.started)  # of no process
        self.began = time.monotonic()
        self.is_ready = self.is_stopping = self.has_run_tasks = self.was_short = False
        self.answered_at = self.began
        self.reason = self.kill_at = self._grace = None
        self.left = []
        self.running = self._unanswered = self._awaited = 0
        self.answers = True
        self.heard = []
        self.started.append(self)

    def say(self, *message):
        self.theirs.send(message)

    def listen(self):
        """Hear what the supervisor has sent, and answer, as a sound process does."""
        while self.process.exitcode is None and self.theirs.poll():
            self.heard.append(self.theirs.recv())
            if self.answers:
                self.say("answer", 0)

    def listen_to_the_end(self):
        with suppress(EOFError):
            while self.theirs.poll():
                self.heard.append(self.theirs.recv())

    def die(self, code):
        if self.process.exitcode is None:
            self.process.exitcode = code
            self._death.close()


@pytest.fixture
def play(monkeypatch):
    """Start a supervisor in a thread; return a namespace with it, and with what it says and its processes."""
    monkeypatch.setattr(Played, "started", [])
    monkeypatch.setattr(module, "Child", Played)
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "_EXTRA", 0.2)
    started = []

    def play(told=None, **options):
        said, counts = [], []
        settings = Options(names=("testapp.do_errand", "testapp.review"), **{"grace": 0.2, **options})
        one = Supervisor(settings, [do_errand, review], told or said.append, counts.append)
        codes = []

        def run():
            codes.append(one.run(handle_signals=False))

        thread = threading.Thread(target=run)
        thread.start()
        game = SimpleNamespace(
            supervisor=one, said=said, counts=counts, codes=codes, thread=thread, children=Played.started
        )
        started.append(game)
        wait_until(lambda: len(game.children) == settings.processes or not thread.is_alive())
        return game

    yield play
    for game in started:
        game.supervisor.stop()
        wait_until(lambda game=game: end_all(game) or not game.thread.is_alive())


def end_all(game):
    for child in game.children:
        child.die(0)


def test_process_that_died_is_replaced_and_that_is_told(play):
    game = play()
    game.children[0].die(-11)
    wait_until(lambda: len(game.children) == 2)
    assert game.said[0].startswith("The next process starts in 0.0 s. What ")
    assert "is taken back when its leases have run out, in " in game.said[0]


def test_process_that_dies_again_and_again_is_replaced_ever_more_slowly(play, monkeypatch, caplog):
    game = play()
    for count in range(2, 5):
        game.children[-1].die(1)
        wait_until(lambda count=count: len(game.children) == count)
    assert [text[:35] for text in game.said] == ["The next process starts in 0.0 s. W"] * 3
    monkeypatch.setattr(module, "_SOUND", 0.0)
    game.children[-1].die(3)
    wait_until(lambda: game.supervisor._deaths == 1)
    assert "exited with code 3" in caplog.text


def test_process_that_is_full_is_replaced_at_once(play):
    """What it still runs may take long."""
    game = play()
    full = game.children[0]
    full.say("ended", {"finish": 5})
    full.say("full", "has run 5 tasks")
    wait_until(lambda: len(game.children) == 2)
    assert full in game.supervisor._children
    full.die(0)
    wait_until(lambda: game.said == [f"Process {full.pid} has run 5 tasks and is replaced."])
    assert game.supervisor._deaths == 0


def test_full_processes_that_do_not_end_are_not_replaced_without_end(play):
    game = play()
    for count in (1, 2):
        game.children[-1].say("full", "has run for 5 s")
        wait_until(lambda count=count: game.children[count - 1].reason)
    time.sleep(1)
    assert len(game.children) == 2
    game.children[0].die(0)
    wait_until(lambda: len(game.children) == 3)


def test_standstill_as_all_processes_run_their_last_tasks_is_told_once(play, monkeypatch, caplog):
    monkeypatch.setattr(module, "_LONGEST_STANDSTILL", 0.1)
    monkeypatch.setattr(module, "_TICK", 0.05)
    game = play()
    for count in (1, 2):
        wait_until(lambda count=count: len(game.children) == count)
        game.children[-1].say("full", "has run 100 tasks")
    told = "Nothing is claimed: 2 processes are to be replaced and run their last tasks"
    wait_until(lambda: told in caplog.text)
    game.children[0].die(0)
    wait_until(lambda: len(game.children) == 3)
    game.children[2].say("full", "has run 100 tasks")
    wait_until(lambda: game.children[2].reason)
    wait_for_looks(game, 5)
    assert caplog.text.count(told) == 1


def test_death_for_want_of_memory_is_told(play, monkeypatch, caplog):
    game = play()
    monkeypatch.setattr(game.supervisor._out_of_memory, "has_killed", lambda: True)
    game.children[0].die(-9)
    wait_until(lambda: "was killed by SIGKILL, as memory ran out" in caplog.text)


def test_full_process_that_dies_is_no_ordinary_replacement(play, caplog):
    game = play()
    full = game.children[0]
    full.say("ended", {"finish": 5})
    full.say("full", "has run 5 tasks")
    wait_until(lambda: full.reason)
    full.die(1)
    wait_until(lambda: game.said)
    assert f"What {full.pid} was running is taken back when its leases have run out" in game.said[0]
    assert f"Process {full.pid} of the worker exited with code 1." in caplog.text


def test_process_that_is_full_before_it_has_run_a_task_is_replaced_after_a_pause(play, monkeypatch):
    """Its limit is too low, and its start takes all of the processor."""
    monkeypatch.setattr(module, "_FIRST_PAUSE", 60.0)
    game = play()
    game.children[0].say("full", "uses 70 MiB of memory")
    wait_until(lambda: len(game.children) == 2)
    for child in game.children:
        child.say("full", "uses 70 MiB of memory")
        wait_until(lambda child=child: child.reason)
        child.die(0)
    wait_until(lambda: not game.supervisor._children)
    time.sleep(1)
    assert len(game.children) == 2
    assert game.said[-1] == "It had run no task: the limit is too low. Raise it."


def test_idle_process_whose_time_is_over_is_replaced_without_a_complaint(play, monkeypatch):
    monkeypatch.setattr(module, "_SHORT", 0.0)
    game = play()
    idle = game.children[0]
    idle.say("ready")
    idle.say("full", "has run for 600 s")
    wait_until(lambda: idle.reason)
    idle.die(0)
    wait_until(lambda: game.said == [f"Process {idle.pid} has run for 600 s and is replaced."])
    assert game.supervisor._deaths == 0


def test_full_process_has_only_the_grace_time_when_the_worker_is_stopped(play):
    game = play()
    game.children[0].say("full", "has run 5 tasks")
    wait_until(lambda: game.children[0].reason)
    game.supervisor.stop()
    wait_until(lambda: not game.thread.is_alive())
    assert game.children[0].process.exitcode == -9
    assert game.codes == [0]


def test_message_that_the_supervisor_does_not_know_ends_nothing(play):
    """Of a process with newer code than its own."""
    game = play()
    game.children[0].say("new words", 1, 2)
    game.children[0].say("ended", {"finish": 3})
    wait_until(lambda: game.counts == [{"finish": 3}])


def test_outcomes_are_passed_on(play):
    game = play()
    game.children[0].say("ended", {"finish": 3})
    wait_until(lambda: game.counts == [{"finish": 3}])


def test_due_tasks_are_told_to_one_process_and_then_to_all(play):
    game = play(processes=2)
    for child in game.children:
        child.say("ready")
    wait_until(lambda: all(child.is_ready for child in game.children))
    Errand.objects.create()
    named = ["testapp.do_errand"]

    def told():
        for child in game.children:
            child.listen()
        return [("due", named) in child.heard for child in game.children]

    assert wait_until(lambda: any(told()) and told()) in ([True, False], [False, True], [True, True])
    wait_until(lambda: all(told()))


def test_abandoned_tasks_are_told_to_one_process(play):
    game = play(processes=2)
    for child in game.children:
        child.say("ready")
    Errand.objects.create(status=Status.working(5))

    def told():
        for child in game.children:
            child.listen()
        return [message for child in game.children for message in child.heard if message[0] == "recover"]

    assert wait_until(told)[0] == ("recover", ["testapp.do_errand"])


def test_process_that_does_not_listen_is_told_no_more(play):
    game = play()
    child = game.children[0]
    child.answers = False
    child.say("ready")
    Errand.objects.create()
    wait_until(lambda: child._unanswered >= 8)
    time.sleep(0.3)
    child.listen()
    assert len(child.heard) == 8
    game.supervisor.stop()
    wait_until(lambda: child.listen() or ("stop", 0.2) in child.heard)


def test_process_that_hears_nothing_any_more_is_replaced_once_it_is_dead(play, caplog):
    caplog.set_level("DEBUG", "modelqueue")
    game = play()
    child = game.children[0]
    child.say("ready")
    wait_until(lambda: child.is_ready)
    child.theirs.close()
    wait_until(lambda: f"Process {child.pid} does not listen." in caplog.text)
    assert game.supervisor._children == [child]
    child.die(1)
    wait_until(lambda: len(game.children) == 2)


def test_process_that_outlives_its_kill_is_killed_again(play, monkeypatch):
    """One that waits for a disk ends only after that; it is told once to stop."""
    game = play()
    child, kills = game.children[0], []

    def kill():
        kills.append(time.monotonic())
        if len(kills) == 2:
            child.die(-9)

    child.process.kill = kill
    game.supervisor.stop()
    wait_until(lambda: child.listen() or game.codes == [0])
    assert len(kills) == 2
    assert kills[1] - kills[0] >= 0.4  # the grace time, and a little more
    assert child.heard.count(("stop", 0.2)) == 1


def test_process_that_does_not_stop_is_killed(play):
    game = play()
    game.supervisor.stop()
    wait_until(lambda: not game.thread.is_alive())
    assert game.said[0] == ("Stopping: running tasks may end within 0.2 s; a second signal ends them now.")
    assert "does not stop and is killed" in game.said[1]


def test_two_stops_at_once_leave_no_grace(play, monkeypatch):
    monkeypatch.setattr(module, "_TICK", 0.05)
    game = play(grace=60.0)
    game.supervisor._stops = 2  # before it looks
    wait_until(lambda: not game.thread.is_alive())
    assert game.said[0] == "Stopping now."


def test_second_stop_leaves_no_grace(play):
    game = play(grace=60.0)
    game.supervisor.stop()
    wait_until(lambda: game.said)
    game.supervisor.stop()
    wait_until(lambda: not game.thread.is_alive())
    assert "Stopping now." in game.said
    game.children[0].listen_to_the_end()
    assert game.children[0].heard == [("stop", 60.0), ("stop", 0.0)]


def left_by(child, errand):
    row = Candidate(errand.pk, errand.pk, Status.waiting(5))
    return Left("testapp.do_errand", row, {errand.status})


def test_what_a_dead_process_has_left_is_given_back(play):
    game = play()
    errand = Errand.objects.create(status=Status.working())
    game.children[0].say("left", [left_by(game.children[0], errand)])
    wait_until(lambda: game.children[0].left)
    assert stored(errand) == errand.status  # it lives
    game.children[0].die(0)
    wait_until(lambda: stored(errand) == Status.waiting(5))


def test_what_somebody_has_taken_from_a_dead_process_is_not_given_back(play, caplog):
    game = play()
    taken, ours = (Errand.objects.create(status=Status.working()) for _ in range(2))
    child = game.children[0]
    child.say("left", [left_by(child, taken), left_by(child, ours)])
    wait_until(lambda: child.left)
    Errand.objects.filter(pk=taken.pk).update(status=Status.canceled(7))
    child.die(0)
    wait_until(lambda: stored(ours) == Status.waiting(5))
    assert stored(taken) == Status.canceled(7)
    wait_until(lambda: f"testapp.do_errand {ours.pk} did not end in time: given back" in caplog.text)
    assert f"testapp.do_errand {taken.pk}" not in caplog.text


@pytest.fixture
def lock():
    """Lock the row of a task by another connection; return what ends that."""
    may_end, threads = threading.Event(), []

    def lock(task):
        is_locked = threading.Event()

        def hold():
            with transaction.atomic():
                Errand.objects.select_for_update().get(pk=task.pk)
                is_locked.set()
                may_end.wait(60)
            connections.close_all()

        threads.append(threading.Thread(target=hold))
        threads[-1].start()
        assert is_locked.wait(30)
        return may_end.set

    yield lock
    may_end.set()
    for thread in threads:
        thread.join(30)


def leave(game, *errands):
    """Have a process end that has left these."""
    child = game.children[0]
    child.say("left", [left_by(child, errand) for errand in errands])
    wait_until(lambda: child.left)
    child.die(0)


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_row_that_is_locked_keeps_no_other_from_being_given_back(play, lock):
    game = play()
    locked, free = (Errand.objects.create(status=Status.working()) for _ in range(2))
    unlock = lock(locked)
    leave(game, locked, free)
    wait_until(lambda: stored(free) == Status.waiting(5))
    assert stored(locked) == locked.status
    unlock()
    wait_until(lambda: stored(locked) == Status.waiting(5))


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_row_that_is_locked_for_long_is_left_to_its_recovery(play, lock, monkeypatch, caplog):
    monkeypatch.setattr(module, "_LONGEST_GIVE_BACK", 0.1)
    game = play()
    errand = Errand.objects.create(status=Status.working())
    lock(errand)
    leave(game, errand)
    told = f"testapp.do_errand {errand.pk} can not be given back, as somebody has locked its row"
    wait_until(lambda: told in caplog.text)
    assert stored(errand) == errand.status


def test_what_can_not_be_given_back_is_left_to_its_recovery(play, monkeypatch, caplog):
    def fail(*arguments, **options):
        raise OperationalError("away")

    monkeypatch.setattr(verbs, "release", fail)
    game = play()
    errand = Errand.objects.create(status=Status.working())
    game.children[0].say("left", [left_by(game.children[0], errand)])
    wait_until(lambda: game.children[0].left)
    game.children[0].die(0)
    wait_until(lambda: len(game.children) == 2)
    assert "can not be given back" in caplog.text


def test_living_process_whose_fork_server_died_is_not_taken_for_dead(play, monkeypatch):
    """multiprocessing says that it has ended; what it runs must not be given back."""
    lives = [True]
    monkeypatch.setattr(module, "is_alive", lambda pid: lives[0])
    game = play()
    child = game.children[0]
    child.process.exitcode = 255
    child._death.close()
    wait_until(lambda: child.is_stopping)
    time.sleep(0.1)
    assert child in game.supervisor._children
    lives[0] = False
    wait_until(lambda: child not in game.supervisor._children)


def test_process_that_is_being_replaced_has_the_grace_time_when_its_fork_server_died(play, monkeypatch):
    lives = [True]
    monkeypatch.setattr(module, "is_alive", lambda pid: lives[0])
    game = play(grace=7.0)
    child = game.children[0]
    child.say("full", "has run for 5 s")
    wait_until(lambda: child.reason)
    child.process.exitcode = 255
    child._death.close()
    wait_until(lambda: child.theirs.poll() and child.theirs.recv() == ("stop", 7.0))
    lives[0] = False


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork server")
def test_living_process_whose_fork_server_died_is_killed_if_it_does_not_stop(play):
    """By the system: multiprocessing takes it for dead, and does nothing."""
    game = play()
    child = game.children[0]
    actual = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        child.pid = actual.pid
        child.process.exitcode = 255
        child._death.close()
        wait_until(lambda: child not in game.supervisor._children)
        assert not is_alive(actual.pid)
        assert f"Process {actual.pid} does not stop and is killed." in game.said
    finally:
        actual.kill()
        actual.wait()


@pytest.mark.parametrize("error", [OSError("no more processes"), EOFError("unexpected EOF")])
def test_process_that_can_not_be_started_is_tried_again(error, play, monkeypatch):
    failures = [error]
    make = Played.__init__

    def fail_once(self, options):
        if failures:
            raise failures.pop()
        make(self, options)

    monkeypatch.setattr(Played, "__init__", fail_once)
    game = play()
    assert game.said[0] == f"A process can not be started: {error}."


def test_listener_that_is_gone_ends_nothing(play):
    def broken(text):
        raise BrokenPipeError

    game = play(told=broken)
    game.children[0].die(1)
    wait_until(lambda: len(game.children) == 2)


@pytest.mark.parametrize(("ends_by_itself", "code"), [(False, -9), (True, 0)])
def test_error_of_its_own_leaves_no_process_behind(ends_by_itself, code, play, monkeypatch):
    game = play()
    child = game.children[0]
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr(game.supervisor, "_write_health", lambda: 1 / 0)
    if ends_by_itself:
        wait_until(lambda: child.listen() or is_told_to_stop(child))
        child.die(0)
    wait_until(lambda: not game.thread.is_alive())
    assert child.process.exitcode == code


def test_error_of_its_own_while_it_ends_after_another_leaves_no_process_behind(play, monkeypatch):
    def fail():
        game.children[0].die(0)
        raise ZeroDivisionError

    game = play(processes=2)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr(game.supervisor, "_bury", fail)
    wait_until(lambda: not game.thread.is_alive())
    assert [child.process.exitcode for child in game.children] == [0, -9]


def test_what_processes_leave_after_an_error_of_its_own_is_given_back(play, monkeypatch):
    game = play()
    child = game.children[0]
    errand = Errand.objects.create(status=Status.working())
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr(game.supervisor, "_ended", lambda counts: 1 / 0)
    child.say("ended", {"finish": 1})
    wait_until(lambda: child.listen() or ("stop", 0.0) in child.heard)
    child.say("ended", {"finish": 1})
    child.say("left", [left_by(child, errand)])
    child.die(0)
    wait_until(lambda: not game.thread.is_alive())
    assert stored(errand) == Status.waiting(5)


def test_callable_of_a_queue_is_not_asked_when_a_process_dies(play, monkeypatch):
    """It may need a database that is away."""
    game = play()
    monkeypatch.setattr(do_errand, "recovery", lambda: 1 / 0)
    game.children[0].die(1)
    wait_until(lambda: len(game.children) == 2)
    assert "is taken back when its leases have run out, in " in game.said[0]


def test_lease_of_a_queue_whose_callable_fails_is_the_declared_one(monkeypatch):
    monkeypatch.setattr(do_errand, "recovery", lambda: 1 / 0)
    assert module._longest_lease(do_errand) == do_errand.lease.total_seconds()


def test_counts_that_nobody_reads_end_nothing(play, monkeypatch):
    def broken(counts):
        raise BrokenPipeError

    game = play()
    child = game.children[0]
    monkeypatch.setattr(game.supervisor, "_ended", broken)
    child.say("ended", {"finish": 1})
    child.say("ready")
    wait_until(lambda: child.is_ready)


@pytest.mark.parametrize("error", [ProcessLookupError, PermissionError])
def test_process_that_can_not_be_killed_ends_nothing(error, monkeypatch):
    """Its fork server died, so only the system knows whether it is there, and whose it is."""

    def fail(pid, number):
        raise error

    child = Played(None)
    child.process.exitcode = 255
    monkeypatch.setattr(module, "is_alive", lambda pid: True)
    monkeypatch.setattr(os, "kill", fail)
    child.kill()
    assert not child.has_ended


@pytest.mark.parametrize(("left_due", "code"), [(False, 0), (True, 3)])
def test_drain_ends_when_nothing_is_due_and_no_process_is_at_work(left_due, code, play):
    game = play(drain=True)
    child = game.children[0]
    child.say("ready")
    wait_until(lambda: child.is_ready)
    child.say("answer", 1)
    time.sleep(0.6)
    assert game.thread.is_alive()  # it is at work
    child.say("answer", 0)
    wait_until(lambda: child.listen() or any(message[0] == "stop" for message in child.heard))
    if left_due:
        Errand.objects.create()
    child.die(0)
    wait_until(lambda: game.codes == [code])
    assert game.said == ["Nothing is due any more."]


def drain_with_one_ready(play):
    game = play(drain=True)
    child = game.children[0]
    child.say("ready")
    wait_until(lambda: child.is_ready)
    return game, child


def is_told_to_stop(child):
    return any(message[0] == "stop" for message in child.heard)


def wait_for_looks(game, count):
    until = game.supervisor._looks + count
    wait_until(lambda: game.supervisor._looks >= until)


def test_drain_does_not_end_while_the_recovery_of_something_is_held_back(play):
    errand = Errand.objects.create(status=Status.working(now()))
    game, child = drain_with_one_ready(play)
    game.supervisor._prober._hold_back([do_errand], 600.0)
    Errand.objects.update(status=Status.working(5))
    wait_until(lambda: game.supervisor._prober.holds_back == ["testapp.do_errand"])
    wait_for_looks(game, 8)
    child.listen()
    assert not is_told_to_stop(child)
    errand.delete()
    wait_until(lambda: child.listen() or is_told_to_stop(child))
    child.die(0)
    wait_until(lambda: game.codes == [0])


def test_drain_waits_for_a_process_that_runs_its_last_tasks(play):
    """It said that it runs nothing before it took them, and says no more."""
    game, child = drain_with_one_ready(play)
    child.say("full", "has run 1 task")
    wait_until(lambda: len(game.children) == 2)
    other = game.children[1]
    other.say("ready")
    until = game.supervisor._looks + 8
    wait_until(lambda: other.listen() or game.supervisor._looks >= until)
    assert not game.said
    child.say("ended", {"finish": 1})
    child.die(0)
    wait_until(lambda: other.listen() or is_told_to_stop(other))
    other.die(0)
    wait_until(lambda: game.codes == [0])


def test_drain_waits_for_the_answer_of_each_process(play):
    """Who says nothing is busy, perhaps, with what it claimed after its last answer."""
    game, child = drain_with_one_ready(play)
    wait_for_looks(game, 8)
    assert not game.said
    wait_until(lambda: child.listen() or is_told_to_stop(child))
    child.die(0)
    wait_until(lambda: game.codes == [0])


def test_drain_that_has_left_out_a_queue_is_no_success(monkeypatch):
    one = Supervisor(Options(names=("testapp.do_errand",), drain=True), [do_errand], said := [].append)
    monkeypatch.setattr(one._prober, "_left_out", {"testapp.do_errand": time.monotonic() + 60})
    assert one._is_anything_due()
    assert said.__self__ == ["Nobody knows whether something is due in testapp.do_errand."]


def test_pool_that_is_too_small_is_told_at_the_start(play, monkeypatch, caplog):
    monkeypatch.setattr(module, "too_small_pools", lambda queues, options: ["too small"])
    play()
    assert "too small" in caplog.text


@pytest.mark.parametrize("drain", [False, True])
def test_worker_without_its_prober_stops_in_order(drain, play, monkeypatch, caplog):
    game = play(drain=drain)
    Errand.objects.create()  # which is not what its exit code tells
    monkeypatch.setattr(type(game.supervisor._prober), "is_alive", False)
    wait_until(lambda: game.children[0].listen() or ("stop", 0.2) in game.children[0].heard)
    game.children[0].die(0)
    wait_until(lambda: game.codes == [1])
    assert "The thread that looks for work has died" in caplog.text


def test_health_is_that_of_the_processes_too(play, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_LONGEST_SILENCE", 0.9)
    path = tmp_path / "health"
    game = play(health_file=str(path), poll=0.1)
    child = game.children[0]
    child.say("ready")
    wait_until(path.exists)
    wait_until(lambda: time.monotonic() - child.answered_at > 1.5)
    time.sleep(1.2)
    written = path.stat().st_mtime_ns
    time.sleep(1.5)
    assert path.stat().st_mtime_ns == written
    wait_until(lambda: child.listen() or path.stat().st_mtime_ns > written)


def test_worker_that_seldom_looks_is_well(play, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_LONGEST_SILENCE", 0.5)
    path = tmp_path / "health"
    game = play(health_file=str(path), poll=60.0)
    child = game.children[0]
    child.say("ready")
    wait_until(lambda: child.listen() or path.exists())
    game.supervisor._looked_at = child.answered_at = time.monotonic() - 30  # the next looks are to come
    monkeypatch.setattr(Supervisor, "_found", lambda *arguments: None)
    written = path.stat().st_mtime_ns
    wait_until(lambda: path.stat().st_mtime_ns > written)


@pytest.mark.parametrize("is_stopping", [True, False])
def test_worker_whose_processes_end_what_they_run_is_well_as_long_as_they_answer(
    is_stopping, play, monkeypatch, tmp_path
):
    """Nobody looks for work any more, or may tell them of it."""
    monkeypatch.setattr(module, "_LONGEST_SILENCE", 1.0)
    monkeypatch.setattr(module, "_ASK_INTERVAL", 0.1)
    path = tmp_path / "health"
    game = play(health_file=str(path), poll=0.1, grace=60.0)
    for count in (1, 2):
        wait_until(lambda count=count: len(game.children) == count)
        game.children[-1].say("ready")
        wait_until(lambda: listen(game) or game.children[-1].is_ready)
        if is_stopping:
            break
        game.children[-1].say("full", "has run 5 tasks")
    wait_until(lambda: listen(game) or path.exists())
    if is_stopping:
        game.supervisor.stop()
        wait_until(lambda: listen(game) or not game.supervisor._prober.is_alive)
    until = time.monotonic() + 2.5
    wait_until(lambda: listen(game) or time.monotonic() > until)
    assert time.time() - path.stat().st_mtime < 2.0
    time.sleep(2.2)  # they do not answer
    written = path.stat().st_mtime_ns
    time.sleep(1.2)
    assert path.stat().st_mtime_ns == written


def listen(game):
    for child in game.children:
        child.listen()


def test_worker_that_is_stopped_before_it_serves_starts_no_process(monkeypatch):
    monkeypatch.setattr(module, "Child", None)
    one = Supervisor(Options(names=("testapp.do_errand",)), [do_errand], said := [].append)
    one.stop()
    assert one.run(handle_signals=False) == 0
    assert said.__self__[0].startswith("Stopping: ")


def test_health_file_that_can_not_be_written_ends_nothing(play, tmp_path, caplog):
    path = tmp_path / "folder" / "health"
    game = play(health_file=str(path))
    child = game.children[0]
    child.say("ready")
    told = f"The health file {path} can not be written"
    wait_until(lambda: child.listen() or told in caplog.text)
    until = time.monotonic() + 1.5
    wait_until(lambda: child.listen() or time.monotonic() > until)
    path.parent.mkdir()
    wait_until(lambda: child.listen() or path.exists())
    assert caplog.text.count(told) == 1
    assert json.loads(path.read_text())["processes"] == [child.pid]


@pytest.mark.usefixtures("play")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signals")
def test_worker_of_the_main_thread_stops_in_order_at_a_signal(monkeypatch):
    def stop():
        wait_until(lambda: Played.started)
        os.kill(os.getpid(), signal.SIGTERM)
        (child,) = Played.started
        wait_until(lambda: child.listen() or ("stop", 25.0) in child.heard)
        child.die(0)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    said = []
    one = Supervisor(Options(names=("testapp.do_errand",)), [do_errand], said.append)
    thread = threading.Thread(target=stop)
    thread.start()
    assert one.run() == 0
    thread.join(30)
    assert said == ["Stopping: running tasks may end within 25 s; a second signal ends them now."]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_end_of_a_drain_that_can_not_be_seen_is_none(monkeypatch):
    one = Supervisor(Options(names=("testapp.do_errand",), drain=True), [do_errand])

    def away():
        raise OperationalError("away")

    monkeypatch.setattr(one._prober, "look", away)
    assert one._is_anything_due()
