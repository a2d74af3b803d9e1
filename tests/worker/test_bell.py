"""The bell of a process: it wakes at once, says of which queues, and makes nobody wait."""

import socket
import threading
import time

import pytest

from modelqueue.worker.bell import Bell
from modelqueue.worker.system import context


def listen(bell, started, heard):
    """Be a process that says of which queues it has heard."""
    started.set()
    while "end" not in (names := bell.heard()):
        if names:
            heard.send(names)
        bell.wait(60)


def test_supervisor_wakes_a_process_and_says_of_which_queues():
    system, bell = context(), Bell(["a", "b", "end"])
    started, (reader, writer) = system.Event(), system.Pipe(duplex=False)
    process = system.Process(target=listen, args=(bell, started, writer))
    process.start()
    assert started.wait(60)
    for names in (["b"], ["a", "b"]):
        bell.ring([*names, "unknown"])
        assert reader.poll(60)
        heard = set(reader.recv())
        while heard != set(names):  # between the two it may have woken up
            heard |= set(reader.recv())
    bell.ring(["end"])
    process.join(60)
    assert process.exitcode == 0
    bell.leave()


def test_ring_before_the_wait_is_not_missed():
    bell = Bell(["a"])
    bell.ring(["a"])
    bell.wait(None)
    assert bell.heard() == ["a"]
    assert bell.heard() == []
    began = time.monotonic()
    bell.wait(0.02)
    assert time.monotonic() - began >= 0.02


def test_bell_that_nobody_hears_makes_nobody_wait():
    bell = Bell(["a"])
    ringing = threading.Thread(target=lambda: [bell.ring(["a"]) for _ in range(100_000)], daemon=True)
    ringing.start()
    ringing.join(60)
    assert not ringing.is_alive()
    assert bell.heard() == ["a"]
    bell.leave()  # of a dead process
    bell.ring(["a"])


def test_bell_is_heard_where_there_is_no_poll(monkeypatch):
    monkeypatch.delattr("select.poll")
    bell = Bell([])
    bell.ring()
    bell.wait(None)
    began = time.monotonic()
    bell.wait(0.02)
    assert time.monotonic() - began >= 0.02


@pytest.mark.parametrize("has_poll", [True, False])
def test_files_are_waited_for_as_long_as_they_are_given(has_poll, monkeypatch):
    if not has_poll:
        monkeypatch.delattr("select.poll", raising=False)
    bell = Bell(["a"])
    (first, writer), (second, other) = socket.socketpair(), socket.socketpair()
    assert takes_its_time(bell, [first, second])
    writer.send(b".")
    assert not takes_its_time(bell, [first, second])
    assert takes_its_time(bell, [second])
    assert takes_its_time(bell)
    assert not takes_its_time(bell, [first])  # nobody has read it
    bell.ring(["a"])
    assert not takes_its_time(bell, [second])
    assert takes_its_time(bell, [second])  # that was heard
    assert bell.heard() == ["a"]
    for end in first, writer, second, other:
        end.close()


def takes_its_time(bell, *files):
    began = time.monotonic()
    bell.wait(0.02, *files)
    return time.monotonic() - began >= 0.02
