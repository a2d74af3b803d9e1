"""The worker begins anew when code of the project changes, and stops in order all the same.

In a project of its own, which can be changed; the parts of it, without.
"""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from types import SimpleNamespace

import pytest
from django.utils import autoreload

from modelqueue.management import reload
from modelqueue.worker.supervisor import FAULT
from tests.processes import ROOT, wait_until

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")

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
import pathlib
import subprocess
import sys
import time
import modelqueue
from shop.models import Order

@modelqueue.queue(Order, "status")
def pack(order):
    if order.note == "long":
        pathlib.Path("begun").touch()
        while not pathlib.Path("ready").exists():
            time.sleep(0.05)
    elif order.note == "program":
        program = "import os, sys; print(sys.stdin.buffer.read(), os.environ.get('RUN_MAIN', 'no'))"
        order.note = subprocess.check_output([sys.executable, "-c", program], text=True).strip()
    else:
        order.note = "old"
""",
}

#: As `migrate` makes it, which takes as long as the test.
TABLE = (
    "CREATE TABLE shop_order (id integer PRIMARY KEY AUTOINCREMENT, note varchar(10), status bigint NOT NULL)"
)


@pytest.fixture
def project(tmp_path):
    """The folder of the project, with its table."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    execute(tmp_path, TABLE)
    return tmp_path


@pytest.fixture
def start(project):
    """Start a worker that reloads; nothing of it is left after the test."""
    started = []

    def start(*options):
        started.append(manage(project, "modelqueue", "worker", "--poll", "0.1", *options))
        return started[-1]

    yield start
    for worker in started:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


@pytest.mark.vendor("sqlite")
def test_changed_action_is_the_one_that_is_run(project, start):
    worker = start()
    assert note_of_a_new_order(project, 1) == "old"
    queues = project / "shop/queues.py"
    queues.write_text(queues.read_text().replace("old", "new"))
    wait_until(lambda: "changed, reloading" in output(project))
    assert note_of_a_new_order(project, 2) == "new"
    os.killpg(worker.pid, signal.SIGINT)  # as Ctrl-C does
    assert worker.wait(30) == 0
    assert output(project).count("Stopping: running tasks may end within") == 2
    assert "Stopping now" not in output(project)
    wait_until(lambda: not members(worker.pid))


@pytest.mark.vendor("sqlite")
def test_program_of_an_action_gets_neither_the_requests_to_stop_nor_the_mark_of_the_child(project, start):
    worker = start()
    execute(project, f"INSERT INTO shop_order (note, status) VALUES ('program', 2{0:018d})")
    wait_until(lambda: order(project, 1) == ("b'' no", 4, 1))
    os.kill(worker.pid, signal.SIGTERM)
    assert worker.wait(30) == 0


@pytest.mark.vendor("sqlite")
def test_new_module_that_can_not_be_loaded_is_waited_for(project, start):
    worker = start()
    assert note_of_a_new_order(project, 1) == "old"
    queues = project / "shop/queues.py"
    new = project / "shop/notes.py"
    new.write_text("def half(")
    queues.write_text(queues.read_text().replace('"old"', "NOTE") + "\nfrom shop.notes import NOTE\n")
    wait_until(lambda: "The worker can not start again" in output(project))
    new.write_text("NOTE = 'mended'")
    assert note_of_a_new_order(project, 2) == "mended"
    os.kill(worker.pid, signal.SIGINT)
    assert worker.wait(30) == 0


@posix
def test_child_that_fails_when_it_has_served_again_is_not_waited_for(script):
    """The change was long ago."""
    log = script(
        """
if log.exists():
    sys.exit(4)
log.touch()
sys.exit(3)
"""
    )
    assert reload.run_children() == 1
    assert log.exists()


def test_file_that_is_gone_at_the_second_look_is_no_file_of_the_code(tmp_path, monkeypatch):
    code = tmp_path / "code.py"
    code.touch()
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/module.py").touch()
    monkeypatch.setattr(autoreload.StatReloader, "snapshot_files", lambda self: [(code, 1.0)])
    assert set(reload._files()) == {code, tmp_path / "new/module.py"}


