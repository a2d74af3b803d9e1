"""The supervisor with processes that the test plays: what it does when they die, hang or say something."""

import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from django.db import OperationalError, connections, transaction

from modelqueue import State, Status, now, verbs
from modelqueue.engines import Candidate
from modelqueue.worker import child as child_module
from modelqueue.worker import give_back, team
from modelqueue.worker import supervisor as module
from modelqueue.worker.bell import Bell
from modelqueue.worker.board import Board
from modelqueue.worker.child import Child
from modelqueue.worker.options import Options
from modelqueue.worker.running import Claimed
from modelqueue.worker.supervisor import Supervisor
from modelqueue.worker.system import is_alive
from tests.actions import MILLISECOND, row, stored
from tests.processes import wait_until
from tests.testapp.models import Errand
from tests.testapp.queues import do_errand, review

pytestmark = pytest.mark.django_db(transaction=True)


class Played(Child):
    """A process that does what the test says."""

    started = []

    def __init__(self, options, places):
        self.options, self.places = options, places
        self.board, self._bell = Board(places or 10, options.names), Bell(["a hint"])
        self.numbers = itertools.count(1)
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
        self.claimed = {}
        self.overdue = set()
        self.was_killed = False
        self.has_told_all = True
        self.running = self._hints = self._unanswered = self._awaited = self.silences = 0
        self.hints = 0
        self._speaking = threading.Lock()
        self.answers = True
        self.heard = []
        self.started.append(self)

    def claim(self, *errands, begin=True):
        """Note that these tasks, which are working, were claimed, and begin with them."""
        places = []
        for errand in errands:
            row = Candidate(errand.pk, errand.pk, Status.waiting(5))
            places.append(self.board.take(next(self.numbers), errand.status, "testapp.do_errand", row))
            if begin:
                self.board.begin(places[-1])
        return places

    def say(self, *message):
        self.theirs.send(message)

    def listen(self):
        """Hear what the supervisor has sent, and answer, as a sound process does."""
        while self.process.exitcode is None and self.theirs.poll():
            self.heard.append(self.theirs.recv())
            if self.answers:
                self.say("answer", 0)

    def hears_the_bell(self):
        return self._bell.heard() == ["a hint"]

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
    monkeypatch.setattr(team, "Child", Played)
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(child_module, "_EXTRA", 0.2)
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
    assert re.match(r"No process starts within 0.0 s. What \d+ had in hand is given back.$", game.said[0])


def test_process_that_dies_again_and_again_is_replaced_ever_more_slowly(play, monkeypatch, caplog):
    game = play()
    for count in range(2, 5):
        game.children[-1].die(1)
        wait_until(lambda count=count: len(game.children) == count)
    assert [text[:35] for text in game.said] == ["No process starts within 0.0 s. Wha"] * 3
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


def test_hint_goes_to_one_process_at_once_in_turns(play):
    game = play(processes=2, poll=600.0)
    for child in game.children:
        child.say("ready")
    wait_until(lambda: all(child.is_ready for child in game.children))
    count = 0
    while not all(hints(game)):  # looks take turns, too
        count += 1
        game.supervisor._prober._hinted(["a hint"])
        assert sum(hints(game)) == count
    assert count < 50


def test_only_process_is_told_what_to_listen_to_and_so_is_the_one_that_replaces_it(play):
    game = play()
    (child,) = game.children
    tables = {"testapp_errand": ["testapp.do_errand"]}
    game.supervisor._ordinary.listen_to("default", tables)
    child.say("ready")
    wait_until(lambda: child.listen() or ("listen", {"default": tables}) in child.heard)
    game.supervisor._ordinary.listen_to("other", {})
    both = "listen", {"default": tables, "other": {}}
    wait_until(lambda: child.listen() or both in child.heard)
    child.die(1)
    wait_until(lambda: len(game.children) == 2)
    game.children[1].say("ready")
    wait_until(lambda: game.children[1].listen() or both in game.children[1].heard)


