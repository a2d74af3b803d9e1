"""Django's own tests of its task API, with our backend in place of those that Django brings.

    python -m tests.task_backend.django_suite                  on SQLite
    python -m tests.task_backend.django_suite --db postgres

They are no part of an installed Django: pip fetches the source archive of just that version into
``build/django``, once. Immediate runs a task in `enqueue`, and Dummy keeps a list of tasks; the two classes
below do the same with rows, by what everybody may call. Then the tests run once more, as they are, in a
project that has our app.

A case passes or stands in LEFT_OUT with its reason. One that does neither fails the run, as does one that
stands there and passes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import unittest
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import django

from tests import servers

FOLDER = Path(__file__).parent.parent.parent / "build" / "django"
IMMEDIATE = "django.tasks.backends.immediate.ImmediateBackend"
DUMMY = "django.tasks.backends.dummy.DummyBackend"

_FETCHED = "Results can be fetched and refreshed; Immediate is asserted to refuse that."
_IN_COROUTINE = (
    "Calls `get_result` or `refresh` from within a coroutine, where Django allows no question to a database; "
    "`aget_result` and `arefresh` are for that."
)
_LIST = "Changes a result in the list of Dummy, and refreshes it from there; here results are rows."
#: By module, class and case.
LEFT_OUT = {
    "test_immediate_backend.ImmediateBackendTestCase.test_cannot_get_result": _FETCHED,
    "test_immediate_backend.ImmediateBackendTestCase.test_cannot_refresh_result": _FETCHED,
    "test_immediate_backend.ImmediateBackendTestCase.test_cannot_pass_run_after": (
        "Tasks can be deferred; Immediate is asserted to refuse that."
    ),
    "test_dummy_backend.DummyBackendTestCase.test_refresh_result": _LIST,
    "test_dummy_backend.DummyBackendTestCase.test_refresh_result_async": _LIST,
    "test_dummy_backend.DummyBackendTestCase.test_get_missing_result": _IN_COROUTINE,
    "test_tasks.TaskTestCase.test_get_missing_result": _IN_COROUTINE,
    "test_tasks.TaskTestCase.test_refresh_result": _IN_COROUTINE,
}


class Unavailable(Exception):  # noqa: N818  (not an error: there may be no network)
    """The tests can not be had here; the message says why."""


@dataclass(frozen=True)
class Group:
    """A module of tests, and what its backends are."""

    module: str
    backend: str
    is_ours: bool


def groups() -> list[Group]:
    ours = [
        Group("test_immediate_backend", "ModelQueueBackend for Immediate", True),
        Group("test_dummy_backend", "ModelQueueBackend for Dummy", True),
        Group("test_tasks", "ModelQueueBackend for both", True),
    ]
    plain = ["test_immediate_backend", "test_dummy_backend", "test_tasks", "test_custom_backend"]
    return ours + [Group(module, "Django's, beside our app", False) for module in plain]


@dataclass
class Row:
    """What came of a group."""

    group: Group
    cases: list[str] = field(default_factory=list)
    #: Why each case has not passed.
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> list[str]:
        return [case for case in self.cases if case not in self.failed]

    @property
    def left_out(self) -> list[str]:
        return [case for case in self.cases if self.group.is_ours and case in LEFT_OUT]

    @property
    def wrong(self) -> list[str]:
        found = [
            f"{self.group.backend}: {case} has failed.\n{text}"
            for case, text in self.failed.items()
            if case not in self.left_out
        ]
        return found + [
            f"{self.group.backend}: {case} passes, and is in LEFT_OUT all the same."
            for case in self.left_out
            if case not in self.failed
        ]


# The archive


def tests_of_django() -> Path:
    """Return a folder with Django's package of tests ``tasks``; fetch it where it is not there yet.

    Raises:
        Unavailable: this Django has no task API, or its archive can not be fetched.
    """
    if django.VERSION < (6, 0):
        raise Unavailable(f"Django {django.__version__} has no task API of its own; 6.0 has.")
    folder = FOLDER / django.__version__
    if not (folder / "tasks").is_dir():
        unpack(archive(), folder)
    return folder


def archive() -> Path:
    """Return the source archive of the installed Django; pip has compared its hash with that of the index.

    Raises:
        Unavailable: it can not be fetched.
    """
    name = f"django-{django.__version__}.tar.gz"
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (FOLDER / name).exists():
        with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
            download(Path(temporary))
            (found,) = Path(temporary).glob("*.tar.gz")
            found.replace(FOLDER / name)
    return FOLDER / name


def download(folder: Path) -> None:
    command = [
        "download",
        "--no-deps",
        "--no-binary=:all:",
        f"--dest={folder}",
        f"django=={django.__version__}",
    ]
    try:
        done = subprocess.run([*pip(), *command], capture_output=True, text=True, check=False, timeout=240)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"the index does not answer: {error}") from error
    if done.returncode:
        raise Unavailable(
            f"pip can not fetch it: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}"
        )


def pip() -> list[str]:
    """Return how to call pip: that of this environment, or else of the Python that it was made with."""
    if find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    base = getattr(sys, "_base_executable", sys.executable)
    known = subprocess.run([base, "-m", "pip", "--version"], capture_output=True, check=False)
    if known.returncode:
        raise Unavailable("there is no pip to fetch it with")
    return [base, "-m", "pip"]


def unpack(path: Path, folder: Path) -> None:
    """Unpack the tests, in one step for whoever looks."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary, tarfile.open(path) as packed:
        for member in packed:
            _, _, inside = member.name.partition("/")
            if inside.startswith("tests/tasks/") and inside.endswith(".py") and member.isfile():
                source = packed.extractfile(member)
                assert source is not None
                target = Path(temporary) / "made" / Path(inside).relative_to("tests")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())
        with contextlib.suppress(OSError):  # somebody else was faster
            (Path(temporary) / "made").rename(folder)