@pytest.mark.vendor("sqlite")
def test_code_that_can_not_be_loaded_is_waited_for(project, start):
    worker = start()
    assert note_of_a_new_order(project, 1) == "old"
    queues = project / "shop/queues.py"
    text = queues.read_text()
    queues.write_text(text + "\ndef half(")
    wait_until(lambda: "The worker can not start again" in output(project))
    assert "SyntaxError" in output(project)
    queues.write_text(text.replace("old", "mended"))
    assert note_of_a_new_order(project, 2) == "mended"
    os.kill(worker.pid, signal.SIGINT)
    assert worker.wait(30) == 0


@posix
@pytest.mark.parametrize("ends_by", ["a change", "a signal"])
def test_child_that_fails_after_a_change_is_started_once_more(ends_by, script, monkeypatch, tmp_path, caplog):
    times = tmp_path / "times"
    script(
        f"""
with open({str(times)!r}, "a+") as file:
    file.write(".")
    file.flush()
    file.seek(0)
    count = len(file.read())
sys.exit({{1: 3, 2: 1, 3: 0}}[count])
"""
    )
    code = tmp_path / "code.py"
    looks = []

    def snapshot_files(reloader):
        looks.append(1)
        if len(looks) == 5:
            if ends_by == "a signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                return [(code, 2.0)]
        return [(code, 1.0)]

    monkeypatch.setattr(reload, "_LOOK", 0.01)
    monkeypatch.setattr(autoreload.StatReloader, "snapshot_files", snapshot_files)
    assert reload.run_children() == 0
    assert len(times.read_text()) == (3 if ends_by == "a change" else 2)
    assert "waits until the code changes" in caplog.text