@pytest.mark.parametrize(("processes", "listens"), [(1, True), (2, False)])
def test_process_is_to_listen_if_it_is_the_only_one(processes, listens, play):
    game = play(processes=processes)
    assert (game.supervisor._parts["hears of new tasks"]._hand_over is not None) == listens


def test_prober_looks_soon_when_a_process_has_heard_something(play, monkeypatch):
    game, asked = play(), []
    monkeypatch.setattr(game.supervisor._prober, "ask", asked.append)
    game.children[0].say("heard")
    wait_until(lambda: asked == [[]])


def test_hint_goes_to_a_process_that_has_the_least_to_do(monkeypatch):
    """One whose slots are all taken could claim nothing, nor could one that hangs."""
    monkeypatch.setattr(team, "Child", Played)
    one = team.Team(Options(names=()), [])
    for running, unanswered in ((2, 0), (0, 0), (0, 3), (0, 0)):
        one.start_one()
        one.children[-1].is_ready, one.children[-1].answers = True, False
        one.children[-1].running, one.children[-1]._unanswered = running, unanswered
    for _ in range(2):
        one.hint(["a hint"])
    assert [child.hears_the_bell() for child in one.children] == [False, True, False, True]
    assert [child.burden for child in one.children] == [2, 1, 3, 1]
    one.children[1].answered(0)
    one.hint(["a hint"])
    assert [child.hears_the_bell() for child in one.children] == [False, True, False, False]
    for child in one.children:
        child.close()  # it is dead
    one.hint(["a hint"])


def hints(game):
    for child in game.children:
        child.hints += child.hears_the_bell()
    return [child.hints for child in game.children]


def test_full_processes_that_do_not_end_are_not_replaced_without_end(play):
    game = play()
    for count in (1, 2):
        wait_until(lambda count=count: len(game.children) == count)
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
    assert f"What {full.pid} had in hand is given back." in game.said[0]
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


def test_abandoned_tasks_are_recovered_by_the_supervisor_itself(play):
    """Whatever becomes of its processes meanwhile."""
    game = play()
    errand = Errand.objects.create(status=Status.working(5))
    wait_until(lambda: stored(errand).state == State.waiting)
    assert stored(errand).attempts == 1
    assert not game.children[0].is_ready


def last_attempt():
    return Errand.objects.create(status=Status.waiting(5, do_errand.policy.retry))


def test_last_attempts_have_a_process_of_their_own_when_there_are_some(play):
    game = play()
    ordinary = game.children[0]
    ordinary.say("ready")
    errand = last_attempt()
    wait_until(lambda: len(game.children) == 2)
    alone = game.children[1]
    assert (alone.options.alone, alone.options.threads, alone.places) == (True, 1, 1)
    alone.say("ready")
    wait_until(lambda: alone.listen() or ("due", ["testapp.do_errand"]) in alone.heard)
    ordinary.listen()
    assert all(message == ("due", []) for message in ordinary.heard)
    Errand.objects.filter(pk=errand.pk).delete()
    wait_until(lambda: not game.supervisor._teams[1].due)
    alone.say("full", "has no last attempts to run any more")
    wait_until(lambda: alone.reason)
    alone.die(0)
    wait_until(lambda: f"Process {alone.pid} has no last attempts to run any more and ends." in game.said)
    assert len(game.children) == 2


def test_process_for_last_attempts_has_others_beside_it_only_while_it_is_busy(play):
    game = play(processes=2)
    last_attempt()
    wait_until(lambda: len(game.children) == 3)
    first = game.children[2]
    first.say("ready")
    looks = game.supervisor._looks
    wait_until(lambda: game.supervisor._looks > looks + 3)
    assert len(game.children) == 3
    first.say("answer", 1)
    wait_until(lambda: len(game.children) == 4)
    for child in game.children[2:]:
        child.say("answer", 1)
    wait_until(lambda: game.children[3].running)
    looks = game.supervisor._looks
    wait_until(lambda: game.supervisor._looks > looks + 3)
    assert len(game.children) == 4