# The backends


def stand_ins() -> dict[str, type]:
    """Return what is in place of Django's backends, by their paths."""
    from modelqueue.task_backend import ModelQueueBackend
    from modelqueue.task_backend.models import QueuedTask
    from modelqueue.task_backend.queues import queue_name, task_queues

    class InPlaceOfImmediate(ModelQueueBackend):
        """Runs each task once when it is enqueued, by its queue."""

        def __init__(self, alias: str, params: dict[str, Any]) -> None:
            super().__init__(alias, params)
            self.parsed = replace(self.parsed, retry=0)

        def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
            result = super().enqueue(task, args, kwargs)
            mine = {queue_name(self.alias, name) for name in self.queues or [None]}
            for queue in task_queues():
                if queue.name in mine:
                    with contextlib.suppress(SystemExit):  # which is recorded, and ends no worker either
                        queue.drain()
            result.refresh()
            return result

    class InPlaceOfDummy(ModelQueueBackend):
        """Shows the results of all tasks."""

        @property
        def results(self) -> list[Any]:
            return outside_coroutines(self._results)

        def _results(self) -> list[Any]:
            rows = QueuedTask.objects.filter(backend_name=self.alias).order_by("pk")
            return [self.get_result(row.result_id) for row in rows]

        def clear(self) -> None:
            QueuedTask.objects.filter(backend_name=self.alias).delete()

    return {IMMEDIATE: InPlaceOfImmediate, DUMMY: InPlaceOfDummy}


def outside_coroutines(function: Any) -> Any:
    """Call a function that asks the database, in another thread where this one runs a coroutine."""
    from django.db import connections

    def call() -> Any:
        try:
            return function()
        finally:
            connections.close_all()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


# The run


def run() -> dict[str, Any]:
    """Run all of them on the databases as they are; return the report, and what is wrong."""
    folder = tests_of_django()
    rows = [row for ours in (True, False) for row in run_groups(folder, ours)]
    wrong = [text for row in rows for text in row.wrong]
    known = {case for row in rows for case in row.left_out}
    wrong += [f"There is no case {case}, but it is in LEFT_OUT." for case in LEFT_OUT if case not in known]
    return {"report": report(rows), "wrong": wrong}


