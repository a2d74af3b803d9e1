"""A client of PostgreSQL that has nothing to do with tasks: one small statement after the other, by psycopg.

python -m benchmarks.client select FILE

says "ready" when it is connected, goes on until it is ended, and then writes to the file how long each answer
took. Each statement is a transaction.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.environments import ROOT
from benchmarks.stores import Postgres

__all__ = ["STATEMENTS", "Client", "commits_per_second", "make_table"]

STATEMENTS = {
    "select": "SELECT data FROM neighbour WHERE id = %(id)s",
    "insert": "INSERT INTO neighbour (data) VALUES (%(data)s)",
    "update": "UPDATE neighbour SET data = %(data)s WHERE id = %(id)s",
}
_ROWS = 100_000


def make_table(store: Postgres) -> None:
    """Make it anew, with its rows."""
    store.session.execute("DROP TABLE IF EXISTS neighbour")
    store.session.execute("CREATE TABLE neighbour (id bigserial PRIMARY KEY, data text NOT NULL)")
    store.session.execute(
        "INSERT INTO neighbour (data) SELECT repeat('x', 100) FROM generate_series(1, %s)", [_ROWS]
    )


def commits_per_second(store: Postgres, clients: int, seconds: float) -> float:
    """Return how often so many of them change a row, and commit that, in a second."""
    make_table(store)
    store.settle()
    with ExitStack() as stack:
        busy = [stack.enter_context(Client(store, "update")) for _ in range(clients)]
        began = time.time()
        time.sleep(seconds)
        ended = time.time()
    return sum(len(client.within(began, ended)) for client in busy) / (ended - began)


class Client:
    """Is busy in the time of the block. The table has to be there."""

    def __init__(self, store: Postgres, statement: str) -> None:
        self._environment = {**os.environ, **store.environment, "PYTHONPATH": str(ROOT)}
        self._statement = statement
        self._answers = array("d")
        """When each came, and the seconds that it took; by turns."""

    def within(self, began: float, ended: float) -> list[float]:
        """Return how many seconds each of the answers took that came in this time."""
        moments, seconds = self._answers[::2], self._answers[1::2]
        return [took for moment, took in zip(moments, seconds, strict=True) if began < moment <= ended]

    def __enter__(self) -> Client:
        self._folder = tempfile.TemporaryDirectory(prefix="modelqueue-")
        self._file = Path(self._folder.name) / "answers"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.client", self._statement, str(self._file)],
            env=self._environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self._end()
            raise RuntimeError("a client has not started")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        has_died = self._process.poll() is not None
        self._process.terminate()
        self._end()
        if has_died and kind is None:  # what it has measured would be too little
            raise RuntimeError("a client has ended before it was told to")

    def _end(self) -> None:
        with self._folder, self._process:
            self._process.wait()
            if self._file.exists():
                self._answers.frombytes(self._file.read_bytes())


def main(statement: str, file: str) -> None:
    import psycopg

    is_ended = False

    def end(number: int, frame: Any) -> None:
        nonlocal is_ended
        is_ended = True

    signal.signal(signal.SIGTERM, end)
    sql, answers = STATEMENTS[statement], array("d")
    with psycopg.connect(autocommit=True) as session, session.cursor() as cursor:
        print("ready", flush=True)
        while not is_ended:
            values = {"id": random.randint(1, _ROWS), "data": "y" * 100}
            began = time.perf_counter()
            cursor.execute(sql, values)
            answers.append(time.time())
            answers.append(time.perf_counter() - began)
    Path(file).write_bytes(answers.tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