def test_drain_waits_for_last_attempts(play):
    game = play(drain=True)
    game.children[0].say("ready")
    errand = last_attempt()
    wait_until(lambda: len(game.children) == 2)
    alone = game.children[1]
    alone.say("ready")
    wait_until(lambda: alone.is_ready)
    alone.answers = False
    Errand.objects.filter(pk=errand.pk).delete()
    alone.say("answer", 1)
    wait_until(lambda: alone.running)
    looks = game.supervisor._looks
    wait_until(lambda: game.children[0].listen() or game.supervisor._looks > looks + 5)
    assert not game.children[0].is_stopping
    alone.say("answer", 0)
    alone.answers = True
    wait_until(lambda: listen(game) or game.children[0].is_stopping)


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


def test_process_that_does_not_answer_for_longer_than_the_lease_is_killed_and_charged(play, monkeypatch):
    """As one whose action, in C, lets no other thread go on. Who answers late is left alone."""
    monkeypatch.setattr(module, "_ASK_INTERVAL", 0.05)
    monkeypatch.setattr(module, "_LONGEST_HANG", 0.0)
    monkeypatch.setattr(module, "_longest_lease", lambda queue: 1.0)
    game = play(poll=0.1, processes=2)
    hung, late = game.children
    errand = working()
    for child in (hung, late):
        child.say("ready")
    hung.claim(errand)
    wait_until(lambda: late.silences >= 3)
    wait_until(lambda: late.listen() or len(game.children) == 3)
    assert (hung.process.exitcode, late.process.exitcode) == (-9, None)
    wait_until(lambda: late.listen() or stored(errand).attempts == 1)
    assert row(errand).error == (
        f"modelqueue.exceptions.WorkerDied: its process {hung.pid} did not answer for 1 s and was killed"
    )


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


def working(**values):
    return Errand.objects.create(status=Status.working(), **values)


def test_what_a_dead_process_had_in_hand_is_given_back_and_only_what_had_begun_is_charged(play, caplog):
    game = play()
    begun, claimed = working(), working()
    child = game.children[0]
    child.claim(begun)
    child.claim(claimed, begin=False)
    assert stored(begun) == begun.status  # it lives
    child.die(-9)
    wait_until(lambda: stored(begun).state == State.waiting)
    wait_until(lambda: stored(claimed) == Status.waiting(5))
    assert stored(begun).attempts == 1
    assert row(begun).error.startswith(
        f"modelqueue.exceptions.WorkerDied: its process {child.pid} was killed by SIGKILL"
    )
    assert f"recovered, as its process {child.pid} was killed by SIGKILL" in caplog.text
    told = f"testapp.do_errand {claimed.pk} had not begun when its process died: given back"
    wait_until(lambda: told in caplog.text)


def test_process_that_ends_by_itself_has_died_whatever_its_exit_code(play):
    """The action has called os._exit(0)."""
    game = play()
    errand = working()
    game.children[0].claim(errand)
    game.children[0].die(0)
    wait_until(lambda: stored(errand).attempts == 1)


def test_process_that_is_replaced_and_ended_by_its_last_action_has_died(play):
    """The action has called os._exit(0), and would do so again and again."""
    game = play()
    child, errand = game.children[0], working()
    child.claim(errand)
    child.say("full", "has run 1 task")
    wait_until(lambda: child.reason)
    child.die(0)
    wait_until(lambda: stored(errand).attempts == 1)


