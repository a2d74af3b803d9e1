"""The tutorial works: its commands and files, taken from the page, on the built wheel, in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
from contextlib import closing
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from modelqueue import Status
from tests import pages
from tests.processes import wait_until

PAGE = pages.DOCS / "tutorial" / "index.md"
PAGE_OF_TASKS = pages.DOCS / "tutorial" / "django-tasks.md"
FIRST, LAST = int(Status.minimum("waiting")), int(Status.maximum("working"))

#: What a reader checks in the browser.
ADMIN = """
from django.contrib.auth.models import User
from django.test import Client
from django.test.utils import setup_test_environment
setup_test_environment()
client = Client()
client.force_login(User.objects.get(username="admin"))
page = client.get("/admin/documents/document/?status_queue=canceled")
assert page.status_code == 200, page.status_code
(document,) = page.context["cl"].queryset
assert b"canceled; now; 2 attempts" in page.content or b"ago; 2 attempts" in page.content
form = client.get(f"/admin/documents/document/{document.pk}/change/")
assert b"there is nothing to count" in form.content
values = {name: form.context["adminform"].form[name].value() or "" for name in ("text", "words", "status")}
values |= {"initial-status": values["status"], "text": "five words are enough here"}
answer = client.post(f"/admin/documents/document/{document.pk}/change/", values)
assert answer.status_code == 302, answer.content
chosen = {"action": "make_status_state_waiting", "_selected_action": [document.pk]}
answer = client.post("/admin/documents/document/", chosen)
assert answer.status_code == 302, answer.content
print("the admin works")
"""

#: What a reader of the page about Django tasks does in the browser.
AUDIT = """
import time
from django.test import Client
from django.test.utils import setup_test_environment
setup_test_environment()
client = Client(enforce_csrf_checks=True)

def get(url):
    page = client.get(url)
    assert page.status_code == 200, page.status_code
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    text = page.content.decode()
    assert not any(word in text for word in ("<script", "<style", "style=", "onclick=")), text
    return text

def start():
    index = get("/audits/")
    token = index.partition('name="csrfmiddlewaretoken" value="')[2].partition('"')[0]
    answer = client.post("/audits/start/", {"csrfmiddlewaretoken": token})
    assert answer.status_code == 302, answer.content
    return answer.headers["Location"]

def ended(url):
    deadline = time.monotonic() + 60
    while 'http-equiv="refresh"' in (text := get(url)):
        assert time.monotonic() < deadline, text
        time.sleep(0.05)
    return text
"""
RUNNING = (
    AUDIT
    + """
from pathlib import Path
from django.contrib.staticfiles import finders
assert finders.find("audits/audits.css")
text = ended(start())
assert "Successful" in text, text
assert "5 of 5 documents" in text, text
assert "5 documents, 0 of them changed." in text, text
changed = Path("audits/models.py")
changed.write_text(changed.read_text() + "# changed\\n")
text = ended(start())
assert "5 documents, 1 of them changed." in text and "<li>audits/models.py</li>" in text, text
print("the page works")
"""
)
STOPPED = (
    AUDIT
    + """
