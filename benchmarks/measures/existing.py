"""How long the steps of the how-to "Add a queue to an existing table" take, and hold up the application.

The page's own files and commands are run, in a project of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.environments import ROOT
from benchmarks.figures import Table
from tests import pages

_RULE = (
    'The steps of the how-to "Add a queue to an existing table" on a table of {rows:,} rows, on PostgreSQL. '
    "Meanwhile another connection updates one row after the other: the longest of these updates tells how "
    "long a step has held up the application. Before each step stands the line of its block in the page."
)

_PAGE = pages.DOCS / "howto" / "existing-table.md"
_NAME = "modelqueue_existing_table"

_SETTINGS = """
import json, os
DATABASES = {"default": json.loads(os.environ["EXISTING_TABLE"])}
INSTALLED_APPS = ["modelqueue", "photos"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
SECRET_KEY = "benchmark"
USE_TZ = True
"""
_MANAGE = """
import os, sys
from django.core.management import execute_from_command_line
os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
execute_from_command_line(sys.argv)
"""
_CLAIM = """
import time
import modelqueue
from photos.models import Photo
def action(photo):
    photo.size = len(photo.path)
times = []
for _ in range(200):
    started = time.perf_counter()
    task = modelqueue.run(Photo.objects.all(), "status", action)
    times.append(time.perf_counter() - started)
    assert task.status.state.name == "finished"
started = time.perf_counter()
counts = modelqueue.Status.tally(Photo.objects.all(), "status")
tally = time.perf_counter() - started
print(sorted(times)[100], tally, counts["waiting"] + counts["finished"])
"""


def measure(bench: Bench) -> Iterator[Table]:
    rows = bench.options.history[-1]
    steps = go_through(bench.postgres().server, rows)
    yield Table(
        "existing",
        "A queue on an existing table",
        _RULE.format(rows=rows),
        ("step", "seconds", "ms of the longest update"),
        [(step, seconds, longest * 1000) for step, (seconds, longest) in steps.items()],
    )


def go_through(server: dict[str, Any], rows: int) -> dict[str, tuple[float, float]]:
    """Go through the steps of the page; return the seconds of each and of the longest update meanwhile."""
    import psycopg

    def connect(name: str = _NAME) -> Any:
        return psycopg.connect(host=server["HOST"], user=server["USER"], dbname=name, autocommit=True)

    with connect("postgres") as admin:
        admin.execute(f"CREATE DATABASE {_NAME}")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            return _measure(Path(temporary), {**server, "NAME": _NAME}, connect, rows)
    finally:
        with connect("postgres") as admin:
            admin.execute(f"DROP DATABASE {_NAME} WITH (FORCE)")


def _measure(
    folder: Path, database: dict[str, Any], connect: Callable[[], Any], rows: int
) -> dict[str, tuple[float, float]]:
    environment = os.environ | {
        "EXISTING_TABLE": json.dumps(database),
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "src")]),
        "DJANGO_SETTINGS_MODULE": "settings",
    }

    def manage(*arguments: str) -> str:
        command = [sys.executable, "manage.py", *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, check=True, capture_output=True, text=True
        ).stdout

    results = {}

    def timed(step: str, *arguments: str) -> str:
        with _Bystander(connect, rows) as bystander:
            started = time.perf_counter()
            output = manage(*arguments)
            results[step] = time.perf_counter() - started, bystander.longest
        return output

    (folder / "settings.py").write_text(_SETTINGS)
    (folder / "manage.py").write_text(_MANAGE)
    for package in ("photos", "photos/migrations", "photos/management", "photos/management/commands"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()

    steps = iter(pages.blocks(_PAGE, "python", "console"))
    block = next(steps)
    block.write(folder)  # the model as it was
    manage("makemigrations", "photos")
    manage("migrate")
    with connect() as connection:
        connection.execute(
            "INSERT INTO photos_photo (path) SELECT '/photos/' || n || '.jpg' FROM generate_series(1, %s) n",
            [rows],
        )
        connection.execute("VACUUM ANALYZE photos_photo")
    results["an empty manage.py"] = 0.0, 0.0
    timed("an empty manage.py", "migrate", "--plan")
    for block in steps:
        if block.file:
            block.write(folder)
            continue
        for line in block.text.splitlines():
            arguments = line.removeprefix("$ python manage.py ").split()
            timed(f"{block.line}: {' '.join(arguments)}", *arguments)
    with connect() as connection:
        (left,) = connection.execute("SELECT count(*) FROM photos_photo WHERE status IS NULL").fetchone()
        assert left == 0, f"{left} rows are not enqueued"
        (valid,) = connection.execute(
            "SELECT bool_and(indisvalid) FROM pg_index WHERE indexrelid = 'photo_status'::regclass"
        ).fetchone()
        assert valid
    (folder / "claim.py").write_text(_CLAIM)
    median, tally, total = manage("shell", "-v", "0", "-c", "import claim").split()
    assert int(total) == rows
    results["claim, action and outcome of one task, median of 200"] = float(median), 0.0
    results["tally"] = float(tally), 0.0
    assert "No changes detected" in manage("makemigrations", "photos")
    return results


class _Bystander:
    """Another connection that updates one row after the other, and notes how long that took."""

    def __init__(self, connect: Callable[[], Any], rows: int) -> None:
        self._stopped = threading.Event()
        self._connect, self._rows = connect, rows
        self._thread = threading.Thread(target=self._run)
        self.longest = 0.0

    def _run(self) -> None:
        with self._connect() as connection:
            pk = 0
            while not self._stopped.wait(0.005):
                pk = pk % self._rows + 997
                started = time.perf_counter()
                connection.execute("UPDATE photos_photo SET path = path WHERE id = %s", [pk])
                self.longest = max(self.longest, time.perf_counter() - started)

    def __enter__(self) -> _Bystander:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()