def test_task_that_the_board_can_not_name_is_given_back_as_its_process_has_told(play):
    """One of which nothing was told, or of what stood at its place before, comes back with its lease."""
    game = play()
    child = game.children[0]
    told, untold = working(), working()
    facts = "testapp.do_errand", Candidate(told.pk, told.pk, Status.waiting(5), {"title": "before"})
    places = [
        child.board.take(number, one.status, facts[0], None) for number, one in enumerate((told, untold), 1)
    ]
    child.say("claimed", [Claimed(place, 1, *facts) for place in places])
    wait_until(lambda: len(child.claimed) == 2)
    child.die(-9)
    wait_until(lambda: stored(told) == Status.waiting(5))
    assert row(told).title == "before"
    assert stored(untold) == untold.status


def test_task_in_whose_row_nothing_stood_is_given_back_with_that(play):
    game = play()
    child = game.children[0]
    errand = working()
    candidate = Candidate(errand.pk, errand.pk, Status.waiting(5), {"title": ""})
    Errand.objects.filter(pk=errand.pk).update(title="of the claim")
    child.say("claimed", [child.board.new_blank(candidate)])
    wait_until(lambda: len(child.board._blanks) == 2)
    child.board.take(1, errand.status, "testapp.do_errand", candidate)
    child.die(-9)
    wait_until(lambda: stored(errand) == Status.waiting(5))
    assert row(errand).title == ""


def test_what_can_not_be_read_of_a_process_ends_nothing(play):
    """A primary key that can be pickled, but not made again: what it has claimed is left to its lease."""
    game = play()
    child = game.children[0]
    child.theirs.send_bytes(pickle.dumps(Unreadable()))
    child.say("ready")
    wait_until(lambda: child.is_ready)
    child.die(-9)
    wait_until(lambda: len(game.said) == 2)
    assert game.said[1].startswith("It was claiming just then.")


class Unreadable:
    def __reduce__(self):
        return int, ("none",)


def test_receiver_that_exits_keeps_no_other_task_from_being_given_back(play, monkeypatch):
    game = play()
    first, second = working(), working()
    take_back = verbs.take_back

    def fail_once(source, policy, row, *arguments):
        if row.pk == first.pk:
            raise SystemExit
        return take_back(source, policy, row, *arguments)

    monkeypatch.setattr(verbs, "take_back", fail_once)
    game.children[0].claim(first, second)
    game.children[0].die(-9)
    wait_until(lambda: stored(second).state == State.waiting)
    wait_until(lambda: game.supervisor._give_back.failed_at)


def test_task_that_kills_its_process_is_canceled_when_it_is_out_of_attempts(play):
    game = play()
    errand = Errand.objects.create(status=Status.working(attempts=do_errand.policy.retry))
    game.children[0].claim(errand)
    game.children[0].die(-11)
    wait_until(lambda: stored(errand).state == State.canceled)
    assert stored(errand).attempts == do_errand.policy.retry + 1


def test_what_a_process_that_was_told_to_stop_has_left_is_not_charged(play, caplog):
    game = play()
    errand = working()
    game.children[0].claim(errand)
    game.supervisor.stop()
    wait_until(lambda: game.children[0].is_stopping)
    game.children[0].die(0)
    wait_until(lambda: stored(errand) == Status.waiting(5))
    wait_until(lambda: f"testapp.do_errand {errand.pk} did not end in time: given back" in caplog.text)


def test_what_a_process_had_that_was_killed_as_it_does_not_stop_is_not_charged(play):
    game = play()
    errand = working()
    game.children[0].claim(errand)
    game.supervisor.stop()
    wait_until(lambda: game.children[0].process.exitcode == -9)
    wait_until(lambda: stored(errand) == Status.waiting(5))


def test_process_that_is_killed_by_its_action_while_it_stops_is_charged(play):
    game = play(grace=60.0)
    errand = working()
    game.children[0].claim(errand)
    game.supervisor.stop()
    wait_until(lambda: game.children[0].is_stopping)
    game.children[0].die(-11)
    wait_until(lambda: stored(errand).attempts == 1)