@pytest.mark.vendor("sqlite")
@pytest.mark.parametrize(("number", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_running_action_may_end(number, send, project, start):
    """Stopped by Ctrl-C, which the whole group gets, or by who has started it."""
    worker = start()
    begin_long_order(project)
    send(worker.pid, number)
    wait_until(lambda: "Stopping: running tasks may end within" in output(project))
    time.sleep(0.5)  # Django's own parent would have killed it by now
    (project / "ready").touch()
    assert worker.wait(30) == 0
    assert order(project, 1) == ("long", 4, 1)
    assert "Stopping now" not in output(project)
    wait_until(lambda: not members(worker.pid))


@pytest.mark.vendor("sqlite")
def test_second_signal_ends_it_now_and_charges_nothing(project, start):
    worker = start("--grace", "60")
    begin_long_order(project)
    os.kill(worker.pid, signal.SIGTERM)
    wait_until(lambda: "Stopping: running tasks may end within" in output(project))
    os.kill(worker.pid, signal.SIGTERM)
    assert worker.wait(30) == 0
    assert order(project, 1) == ("long", 2, 0)
    wait_until(lambda: not members(worker.pid))


@pytest.mark.vendor("sqlite")
def test_nothing_stays_behind_when_the_parent_is_killed(project, start):
    worker = start("--grace", "0")
    begin_long_order(project)
    worker.kill()
    wait_until(lambda: members(worker.pid) == [])
    assert order(project, 1) == ("long", 2, 0)


def manage(folder, *arguments):
    with (folder / "output").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "django", *arguments],
            cwd=folder,
            env={
                **{name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
                "DJANGO_SETTINGS_MODULE": "settings",
                "PYTHONPATH": f"{folder}:{ROOT / 'src'}",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def output(folder):
    return (folder / "output").read_text()


def note_of_a_new_order(folder, pk):
    execute(folder, f"INSERT INTO shop_order (note, status) VALUES ('', 2{0:018d})")
    return wait_until(lambda: order(folder, pk)[1] == 4 and order(folder, pk))[0]


def begin_long_order(folder):
    """Make an order whose action lasts until there is the file "ready", and wait until it has begun."""
    execute(folder, f"INSERT INTO shop_order (note, status) VALUES ('long', 2{0:018d})")
    wait_until((folder / "begun").exists)


def order(folder, pk):
    """The note, the digit of the state and the attempts of an order."""
    ((note, status),) = execute(folder, f"SELECT note, status FROM shop_order WHERE id = {pk}")
    return note, status // 10**18, status % 10


def execute(folder, statement):
    with closing(sqlite3.connect(folder / "db.sqlite3", isolation_level=None, timeout=20)) as connection:
        return connection.execute(statement).fetchall()


def members(group):
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [state for number, state in rows if int(number) == group and "Z" not in state]


# The parts, in this process


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Say what the parent is to start: a text of Python, which finds the folder in its argument."""

    def script(text):
        path = tmp_path / "child.py"
        path.write_text(f"import os, pathlib, signal, sys, time\nlog = pathlib.Path(sys.argv[1])\n{text}")
        arguments = [sys.executable, str(path), str(tmp_path / "log")]
        monkeypatch.setattr(autoreload, "get_child_arguments", lambda: arguments)
        return tmp_path / "log"

    return script


@posix
@pytest.mark.parametrize(("end", "code"), [("sys.exit(0)", 0), ("os.kill(os.getpid(), 9)", 137)])
def test_child_is_started_anew_until_it_ends_for_another_reason(end, code, script):
    log = script(
        f"""
assert os.environ["RUN_MAIN"] == "true"
if log.exists():
    {end}
log.touch()
sys.exit(3)
"""
    )
    before = signal.getsignal(signal.SIGTERM)
    assert reload.run_children() == code
    assert log.exists()
    assert signal.getsignal(signal.SIGTERM) is before


@posix
def test_each_signal_is_passed_on_once_and_ends_the_restarts(script):
    log = script(
        """
for number in (signal.SIGTERM, signal.SIGINT):
    os.kill(os.getppid(), number)
    with log.open("a") as file:
        file.write(repr(os.read(0, 1)))
sys.exit(3)
"""
    )
    assert reload.run_children() == 0
    assert log.read_text() == "b'.'b'.'"


@posix
def test_child_that_does_not_listen_any_more_is_waited_for(script):
    script("os.close(0); os.kill(os.getppid(), signal.SIGTERM); time.sleep(0.5); sys.exit(5)")
    assert reload.run_children() == 5


class Supervisor:
    """Counts what it is told, and ends when it was so often."""

    def __init__(self, until):
        self.stops = 0
        self._until = until
        self._ended = threading.Event()

    def stop(self):
        self.stops += 1
        if self.stops >= self._until:
            self._ended.set()

    def run(self, handle_signals):
        assert not handle_signals
        os.kill(os.getpid(), signal.SIGTERM)  # which is for the parent
        assert self._ended.wait(30)
        return 0


@pytest.fixture
def serve(monkeypatch):
    """Be a child: what the parent writes, whether code has changed; return the exit code and the stops."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    reader, writer = os.pipe()

    def serve(text=b"", changes=False, stops=1):
        def run(thread):
            assert thread is threading.main_thread()
            if changes:
                autoreload.trigger_reload("queues.py")

        supervisor = Supervisor(stops)
        monkeypatch.setattr(autoreload, "get_reloader", lambda: SimpleNamespace(run=run))
        monkeypatch.setattr(reload, "_STANDARD_INPUT", reader)
        monkeypatch.setenv("RUN_MAIN", "true")
        os.write(writer, text)
        code = reload.serve_until_code_changes(supervisor), supervisor
        assert os.read(reader, 1) == b""  # what programs get
        assert "RUN_MAIN" not in os.environ
        return code

    yield serve
    os.close(writer)
    wait_until(lambda: not any(thread.name == "modelqueue-listen" for thread in threading.enumerate()))
    os.close(reader)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@posix
def test_child_stops_when_the_parent_says_so(serve):
    code, supervisor = serve(b".")
    assert (code, supervisor.stops) == (0, 1)


@posix
def test_child_stops_now_when_the_parent_says_so_twice(serve):
    assert serve(b"..", stops=2)[0] == 0


@posix
def test_child_that_fails_says_so(serve, monkeypatch, caplog):
    def fail(self, handle_signals):
        raise RuntimeError("out of pipes")

    monkeypatch.setattr(Supervisor, "run", fail)
    assert serve()[0] == 4
    assert "out of pipes" in caplog.text


@posix
def test_child_that_ends_by_a_fault_of_the_worker_does_not_look_like_broken_code(serve, monkeypatch):
    monkeypatch.setattr(Supervisor, "run", lambda self, handle_signals: FAULT)
    assert serve()[0] == 4


@posix
def test_child_asks_to_be_started_anew_when_code_has_changed(serve):
    assert serve(changes=True)[0] == 3


@posix
def test_change_of_code_does_not_hurry_a_stop(serve):
    code, supervisor = serve(b".", changes=True)
    time.sleep(0.1)
    assert (code in (0, 3), supervisor.stops) == (True, 1)
