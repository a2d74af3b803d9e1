"""Real workers, started by the command as a user does, on the databases of the running test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time

from tests.processes import ROOT, environment, wait_until

#: Without what is for pages, see `tests.settings`.
LEAN = {"MODELQUEUE_TEST_LEAN": "1"}


class Worker:
    """One started ``manage.py modelqueue worker``, in a process group of its own."""

    def __init__(self, *arguments, launcher=(), databases=None, variables=None):
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `close`)
        self.process = subprocess.Popen(
            [*launcher, sys.executable, "-m", "django", "modelqueue", "worker", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=without_buffer_switch(environment(databases) | LEAN | (variables or {})),
            start_new_session=True,
        )
        self.pid = self.process.pid

    @property
    def output(self):
        self._output.seek(0)
        return self._output.read()

    def send(self, number):
        self.process.send_signal(number)

    def stop(self, number=signal.SIGTERM, timeout=60):
        """Stop it; return the exit code and the seconds that it took."""
        began = time.monotonic()
        self.send(number)
        return self.process.wait(timeout), time.monotonic() - began

    def members(self, word="", parent=None):
        """The pids of its processes that are not gone: all, with a word in their command, of a parent."""
        listed = subprocess.run(
            ["ps", "-wweo", "pid=,ppid=,pgid=,stat=,args="], capture_output=True, text=True, check=True
        )
        rows = [line.split(None, 4) for line in listed.stdout.splitlines()]
        return [
            int(pid)
            for pid, above, group, state, command in rows
            if int(group) == self.pid
            and "Z" not in state
            and word in command
            and parent in (None, int(above))
        ]

    @property
    def fork_server(self):
        """The process whose parent is the supervisor; those that it has made call themselves the same."""
        found = self.members("multiprocessing.forkserver", parent=self.pid)
        return found[0] if found else 0

    def kill_group(self):
        os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()

    def close(self):
        if self.members():
            os.killpg(self.pid, signal.SIGKILL)
            wait_until(is_gone(self))  # until then they may hold a lock
        self.process.wait()
        self._output.close()


class Workers:
    """Starts workers, and leaves none of them behind."""

    def __init__(self):
        self._started = []

    def start(self, *arguments, **options):
        worker = Worker(*arguments, **options)
        self._started.append(worker)
        return worker

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for worker in self._started:
            worker.close()


def without_buffer_switch(variables):
    return {name: value for name, value in variables.items() if name != "PYTHONUNBUFFERED"}


def is_gone(worker):
    return lambda: not worker.members()


__all__ = ["Worker", "Workers", "is_gone", "wait_until"]
