"""The demo ends as it promises, and its admin shows what it left."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, build_opener

import pytest

ROOT = Path(__file__).parent.parent
DEMO = [sys.executable, str(ROOT / "examples" / "demo.py")]

Documents = dict[int, tuple[str, str, str, str]]


# On one database only, as the demo starts its databases itself. One test, as it takes several seconds.
@pytest.mark.vendor("sqlite")
def test_a_small_demo_keeps_its_promises(tmp_path):
    output = run_demo(tmp_path)
    assert "Nothing is lost" in output

    documents = rows(tmp_path)
    assert len(documents) == 62
    assert {state for state, *_ in documents.values()} == {"4", "5"}
    check_that_invalid_files_are_canceled(documents)
    check_that_the_tasks_of_the_killed_process_are_recovered(documents, output)
    check_that_the_admin_answers(documents, tmp_path)


def run_demo(folder: Path) -> str:
    result = subprocess.run(
        [*DEMO, "--files", "60", "--processes", "2", "--folder", folder],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def rows(folder: Path) -> Documents:
    """State, attempts, error and path by primary key, straight from the file."""
    with closing(sqlite3.connect(folder / "sqlite" / "db.sqlite3")) as connection:
        found = connection.execute("SELECT id, status, error, path FROM documents_document").fetchall()
    return {pk: (str(status)[0], str(status)[-1], error, path) for pk, status, error, path in found}


def check_that_invalid_files_are_canceled(documents: Documents) -> None:
    invalid = {Path(path).name: row for *row, path in documents.values() if "invalid" in Path(path).parts}
    for name, reason in [("syntax_error.py", "never closed"), ("undecodable.py", "can't decode byte 0xe9")]:
        state, attempts, error = invalid[name]
        assert (state, attempts) == ("5", "3")
        assert error.startswith("builtins.SyntaxError")
        assert reason in error.splitlines()[0]


def check_that_the_tasks_of_the_killed_process_are_recovered(documents: Documents, output: str) -> None:
    assert re.search(r"Process \d+ of the worker (was killed|exited)", output), output
    assert re.search(r"was killed while it ran \d+ documents:", output), output
    held = re.findall(r"^ *[\d.]+ s +document (\d+), ", output, re.MULTILINE)
    assert held, output
    for pk in held:
        assert f"the supervisor has taken back document {pk}" in output
        state, attempts, *_ = documents[int(pk)]
        # The second is for files that are not valid.
        assert (state, attempts) in [("4", "2"), ("5", "3")]


def check_that_the_admin_answers(documents: Documents, folder: Path) -> None:
    process = subprocess.Popen(
        [*DEMO, "admin", "--folder", str(folder), "--port", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )
    try:
        output = process.stdout.readline() + process.stdout.readline()
        url, user, password = re.search(r"(http://\S+/)\s+User (\w+), password (\w+)", output).groups()
        browser = Browser(url)
        browser.log_in(user, password)
        page = browser.get("admin/documents/document/?status_queue=canceled")
        assert "SyntaxError" in page
        assert "make_status_state_waiting" in page
        pk = next(iter(documents))
        assert 'name="status"' in browser.get(f"admin/documents/document/{pk}/change/")
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


class Browser:
    """Gets pages, with cookies; an answer that is no 200 raises."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._cookies = CookieJar()
        self._opener = build_opener(HTTPCookieProcessor(self._cookies))

    def get(self, path: str, data: dict[str, str] | None = None) -> str:
        with self._opener.open(self._url + path, urlencode(data).encode() if data else None, 20) as answer:
            return answer.read().decode()

    def log_in(self, user: str, password: str) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                self.get("admin/login/")
                break
            except OSError:  # the server is not up yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        token = next(cookie.value for cookie in self._cookies if cookie.name == "csrftoken")
        self.get(
            "admin/login/?next=/admin/",
            {"username": user, "password": password, "csrfmiddlewaretoken": token},
        )
