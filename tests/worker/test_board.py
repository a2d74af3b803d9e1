"""What a process notes of its tasks is read by its supervisor, also when the process is dead."""

import os
import signal

import pytest

from modelqueue import Status
from modelqueue.engines import Candidate
from modelqueue.worker.board import Board
from modelqueue.worker.system import context
from tests.processes import wait_until

CLAIM, RENEWED, AGAIN = (Status.working(number) for number in (5, 6, 7))
ROW = Candidate(-(2**63), 2**63 - 1, Status.maximum("waiting"))


def work(board, pipe):
    """Be a process that claims, begins and renews, and hangs."""
    claiming = board.claim()
    claiming.__enter__()
    place = board.take(1, CLAIM, "b", ROW)
    board.begin(place)
    board.renew(place, CLAIM, RENEWED)
    pipe.send(place)
    signal.pause()


def test_what_a_process_has_noted_outlives_it():
    system, board = context(), Board(3, ["a", "b"])
    ours, theirs = system.Pipe()
    process = system.Process(target=work, args=(board, theirs))
    process.start()
    wait_until(ours.poll)
    place = ours.recv()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    note = board.read(place)
    assert (note.number, note.has_begun, note.leases) == (1, True, {CLAIM, RENEWED})
    assert (note.queue, note.row) == ("b", ROW)
    assert board.read_all() == {place: note}
    assert not board.is_all_told


def test_claim_that_is_told_leaves_nothing_unknown():
    board = Board(1, ["a", "b"])
    with board.claim():
        assert not board.is_all_told
    assert board.is_all_told


def test_task_that_was_not_begun_has_the_lease_of_its_claim():
    board = Board(1, ["a", "b"])
    note = board.read(board.take(4, CLAIM, "b", ROW))
    assert (note.number, note.has_begun, note.leases) == (4, False, {CLAIM})


def test_place_is_free_again_when_its_task_has_ended():
    board = Board(1, ["a", "b"])
    place = board.take(1, CLAIM, "b", ROW)
    assert board.take(2, CLAIM, "b", ROW) is None
    board.free(place)
    assert board.read(place).number == 0
    assert board.take(3, AGAIN, "a", ROW) == place
    assert (board.read(place).number, board.read(place).leases) == (3, {AGAIN})


def test_at_no_time_is_a_lease_missing_that_may_stand_in_the_row(monkeypatch):
    """The process may be killed between two writes, and the answer to a renewal may be lost."""
    board, seen = Board(1, ["a", "b"]), []
    place = board.take(1, CLAIM, "b", ROW)
    actual = Board._set
    monkeypatch.setattr(
        Board, "_set", lambda self, *given: actual(self, *given) or seen.append(self.read(place).leases)
    )
    board.renew(place, CLAIM, RENEWED)
    assert all(CLAIM in leases for leases in seen)
    assert board.read(place).leases == {CLAIM, RENEWED}
    seen.clear()
    board.renew(place, RENEWED, AGAIN)  # it was written, as the next one has seen
    assert all(RENEWED in leases for leases in seen)
    assert board.read(place).leases == {RENEWED, AGAIN}


BLANK = ROW._replace(before={"worker": "", "started": None})


def test_row_in_which_nothing_stood_is_named_once_that_was_told():
    ours, theirs = Board(2, ["a", "b"]), Board(2, ["a", "b"])
    theirs._cells = ours._cells  # as in two processes
    assert not ours.can_name(BLANK)
    told = ours.new_blank(BLANK)
    assert ours.new_blank(BLANK) is None
    assert ours.can_name(BLANK)
    place = ours.take(1, CLAIM, "b", BLANK)
    assert theirs.read(place).row is None  # it was not told in time
    theirs.learn(told)
    assert theirs.read(place).row == BLANK
    ours.free(place)
    theirs_again = theirs.read(ours.take(2, CLAIM, "b", ROW))
    assert theirs_again.row == ROW


def test_each_kind_of_nothing_has_a_number_and_there_are_not_too_many(monkeypatch):
    board = Board(1, ["a", "b"])
    other = ROW._replace(before={"worker": None, "started": None})
    assert [board.new_blank(BLANK).number, board.new_blank(other).number] == [1, 2]
    assert board.new_blank(ROW._replace(before={"worker": []})) is None  # which has no hash
    assert board.new_blank(ROW._replace(before={"worker": "x"})) is None
    assert board.new_blank(ROW) is None
    monkeypatch.setattr("modelqueue.worker.board._MOST_BLANKS", 2)
    third = ROW._replace(before={"worker": 0})
    assert board.new_blank(third) is None
    assert not board.can_name(third)


@pytest.mark.parametrize("row", [ROW._replace(pk="5"), ROW._replace(key=2**63), ROW._replace(pk=True), BLANK])
def test_task_that_integers_can_not_name_has_to_be_named_elsewhere(row):
    board = Board(1, ["a", "b"])
    assert not board.can_name(row)
    note = board.read(board.take(4, CLAIM, "b", None))
    assert (note.number, note.leases, note.queue, note.row) == (4, {CLAIM}, None, None)
