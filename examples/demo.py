"""The demo: a worker drains a queue of real files, one of its processes is killed, and nothing is lost.

    python examples/demo.py [--db postgres]      drain the queue
    python examples/demo.py admin                look at what the last run has left, in Django's admin

Both put the Django project beside this file to use. The database is embedded SQLite, or a PostgreSQL that
came from the package index; everything is kept in `build/demo`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATABASES = {"sqlite": "SQLite", "postgres": "PostgreSQL"}
LOGIN = ("admin", "demo")


def main() -> int:
    parser = argparse.ArgumentParser(description="Have a worker drain a queue of real files.")
    add = parser.add_argument
    add("command", nargs="?", choices=["run", "admin"], default="run", help="default: run")
    add("--db", choices=list(DATABASES), help="default: sqlite; of admin: that of the last run")
    add("--files", type=int, default=3000, help="at most so many; 0: all of them; default: %(default)s")
    add("--processes", type=int, default=4, help="of the worker; default: %(default)s")
    add("--folder", type=Path, default=ROOT / "build" / "demo", help="where everything is kept")
    add("--port", type=int, default=8000, help="of the admin, or another one if it is taken")
    options = parser.parse_args()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # messages quote what is in the files
    return look(options) if options.command == "admin" else run(options)


def stop(number: int, frame: object) -> None:
    """Leave in order: worker and server are stopped. A second Ctrl-C does not cut that short."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)


def run(options: argparse.Namespace) -> int:
    """Fill a new queue, drain it, and say how it went."""
    name = options.db or "sqlite"
    folder: Path = options.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    os.environ["EXAMPLE_DEBUG"] = "0"
    with project(name, folder):
        from show import files, proof
        from show.drain import Drain

        (options.folder / "last").write_text(name)
        paths, text = files.choose(options.files)
        print(f"Python files: {text}.")
        print("Those that this Python can not parse end canceled, as expected: ours, and some test data.")
        large = enqueue(paths)
        print(f"{len(paths):,} documents are waiting in {DATABASES[name]}, {shown(folder)}.\n", flush=True)

        drain = Drain(len(paths), large, folder / "worker.log")
        drain.run(options.processes)
        is_kept = proof.report(drain, len(paths))
    print("\nWhere to look")
    print("  make demo-admin   the documents in Django's admin")
    print(f"  {shown(folder / 'worker.log')}   what the worker said")
    print("  examples/documents   the code: a model, a queue, an admin page")
    return 0 if is_kept else 1


def enqueue(paths: list[Path]) -> set[int]:
    """Save a document for each file, which enqueues it. Return the keys of the largest files."""
    from django.core.management import call_command

    from documents.models import Document

    call_command("migrate", verbosity=0)
    Document.objects.bulk_create([Document(path=str(path)) for path in paths], batch_size=500)
    largest = sorted(paths, key=lambda path: path.stat().st_size)[-max(len(paths) // 20, 5) :]
    keys = dict(Document.objects.values_list("path", "pk"))
    return {keys[str(path)] for path in largest}


def look(options: argparse.Namespace) -> int:
    """Serve the admin on the data of the last run, or of the last one with that database."""
    last = options.folder / "last"
    name = options.db or (last.read_text() if last.exists() else "sqlite")
    folder: Path = options.folder / name
    if not folder.exists():
        print(f"There is nothing in {shown(folder)} yet. Run `make demo` first.")
        return 1
    os.environ["EXAMPLE_DEBUG"] = "1"
    with project(name, folder):
        from django.contrib.auth import get_user_model
        from django.core.management import call_command

        call_command("migrate", verbosity=0)  # the last run may have been stopped before it did
        user, password = LOGIN
        if not get_user_model().objects.filter(username=user).exists():
            get_user_model().objects.create_superuser(user, password=password)
        port = free_port(options.port)
        print(f"The last demo on {DATABASES[name]}: http://127.0.0.1:{port}/")
        print(f"User {user}, password {password}. Ctrl-C ends it.\n", flush=True)
        call_command("runserver", f"127.0.0.1:{port}", use_reloader=False)
    return 0


def free_port(wanted: int) -> int:
    """Return the port if it is free, else another one."""
    for port in (wanted, 0):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(listener.getsockname()[1])
    raise RuntimeError("There is no free port on 127.0.0.1.")


@contextmanager
def project(name: str, folder: Path) -> Iterator[None]:
    """Have Django work on a database whose data is kept in the folder."""
    import django

    folder.mkdir(parents=True, exist_ok=True)
    os.environ["DJANGO_SETTINGS_MODULE"] = "project.settings"
    with database(name, folder):
        django.setup()
        from django.db import connections

        try:
            yield
        finally:
            connections.close_all()


@contextmanager
def database(name: str, folder: Path) -> Iterator[None]:
    """Start the database if it has to be started, and tell the settings, here and in processes, where."""
    if name == "sqlite":
        file = folder / "db.sqlite3"
        # The file remembers it. Before Django 5.1 the settings can not say it.
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        os.environ["EXAMPLE_DATABASE"] = json.dumps({"NAME": str(file)})
        yield
        return
    # The server that the tests use.
    sys.path.append(str(ROOT))
    from tests import servers

    with servers.start(name, durable=True, keep=folder / "data") as server:
        os.environ["EXAMPLE_DATABASE"] = json.dumps({**server, "NAME": "postgres", "OPTIONS": {}})
        yield


def shown(path: Path) -> str:
    """Return a path as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
