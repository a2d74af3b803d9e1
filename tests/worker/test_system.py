"""What differs between operating systems: signals, memory, how processes end."""

import builtins
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelqueue.worker import system
from tests.processes import wait_until

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "has vanished"),
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-signal.SIGTERM, "was killed by SIGTERM"),
        (-9, "was killed by SIGKILL, by somebody or because memory ran out"),
        (-200, "was killed by signal 200"),
    ],
)
def test_end_of_a_process_in_words(code, words):
    assert system.describe_exit(code) == words


def test_death_for_want_of_memory_in_words():
    assert system.describe_exit(-9, is_out_of_memory=True) == "was killed by SIGKILL, as memory ran out"
    assert system.describe_exit(-15, is_out_of_memory=True) == "was killed by SIGTERM"


@pytest.fixture
def files(monkeypatch):
    """Play the files of the system that are read; those that are not there can not be."""
    files = {}

    def read_text(path, encoding):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    return files


def test_kills_for_want_of_memory_are_counted_by_the_control_group(files):
    files["/proc/self/cgroup"] = "12:cpuset:/old\n0::/workers/one\n"
    events = "/sys/fs/cgroup/workers/one/memory.events"
    files[events] = "low 0\noom 3\noom_kill 2\noom_group_kill 0\n"
    memory = system.OutOfMemory()
    assert not memory.has_killed()
    files[events] = "low 0\noom 4\noom_kill 3\n"
    assert memory.has_killed()
    assert not memory.has_killed()


@pytest.mark.parametrize(
    "there",
    [
        {},
        {"/proc/self/cgroup": "12:cpuset:/old\n"},
        {"/proc/self/cgroup": "0::/\n"},
        {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.events": "low 0\n"},
    ],
)
def test_kills_for_want_of_memory_are_not_known_everywhere(there, files):
    files.update(there)
    assert not system.OutOfMemory().has_killed()


def test_memory_of_this_process():
    assert 10 < system.memory() < 10_000


def test_memory_is_the_peak_where_the_system_tells_no_more(monkeypatch):
    def no_file(*arguments, **options):
        raise FileNotFoundError

    monkeypatch.setattr(builtins, "open", no_file)
    assert 10 < system.memory() < 10_000
    monkeypatch.setattr(sys, "platform", "darwin")  # which counts in bytes
    assert system.memory() < 10
    monkeypatch.setitem(sys.modules, "resource", None)
    assert system.memory() is None


def test_process_is_alive_until_it_is_gone(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert system.is_alive(child.pid)
    child.communicate(b"\n")
    assert not system.is_alive(child.pid)

    def forbidden(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)  # of somebody else
    assert system.is_alive(1)


@posix
def test_child_that_has_ended_is_not_alive_and_leaves_no_zombie():
    """As one that a container's first process inherits: nobody else waits for it."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    os.kill(child.pid, 0)  # for the system it is there still
    assert not system.is_alive(child.pid)
    with pytest.raises(ChildProcessError):
        os.waitpid(child.pid, os.WNOHANG)
    child.wait()


def test_process_ends_in_time_whatever_keeps_it_and_its_log_is_complete(monkeypatch):
    calls = []
    monkeypatch.setattr(logging, "shutdown", lambda: calls.append("log"))
    monkeypatch.setattr(os, "_exit", lambda code: calls.append(("exit", code, time.monotonic())))
    began = time.monotonic()
    system.end_without_fail(0.2)
    assert calls == []  # this thread goes on
    wait_until(lambda: len(calls) == 2)
    assert calls[0] == "log"
    _, code, ended = calls[1]
    assert code == 0
    assert ended - began >= 0.2


def test_processes_are_spawned_where_there_is_no_fork_server(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert system.context().get_start_method() == "spawn"
    monkeypatch.setitem(sys.modules, "multiprocessing.resource_tracker", None)
    monkeypatch.delattr(multiprocessing, "resource_tracker", raising=False)
    with system.stop_signals_blocked():
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


@posix
def test_stop_signals_are_handled_and_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    calls = []
    restore = system.on_stop_signals(lambda: calls.append(1))
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert calls == [1, 1]
        system.leave_stop_signals_to_the_supervisor()
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == [1, 1]
        with system.stop_signals_blocked():
            assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGINT, signal.SIGTERM}
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        restore()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