@pytest.mark.parametrize("code", [0, -9])
def test_process_with_an_action_that_can_not_be_ended_is_replaced_and_that_one_alone_is_charged(code, play):
    """Whether it ends by itself at the end of the grace time or has to be killed then."""
    game = play(grace=2.0)
    child = game.children[0]
    overdue, ended, neighbor = working(), working(), working()
    places = child.claim(overdue, ended, neighbor)
    child.say("overdue", [child.board.read(place).number for place in places[:2]])
    wait_until(lambda: len(game.children) == 2)  # beside it, at once
    child.board.free(places[1])
    wait_until(lambda: child.listen() or ("stop", 2.0) in child.heard)
    assert stored(overdue) == overdue.status  # it lives
    if code == 0:
        child.die(0)
    wait_until(lambda: stored(overdue).state == State.waiting)
    wait_until(lambda: stored(neighbor) == Status.waiting(5))
    assert child.process.exitcode == code
    assert stored(overdue).attempts == 1
    took = "the action took longer than its timeout of 1:00:00, until its process was killed"
    assert row(overdue).error == f"modelqueue.exceptions.TimedOut: {took}"
    assert row(neighbor).error == ""
    assert stored(ended) == ended.status
    told = f"Process {child.pid} has an action that goes on after its timeout and is replaced."
    wait_until(lambda: told in game.said)
    assert game.supervisor._deaths == 0


def test_neighbor_of_an_action_that_can_not_be_ended_is_charged_if_the_process_dies_by_itself(play):
    game = play(grace=60.0)
    child = game.children[0]
    overdue, neighbor = working(), working()
    places = child.claim(overdue, neighbor)
    child.say("overdue", [child.board.read(places[0]).number])
    wait_until(lambda: child.overdue)
    child.die(-11)
    wait_until(lambda: stored(overdue).attempts == stored(neighbor).attempts == 1)
    assert "WorkerDied" in row(neighbor).error
    assert "TimedOut" in row(overdue).error


def test_task_is_given_back_under_the_lease_that_was_renewed_last(play):
    """Whether the answer to the renewal came or not."""
    game = play()
    child = game.children[0]
    renewed, lost = working(), working()
    new = Status.working(now() + MILLISECOND)
    for errand, place in zip((renewed, lost), child.claim(renewed, lost), strict=True):
        child.board.renew(place, errand.status, new)
    Errand.objects.filter(pk=renewed.pk).update(status=new)
    child.die(-9)
    wait_until(lambda: stored(renewed).state == stored(lost).state == State.waiting)


def test_what_somebody_has_taken_from_a_dead_process_is_not_given_back(play, caplog):
    game = play()
    taken, ours = working(), working()
    child = game.children[0]
    child.claim(taken, ours)
    Errand.objects.filter(pk=taken.pk).update(status=Status.canceled(7))
    child.die(-9)
    wait_until(lambda: stored(ours).state == State.waiting)
    assert stored(taken) == Status.canceled(7)
    assert f"pk={taken.pk}" not in caplog.text


def test_what_has_ended_is_not_given_back(play):
    """Nor what stood at the same place before."""
    game = play()
    child = game.children[0]
    ended, ours = working(), working()
    (place,) = child.claim(ended)
    child.board.free(place)
    child.board._free.rotate(1)
    assert child.claim(ours) == [place]
    child.die(-9)
    wait_until(lambda: stored(ours).state == State.waiting)
    assert stored(ended) == ended.status


def test_claim_of_which_a_dead_process_had_not_told_is_left_to_its_recovery(play):
    game = play(drain=True)
    claim = game.children[0].board.claim()
    claim.__enter__()
    game.children[0].die(-9)
    wait_until(lambda: len(game.children) == 2)
    assert game.said[1].startswith("It was claiming just then. What that has taken comes back when ")
    assert game.supervisor._drained_from > time.monotonic() + 1


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
    """Have a process die that had these in hand, and had not begun with them."""
    child = game.children[0]
    child.claim(*errands, begin=False)
    child.die(-9)


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
    monkeypatch.setattr(give_back, "_LONGEST", 0.1)
    game = play()
    errand = Errand.objects.create(status=Status.working())
    lock(errand)
    leave(game, errand)
    told = f"testapp.do_errand {errand.pk} can not be given back, as somebody has locked its row"
    wait_until(lambda: told in caplog.text)
    assert stored(errand) == errand.status


