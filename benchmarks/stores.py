"""What contenders keep their tasks in: servers of our own in temporary folders, with durable commits.

A store knows how to hold back claims until all processes of a worker are up, and when outcomes were
committed, as far as its server can tell.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import django

from benchmarks import machine
from tests import servers
from tests.servers import Unavailable

__all__ = ["Postgres", "Sent", "Spent", "Store", "Unavailable", "open_store"]

_NAME = "benchmark"
#: Seconds in which no further process has come before all are taken to be there.
_QUIET = 1.0
#: Seconds for all processes of a worker to be there.
_PATIENCE = 60.0


@dataclass(frozen=True)
class Spent:
    """What a PostgreSQL has done."""

    bytes: int = 0
    """Of its write-ahead log."""
    transactions: int = 0
    commits: int = 0
    """Transactions among them that have changed something, so that they had to wait for the disk."""
    statements: int = 0
    """As far as they were written down."""
    processor: float = 0.0
    """Seconds."""

    def since(self, before: Spent) -> Spent:
        return Spent(
            self.bytes - before.bytes,
            self.transactions - before.transactions,
            self.commits - before.commits,
            self.statements - before.statements,
            self.processor - before.processor,
        )


@dataclass(frozen=True)
class Sent:
    """What a database was sent in a second; None: it does not tell."""

    transactions: float | None = None
    statements: float | None = None


class Store:
    def __init__(self, version: str, environment: dict[str, str]) -> None:
        self.version = version
        self.environment = environment
        """How a contender finds it."""

    def settle(self) -> None:
        """Have it done what it would do sooner or later, so that it does not do so while it is measured."""

    def has(self, rows: str) -> bool:
        """Return whether there are such rows, "table WHERE condition"."""
        raise NotImplementedError

    def sent_within(self, seconds: float) -> Sent:
        """Wait so long, and return what others have sent to it meanwhile."""
        time.sleep(seconds)
        return Sent()

    @contextmanager
    def closed(self, table: str) -> Iterator[Callable[[int], float] | None]:
        """Let nobody claim until what is yielded is called, which waits for so many processes first.

        That returns the moment from which they can; None: this store can not do it.
        """
        yield None


class Postgres(Store):
    def __init__(self, server: servers.Server) -> None:
        self._server = server
        self.server = server.connection
        """How Django connects to it, but for the name of a database."""
        self.connection = {**self.server, "NAME": _NAME}
        self.session = self.connect("postgres")
        self.session.execute("ALTER SYSTEM SET track_commit_timestamp = on")
        self.session.close()
        server.stop(False)
        server.start()
        self.session = self.connect("postgres")
        self.session.execute(f"CREATE DATABASE {_NAME}")
        self.session.close()
        self.session = self.connect()
        version = self.value("SHOW server_version").split()[0]
        super().__init__(
            f"PostgreSQL {version}",
            {
                **_for_django(self.connection),
                "PGHOST": self.connection["HOST"],
                "PGUSER": self.connection["USER"],
                "PGDATABASE": _NAME,
            },
        )

    def connect(self, name: str = _NAME) -> Any:
        import psycopg

        return psycopg.connect(
            host=self.connection["HOST"], user=self.connection["USER"], dbname=name, autocommit=True
        )

    @contextmanager
    def empty_database(self) -> Iterator[dict[str, str]]:
        """Have a further one; yield the environment by which it is found."""
        self.session.execute("CREATE DATABASE further")
        try:
            yield _for_django({**self.server, "NAME": "further"})
        finally:
            self.session.execute("DROP DATABASE further WITH (FORCE)")

    def value(self, sql: str, *values: object) -> Any:
        return self.session.execute(sql, values).fetchone()[0]

    def settle(self) -> None:
        self.session.execute("VACUUM ANALYZE")
        self.session.execute("CHECKPOINT")

    @contextmanager
    def closed(self, table: str) -> Iterator[Callable[[int], float]]:
        with self.connect() as session:
            session.execute("BEGIN")
            session.execute(f"LOCK TABLE {table} IN EXCLUSIVE MODE")  # they may read

            def open_when_there_are(processes: int) -> float:
                self._wait_for(table, processes)
                opened: float = session.execute("SELECT extract(epoch FROM clock_timestamp())").fetchone()[0]
                session.execute("COMMIT")
                return float(opened)

            yield open_when_there_are

    def _wait_for(self, table: str, processes: int) -> None:
        found, since = 0, time.monotonic()
        deadline = since + _PATIENCE
        quiet = _QUIET if processes > 1 else 0.0  # one session of a process may come before another process
        while found < processes or time.monotonic() - since < quiet:
            if time.monotonic() > deadline:
                raise RuntimeError(f"After {_PATIENCE:.0f} s {found} of {processes} processes claim tasks.")
            time.sleep(0.02)
            waiting = self.value(
                "SELECT count(DISTINCT pid) FROM pg_locks WHERE relation = %s::regclass AND NOT granted",
                table,
            )
            if waiting != found:
                found, since = waiting, time.monotonic()

    @contextmanager
    def snapshot(self, seconds: float | None = None) -> Iterator[None]:
        """Have an old transaction open, which sees all rows as they were: one, or a new one each so often."""
        ended, begun = threading.Event(), threading.Event()

        def hold() -> None:
            with self.connect() as session:
                while not ended.is_set():
                    session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                    session.execute("SELECT 1")
                    begun.set()
                    ended.wait(seconds)
                    session.execute("COMMIT")

        holder = threading.Thread(target=hold)
        holder.start()
        begun.wait()
        try:
            yield
        finally:
            ended.set()
            holder.join()

    def outcomes(self, done: str, since: float) -> list[float]:
        """Return when the outcomes were committed that are the rows of `done`, "table WHERE condition"."""
        rows = self.session.execute(
            "SELECT extract(epoch FROM moment)::float8 AS second "
            f"FROM (SELECT pg_xact_commit_timestamp(xmin) AS moment FROM {done}) AS moments "
            "WHERE moment >= to_timestamp(%s) ORDER BY second",
            [since],
        )
        return [second for (second,) in rows]

    def spent(self) -> Spent:
        """Return what it has done so far."""
        written = self.value("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
        server = int((self._folder / "data" / "postmaster.pid").read_text().split()[0])
        # Who only reads takes no number.
        commits = self.value("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
        return Spent(
            int(written),
            self._transactions(),
            int(commits),
            self._logged_statements(),
            machine.processor(server),
        )

    def sent_within(self, seconds: float) -> Sent:
        with self.logging():
            transactions, statements = self._transactions(), self._logged_statements()
            time.sleep(seconds)
            statements = self._logged_statements() - statements
            transactions = self._transactions() - transactions - 1  # which was the question itself
        return Sent(transactions / seconds, statements / seconds)

    def _transactions(self) -> int:
        return int(
            self.value(
                "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
            )
        )

    def _logged_statements(self) -> int:
        with (self._folder / "log").open(errors="replace") as lines:
            return sum("LOG:  statement: " in line or "LOG:  execute " in line for line in lines)

    @property
    def _folder(self) -> Path:
        return Path(self.connection["HOST"])

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Have it write down all statements."""
        self._log_statements("all")
        try:
            yield
        finally:
            self._log_statements("none")

    def _log_statements(self, which: str) -> None:
        self.session.execute(f"ALTER SYSTEM SET log_statement = '{which}'")
        self.session.execute("SELECT pg_reload_conf()")