def run_groups(folder: Path, are_ours: bool) -> Iterator[Row]:
    """Run those with our backend in place of Django's, or those without."""
    from django.test import override_settings

    with contextlib.ExitStack() as stack:
        for path, backend in stand_ins().items() if are_ours else ():
            stack.enter_context(mock.patch(path, backend))
        # What Django's own settings have: the tests' tasks are made for it.
        stack.enter_context(override_settings(TASKS={"default": {"BACKEND": IMMEDIATE}}))
        stack.enter_context(fresh_modules(folder))
        for group in groups():
            if group.is_ours == are_ours:
                yield run_group(group)


@contextlib.contextmanager
def fresh_modules(folder: Path) -> Iterator[None]:
    """Import the tests anew: they have taken the names of the backends from where these are replaced."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tasks"]:
            del sys.modules[name]

    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        forget()
        try:
            yield
        finally:
            forget()


def run_group(group: Group) -> Row:
    module = importlib.import_module(f"tasks.{group.module}")
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    row = Row(group)
    for case in cases_of(suite):
        row.cases.append(name_of(case))
        if group.is_ours:  # which writes to the database, where Django's do not
            type(case).databases = {"default"}
    result = unittest.TestResult()
    suite.run(result)
    for case, text in [*result.errors, *result.failures, *result.skipped]:
        # Where a class could not be set up, that stands for none of its cases.
        row.failed.setdefault(name_of(getattr(case, "test_case", case)), text)
    for case in result.unexpectedSuccesses:
        row.failed[name_of(case)] = "It was expected to fail."
    return row


def cases_of(suite: unittest.TestSuite) -> Iterator[Any]:
    for one in suite:
        if isinstance(one, unittest.TestSuite):
            yield from cases_of(one)
        else:
            yield one


def name_of(case: Any) -> str:
    name: str = case.id()
    return name.removeprefix("tasks.")


def report(rows: list[Row]) -> str:
    """Return what came of it, as a section of a page."""
    lines = [
        f"### Django {django.__version__}",
        "",
        "| module | backend | cases run | passed | left out |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        counts = len(row.cases), len(set(row.passed) - set(row.left_out)), len(row.left_out)
        lines.append(f"| `{row.group.module}` | {row.group.backend} | {' | '.join(map(str, counts))} |")
    lines += ["", "| left out | why |", "|---|---|"]
    for case in [case for row in rows for case in row.left_out]:
        module, _, name = case.split(".")
        lines.append(f"| `{module}`: `{name}` | {LEFT_OUT[case]} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.task_backend.django_suite", description=__doc__)
    parser.add_argument("--db", default="sqlite", help=", ".join(servers.ALL))
    name = parser.parse_args().db
    with servers.start(name) as server, tempfile.TemporaryDirectory() as folder:
        databases = servers.databases(server)
        if name == "sqlite":  # in a file, as other threads have to see it
            for alias, database in databases.items():
                database["TEST"] = {"NAME": str(Path(folder) / f"{alias}.sqlite3")}
        os.environ |= {
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "MODELQUEUE_TEST_DATABASES": json.dumps(databases),
        }
        django.setup()
        done = run_on_databases_of_its_own()
    print(done["report"])
    print(*done["wrong"], sep="\n\n", file=sys.stderr)
    return int(bool(done["wrong"]))


def run_on_databases_of_its_own() -> dict[str, Any]:
    from django.test.utils import (
        setup_databases,
        setup_test_environment,
        teardown_databases,
        teardown_test_environment,
    )

    logging.getLogger("modelqueue").addHandler(logging.NullHandler())  # the tests let tasks fail
    setup_test_environment()
    made = setup_databases(verbosity=0, interactive=False)
    try:
        return run()
    finally:
        teardown_databases(made, verbosity=0)
        teardown_test_environment()


if __name__ == "__main__":
    sys.exit(main())
