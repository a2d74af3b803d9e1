"""What is done to a worker at a fault point: its process is killed, its connection cut or ended."""

from __future__ import annotations

import functools
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from tests.processes import wait_until

_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # on Windows os.kill() is TerminateProcess, as abrupt

#: The exit code of a process that was killed.
KILLED = _KILL if os.name == "nt" else -_KILL


def kill(connection: object = None) -> None:
    """Kill this process: nothing of it runs any more, no `finally`, no rollback."""
    os.kill(os.getpid(), _KILL)


# Of a connection to a server. SQLite has none.


def cut(connection: BaseDatabaseWrapper) -> None:
    """Shut down the client's socket, as a firewall may: both sides find out on their own."""
    _shut(connection, socket.SHUT_RDWR)


def mute(connection: BaseDatabaseWrapper) -> None:
    """Let the server hear what is sent from here on, and do it, without its answer being heard."""
    _shut(connection, socket.SHUT_RD)


def _shut(connection: Any, how: int) -> None:
    # psycopg 2, psycopg 3 and mysqlclient all tell the number. A copy of it, as theirs stays theirs to close.
    with socket.socket(fileno=os.dup(connection.connection.fileno())) as client:
        client.shutdown(how)


def end_session(victim: Any, other: Any = None) -> None:
    """Let the server end a session, as its administrator or a restart does; wait until it is gone.

    Args:
        other: a connection to the same server, to do it from; opened for the moment if there is none.
    """
    if other is None:
        other = victim.copy()
        try:
            end_session(victim, other)
        finally:
            other.close()
        return
    if victim.vendor == "postgresql":
        number = victim.connection.info.backend_pid
        end, find = f"SELECT pg_terminate_backend({number})", "pg_stat_activity WHERE pid"
    else:
        number = victim.connection.thread_id()
        end, find = f"KILL {number}", "information_schema.processlist WHERE id"
    with other.cursor() as cursor:
        cursor.execute(end)
        wait_until(
            lambda: cursor.execute(f"SELECT 1 FROM {find} = {number}") is None or not cursor.fetchone()
        )


def losing_the_answer(harm: Callable[[BaseDatabaseWrapper], object]) -> Callable[[BaseDatabaseWrapper], None]:
    """Return the harm, followed by the error of the driver: for a point at which the answer has been read."""

    @functools.wraps(harm)
    def harm_and_ask(connection: Any) -> None:
        harm(connection)
        with connection.wrap_database_errors:
            connection.connection.cursor().execute("SELECT 1")
        raise AssertionError("the connection is as good as new")

    return harm_and_ask