class _Other(Store):
    """A database that tells no times of commits."""

    def __init__(self, version: str, environment: dict[str, str], cursor: Any) -> None:
        super().__init__(version, environment)
        self._cursor = cursor

    def has(self, rows: str) -> bool:
        self._cursor.execute(f"SELECT 1 FROM {rows} LIMIT 1")
        return bool(self._cursor.fetchall())


class _MariaDB(_Other):
    def sent_within(self, seconds: float) -> Sent:
        before = self._statements()
        time.sleep(seconds)
        return Sent(statements=(self._statements() - before - 1) / seconds)  # one was the question itself

    def _statements(self) -> int:
        self._cursor.execute(
            "SELECT variable_value FROM information_schema.global_status WHERE variable_name = 'QUERIES'"
        )
        return int(self._cursor.fetchone()[0])


def _for_django(connection: dict[str, Any]) -> dict[str, str]:
    return {"BENCHMARK_DATABASE": json.dumps(connection, default=str)}


@contextmanager
def open_store(name: str) -> Iterator[Store]:
    """Run it for the time of the block.

    Raises:
        Unavailable: this machine can not.
    """
    opened = {"mariadb": _mariadb, "sqlite": _sqlite, "redis": _redis}.get(name)
    with opened() if opened else _postgres(name) as store:
        yield store


@contextmanager
def _postgres(name: str) -> Iterator[Store]:
    with servers.start_server(name, durable=True) as server:
        store = Postgres(server)
        try:
            yield store
        finally:
            store.session.close()


@contextmanager
def _mariadb() -> Iterator[Store]:
    with servers.start("mariadb", durable=True) as server:
        import MySQLdb

        session = MySQLdb.connect(unix_socket=server["HOST"], user=server["USER"], autocommit=True)
        with closing(session):
            cursor = session.cursor()
            cursor.execute(f"CREATE DATABASE {_NAME}")
            cursor.execute(f"USE {_NAME}")
            cursor.execute("SELECT version()")
            version = cursor.fetchone()[0].partition("-")[0]
            yield _MariaDB(f"MariaDB {version}", _for_django({**server, "NAME": _NAME}), cursor)


@contextmanager
def _sqlite() -> Iterator[Store]:
    import sqlite3

    if django.VERSION < (5, 1):
        raise Unavailable("Django below 5.1 can not be told how a transaction of SQLite begins")
    with tempfile.TemporaryDirectory(prefix="modelqueue-") as folder:
        file = str(Path(folder) / "tasks.sqlite3")
        connection = {**servers.SQLITE, "NAME": file, "OPTIONS": servers.SQLITE_OPTIONS}
        with closing(sqlite3.connect(file, isolation_level=None)) as session:
            yield _Other(
                f"SQLite {sqlite3.sqlite_version}, WAL, synchronous=NORMAL",
                {**_for_django(connection), "BENCHMARK_FILE": str(Path(folder) / "other.sqlite3")},
                session.cursor(),
            )


@contextmanager
def _redis() -> Iterator[Store]:
    """A Redis as fast as it can be: it keeps nothing."""
    if (server := shutil.which("redis-server")) is None:
        raise Unavailable("there is no Redis: install redis-server")
    with tempfile.TemporaryDirectory(prefix="modelqueue-") as folder:
        address = str(Path(folder) / "socket")
        options = "--port", "0", "--unixsocket", address, "--save", "", "--appendonly", "no", "--dir", folder
        process = subprocess.Popen(
            [server, *options], stdout=subprocess.DEVNULL, start_new_session=True
        )  # Ctrl-C is not for it
        try:
            deadline = time.monotonic() + 10
            while not os.path.exists(address):  # noqa: PTH110
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Unavailable("Redis did not start")
                time.sleep(0.02)
            said = subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stdout
            version = said.partition("v=")[2].split()[0]
            yield Store(f"Redis {version}, not durable", {"BENCHMARK_REDIS": address})
        finally:
            process.terminate()
            process.wait()