@pytest.mark.parametrize("lack", ["database", "thread"])
def test_what_can_not_be_given_back_is_left_to_its_recovery(lack, play, monkeypatch, caplog):
    def fail(*arguments, **options):
        raise OperationalError("away") if lack == "database" else RuntimeError("no more")

    if lack == "database":
        monkeypatch.setattr(verbs, "release", fail)
    else:
        no_threads = SimpleNamespace(Thread=lambda **options: SimpleNamespace(start=fail))
        monkeypatch.setattr(give_back, "threading", no_threads)
    game = play()
    leave(game, working())
    wait_until(lambda: "can not be given back" in caplog.text)
    wait_until(lambda: len(game.children) == 2)
    assert not game.supervisor._give_back.is_busy
    assert game.supervisor._give_back.failed_at


def test_living_process_whose_fork_server_died_is_not_taken_for_dead(play, monkeypatch):
    """multiprocessing says that it has ended; what it runs must not be given back."""
    lives = [True]
    monkeypatch.setattr(child_module, "is_alive", lambda pid: lives[0])
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
    monkeypatch.setattr(child_module, "is_alive", lambda pid: lives[0])
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

    def fail_once(self, options, places):
        if failures:
            raise failures.pop()
        make(self, options, places)

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
    monkeypatch.setattr(game.supervisor, "_is_well", lambda: 1 / 0)
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
    errand = working()
    child.claim(errand)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr(game.supervisor, "_ended", lambda counts: 1 / 0)
    child.say("ended", {"finish": 1})
    wait_until(lambda: child.listen() or ("stop", 0.0) in child.heard)
    child.say("ended", {"finish": 1})
    child.die(0)
    wait_until(lambda: not game.thread.is_alive())
    assert stored(errand) == Status.waiting(5)


def test_callable_of_a_queue_is_not_asked_when_a_process_dies(play, monkeypatch):
    """It may need a database that is away."""
    game = play()
    monkeypatch.setattr(do_errand, "recovery", lambda: 1 / 0)
    game.children[0].die(1)
    wait_until(lambda: len(game.children) == 2)
    assert "had in hand is given back" in game.said[0]


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

    child = Played(Options(names=()), 1)
    child.process.exitcode = 255
    monkeypatch.setattr(child_module, "is_alive", lambda pid: True)
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


def test_what_has_expired_is_held_back_when_a_process_says_that_the_disk_is_full(play):
    Errand.objects.create(status=Status.working(5))
    game = play()
    game.children[0].say("no room", ["default"])
    wait_until(lambda: game.supervisor._prober.holds_back == ["testapp.do_errand"])


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


@pytest.mark.parametrize("drain", [True, False])
def test_prober_of_a_drain_is_certain_that_nothing_is_due(drain):
    one = Supervisor(Options(names=("testapp.do_errand",), drain=drain), [do_errand])
    assert one._prober._is_certain is drain


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
    monkeypatch.setattr(type(game.supervisor._prober), "has_ended", True)
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
        wait_until(lambda: listen(game) or game.supervisor._prober.has_ended)
    until = time.monotonic() + 2.5
    wait_until(lambda: listen(game) or time.monotonic() > until)
    written = path.stat().st_mtime_ns
    wait_until(lambda: listen(game) or path.stat().st_mtime_ns > written)
    time.sleep(2.2)  # they do not answer
    written = path.stat().st_mtime_ns
    time.sleep(1.2)
    assert path.stat().st_mtime_ns == written


def listen(game):
    for child in game.children:
        child.listen()


def test_worker_that_is_stopped_before_it_serves_starts_no_process(monkeypatch):
    monkeypatch.setattr(team, "Child", None)
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
