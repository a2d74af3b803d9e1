"""Real processes on the database of the running test, and waiting for what they do.

A test asks for the fixture `processes`::

    def drain(name): ...                       # at module level: the process imports it

    def test_two_workers(processes):
        workers = [processes.start(drain, "a"), processes.start(drain, "b")]
        wait_until(lambda: Task.objects.filter(status__state="working").exists())
        workers[0].kill()                      # SIGKILL
        assert workers[1].result() == ...      # waits for its end; what `drain` returned, by way of JSON
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent


def environment(databases: dict[str, Any] | None = None) -> dict[str, str]:
    """The environment in which a process with `tests.settings` works on these databases.

    Without any, on those of the running test.
    """
    from django.db import connections

    if databases is None:
        databases = {alias: connections[alias].settings_dict for alias in connections}
    # Not under coverage: other tests cover what these processes do, which would take twice as long.
    inherited = {name: os.environ[name] for name in os.environ if not name.startswith("COVERAGE_PROCESS_")}
    return inherited | {
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "MODELQUEUE_TEST_DATABASES": json.dumps(databases, default=str),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    }


def make_tables(*names: str) -> None:
    """Make the database of a server of one's own, with the tables of these models of the test app."""
    from django.apps import apps
    from django.db import connection

    with connection._nodb_cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {connection.settings_dict['NAME']}")
    with connection.schema_editor() as editor:
        for name in names:
            editor.create_model(apps.get_model("testapp", name))


def wait_until(condition: Callable[[], Any], timeout: float = 60) -> Any:
    """Wait until the condition holds and return what it gave; the deadline is for tests that fail."""
    began = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - began
        if waited > timeout:
            raise TimeoutError(f"not within {timeout} s: {condition}")
        time.sleep(min(max(0.01, waited / 20), 0.05))  # many wait side by side, and each look takes its time
    return value


class Process:
    """One started function."""

    def __init__(
        self, databases: dict[str, Any] | None, function: Callable[..., Any], *arguments: Any
    ) -> None:
        # Files, since nobody reads a pipe while the process runs.
        self._output = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115  (closed by `close`)
        self._errors = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
        call = f"{function.__module__}:{function.__qualname__}", json.dumps(arguments)
        self._process: subprocess.Popen[bytes] | Forked
        if databases is None and "forkserver" in multiprocessing.get_all_start_methods():
            self._process = Forked(self._output.name, self._errors.name, *call)
        else:
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", __name__, *call],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._errors,
                cwd=ROOT,
                env=environment(databases),
            )
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        self._process.kill()
        self._process.wait()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float = 120) -> int:
        """Wait for its end and return the exit code; if that takes too long, show where it is."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)  # has `faulthandler` print the stacks
            self._process.wait()
            raise TimeoutError(f"still at work after {timeout} s:\n{self.errors}") from None

    @property
    def errors(self) -> str:
        """What it has written to its standard error so far."""
        self._errors.seek(0)
        return self._errors.read()

    def result(self, timeout: float = 120) -> Any:
        """Wait for its end and return what the function returned; raise its traceback where it failed."""
        if code := self.wait(timeout):
            raise RuntimeError(f"the process ended with code {code}:\n{self.errors}")
        self._output.seek(0)
        return json.loads(self._output.read().splitlines()[-1])

    def close(self) -> None:
        self.kill()
        self._output.close()
        self._errors.close()


class Forked:
    """Like `subprocess.Popen`: a process on the databases of the running test, at a tenth of the cost.

    It is forked from one that has set up Django, and has no connections.
    """

    def __init__(self, *arguments: str) -> None:
        from multiprocessing import forkserver  # which Windows lacks

        variables = environment()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.nursery"])
        with mock.patch.dict(os.environ, variables, clear=True):
            forkserver.ensure_running()
        databases = variables["MODELQUEUE_TEST_DATABASES"]
        self._process = context.Process(target=call, args=(databases, *arguments))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def call(databases: str, output: str, errors: str, name: str, arguments: str) -> None:
    """Do in a forked process what `main` does in one that was started."""
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    faulthandler.enable()
    os.environ |= {"DJANGO_SETTINGS_MODULE": "tests.settings", "MODELQUEUE_TEST_DATABASES": databases}
    main(name, arguments)


class Processes:
    """Starts processes, and at the end leaves none of them behind.

    Args:
        databases: Django's DATABASES for them, where these are not those of the running test.
    """

    def __init__(self, databases: dict[str, Any] | None = None) -> None:
        self._databases = databases
        self._started: list[Process] = []

    def start(self, function: Callable[..., Any], *arguments: Any) -> Process:
        """Call a function of a module, with arguments that JSON can carry, in a process of its own."""
        process = Process(self._databases, function, *arguments)
        self._started.append(process)
        return process

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._started:
            process.close()


def main(name: str, arguments: str) -> None:
    import django

    django.setup()
    module, _, function = name.partition(":")
    value = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    print(json.dumps(value))


if __name__ == "__main__":
    main(*sys.argv[1:])
