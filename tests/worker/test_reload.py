"""The worker begins anew when code of the project changes. In a project of its own, which can be changed."""

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from tests.processes import ROOT, wait_until

FILES = {
    "settings.py": """
INSTALLED_APPS = ["modelqueue", "shop"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
SECRET_KEY = "x"
DEBUG = True
USE_TZ = True
""",
    "shop/__init__.py": "",
    "shop/models.py": """
import modelqueue
from django.db import models

class Order(models.Model):
    note = models.CharField(max_length=10, default="")
    status = modelqueue.StatusField()
""",
    "shop/queues.py": """
import modelqueue
from shop.models import Order

@modelqueue.queue(Order, "status")
def pack(order):
    order.note = "old"
""",
}


@pytest.mark.vendor("sqlite")
def test_changed_action_is_the_one_that_is_run(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    manage(tmp_path, "makemigrations", "shop").wait()
    manage(tmp_path, "migrate", "--skip-checks").wait()
    worker = manage(tmp_path, "modelqueue", "worker", "--poll", "0.1")
    try:
        assert note_of_a_new_order(tmp_path, 1) == "old"
        queues = tmp_path / "shop/queues.py"
        queues.write_text(queues.read_text().replace("old", "new"))
        wait_until(lambda: "changed, reloading" in (tmp_path / "output").read_text())
        assert note_of_a_new_order(tmp_path, 2) == "new"
    finally:
        os.killpg(worker.pid, signal.SIGINT)  # as Ctrl-C does
        worker.wait(30)
    assert (tmp_path / "output").read_text().count("Stopping: running tasks may end.") == 2
    wait_until(lambda: not members(worker.pid))


def manage(folder, *arguments):
    with (folder / "output").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "django", *arguments],
            cwd=folder,
            env=os.environ | {"DJANGO_SETTINGS_MODULE": "settings", "PYTHONPATH": f"{folder}:{ROOT / 'src'}"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def note_of_a_new_order(folder, pk):
    with closing(sqlite3.connect(folder / "db.sqlite3", isolation_level=None, timeout=20)) as connection:
        connection.execute(f"INSERT INTO shop_order (note, status) VALUES ('', 2{0:018d})")
        select = f"SELECT note FROM shop_order WHERE id = {pk} AND status >= 4{0:018d}"
        return wait_until(lambda: connection.execute(select).fetchone())[0]


def members(group):
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [state for number, state in rows if int(number) == group and "Z" not in state]