text = get(start())
assert "Ready" in text and 'http-equiv="refresh"' in text, text
print("it waits")
"""
)
STATES = """
from collections import Counter
from modelqueue.task_backend.models import QueuedTask
print(dict(Counter(row.status.state.name for row in QueuedTask.objects.all())))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the checkout without asking an index for anything."""
    folder = tmp_path_factory.mktemp("wheel")
    here = [Path(sys.executable).parent, pages.ROOT / ".venv" / "bin"]
    uv = shutil.which("uv", path=os.pathsep.join([*map(str, here), os.environ.get("PATH", "")]))
    assert uv, "the tutorial is tested with the wheel, which uv builds: python -m pip install uv"
    subprocess.run(
        [uv, "build", "--wheel", "--offline", "--out-dir", str(folder), str(pages.ROOT)],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("modelqueue-*.whl")
    return built


class Reader:
    """Types what the tutorial says. Workers run beside; before the next command Ctrl-C stops them."""

    page = PAGE
    #: What is done in the browser.
    browse = ADMIN

    def __init__(self, folder: Path, wheel: Path | None) -> None:
        self.folder = folder
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(
                ("DJANGO", "MODELQUEUE", "COV", "PYTHON", "PYTEST", "VIRTUAL_ENV", "UV_", "PIP_")
            )
        }
        if wheel is not None:
            # It comes from the folder where it was built, and no index is asked.
            self.environment |= {
                "PIP_NO_INDEX": "1",
                "PIP_FIND_LINKS": str(wheel.parent),
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            }
        self.environment |= {
            "DJANGO_SUPERUSER_PASSWORD": "secret",
            "PYTHONUNBUFFERED": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
        self.workers: list[subprocess.Popen[str]] = []
        self.output: list[str] = []

    def read(self) -> None:
        for block in pages.blocks(self.page, "python", "console"):
            if block.file:
                block.write(self.folder)
            else:
                self.type(block)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()  # its processes notice, and end
            worker.communicate()

    def type(self, block: pages.Block) -> None:
        printed = ""
        for line in block.text.splitlines():
            if line.startswith("$ "):
                printed = self.command(line.removeprefix("$ "))
            else:
                assert line in printed.splitlines(), f"line {block.line}: {printed}"

    def command(self, line: str) -> str:
        match line.split()[:3]:
            case ["cd", folder]:
                self.folder = self.folder / folder
                return ""
            case [".", ".venv/bin/activate"]:
                scripts = self.folder / ".venv" / ("Scripts" if os.name == "nt" else "bin")
                path = self.environment["PATH"].split(os.pathsep)
                self.environment["PATH"] = os.pathsep.join(dict.fromkeys([str(scripts), *path]))
                return ""
            case ["python", "manage.py", "modelqueue"] if not line.endswith("--drain"):
                self.workers.append(self.start(line))
                return ""
            case ["python", "manage.py", "runserver"]:
                return self.call(["python", "manage.py", "shell", "-c", self.browse])
        self.stop_workers()
        if "createsuperuser" in line:
            line += " --noinput"
        printed = self.call(line)
        if "-m venv" in line:
            self.lend_django()
        return printed

    def call(self, command: str | list[str]) -> str:
        if isinstance(command, list):
            command[0] = shutil.which(command[0], path=self.environment["PATH"]) or command[0]
        done = subprocess.run(
            command,
            shell=isinstance(command, str),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    def start(self, line: str) -> subprocess.Popen[str]:
        command = line.split()
        command[0] = shutil.which(command[0], path=self.environment["PATH"]) or command[0]
        flags = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {}
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **flags,
        )

    def stop_workers(self) -> None:
        """Wait until nothing is left to do, press Ctrl-C in each terminal, and keep what was printed."""
        if not self.workers:
            return
        wait_until(lambda: self.left() == 0)
        for worker in self.workers:
            worker.send_signal(signal.CTRL_BREAK_EVENT if os.name == "nt" else signal.SIGINT)
        for worker in self.workers:
            printed, _ = worker.communicate(timeout=30)
            assert os.name == "nt" or worker.returncode == 0, printed
            self.output.append(printed)
        self.workers = []

    def left(self) -> int:
        """How many are waiting or working. Asked here: a command for each look takes longer than the rest."""
        with closing(sqlite3.connect(self.folder / "db.sqlite3", timeout=20)) as connection:
            query = f"SELECT count(*) FROM documents_document WHERE status BETWEEN {FIRST} AND {LAST}"
            return int(connection.execute(query).fetchone()[0])

    def lend_django(self) -> None:
        """Let the new environment have the Django of this one, as if an index had been asked for it."""
        names = ["Django", "asgiref", "sqlparse", "typing_extensions", "tzdata"]
        lent = self.folder.parent / "lent"
        lent.mkdir()
        for name in names:
            try:
                files = distribution(name).files or []
            except PackageNotFoundError:
                continue
            for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
                source = Path(sysconfig.get_path("purelib")) / top
                if os.name != "nt":
                    (lent / top).symlink_to(source)
                elif source.is_dir():
                    shutil.copytree(source, lent / top)
                else:
                    shutil.copy(source, lent / top)
        (packages,) = (self.folder / ".venv").glob(
            "Lib/site-packages" if os.name == "nt" else "lib/*/site-packages"
        )
        (packages / "lent.pth").write_text(f"{lent}\n")


@pytest.fixture
def reader(wheel, tmp_path):
    one = Reader(tmp_path, wheel)
    yield one
    one.close()


@pytest.mark.timeout(900)  # it makes an environment, and runs twenty commands
@pytest.mark.vendor("sqlite")
def test_tutorial_ends_in_a_working_queue(reader, tmp_path):
    reader.read()

    installed = reader.call(["python", "-c", "import modelqueue; print(modelqueue.__file__)"])
    assert str(tmp_path) in installed
    printed = "".join(reader.output)
    assert printed.count("outcome fail (builtins.ValueError: there is nothing to count)") == 2
    # Not by lines: threads that print in the same moment share one.
    counted = re.findall(r"document (\d+): (\d+) words", printed)
    assert sorted(int(pk) for pk, words in counted) == list(range(2, 41))
    assert all(int(words) == int(pk) - 1 for pk, words in counted)
    assert all(" words" in output for output in reader.output), "only one of the two workers had a task"

    # The document that was mended in the admin.
    reader.command("python manage.py modelqueue worker")
    reader.stop_workers()
    assert "document 1: 5 words" in reader.output[-1]


class ReaderOfTasks(Reader):
    """Types what the page about Django tasks says, in a copy of the examples."""

    page = PAGE_OF_TASKS
    browse = RUNNING

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, None)
        self.environment["PYTHONPATH"] = str(pages.ROOT / "src")
        ignored = shutil.ignore_patterns("__pycache__", "*.sqlite3*")
        shutil.copytree(pages.ROOT / "examples", folder / "examples", ignore=ignored)


@pytest.mark.timeout(300)
@pytest.mark.vendor("sqlite")
def test_tutorial_of_django_tasks_ends_in_a_working_page(tmp_path):
    one = ReaderOfTasks(tmp_path)
    try:
        one.read()
        one.stop_workers()
        assert "it waits" in one.call(["python", "manage.py", "shell", "-c", STOPPED])
        one.call("python manage.py modelqueue worker default --drain")
        assert "{'finished': 3}" in one.call(["python", "manage.py", "shell", "-c", STATES])
    finally:
        one.close()
