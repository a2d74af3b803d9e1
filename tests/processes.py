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

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        # After it what this process was given, so that they run the same code.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


def wait_until(condition: Callable[[], Any], timeout: float = 60) -> Any:
    """Wait until the condition holds and return what it gave; the deadline is for tests that fail."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout} s: {condition}")
        time.sleep(0.01)
    return value


class Process:
    """One started function."""

    def __init__(
        self, databases: dict[str, Any] | None, function: Callable[..., Any], *arguments: Any
    ) -> None:
        # Files, since nobody reads a pipe while the process runs.
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `close`)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        name = f"{function.__module__}:{function.__qualname__}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, name, json.dumps(arguments)],
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
        """Wait for its end and return the exit code."""
        return self._process.wait(timeout)

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
