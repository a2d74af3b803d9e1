"""Operations of workers, each of which can be held up at a fault point, and cut off or ended there.

A worker is a thread, and so has a connection of its own. Whoever starts an operation waits until it is done
or held up, so of all threads one runs at a time: what happens is repeatable, and each change of a row is the
doing of one known operation.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import nullcontext, suppress
from queue import SimpleQueue

from django.db import OperationalError, connection, connections

from modelqueue import signals
from tests.faults.points import fault

#: Seconds within which an operation is done or held up, unless it waits for a lock. Generous: no step of
#: this suite takes a second, but a busy machine may.
PATIENCE = 10.0

GOES_ON, IS_HELD_UP = "goes on", "is held up"
LOSES_CONNECTION, DIES = "loses its connection", "dies"


class Stuck(Exception):  # noqa: N818
    """An operation waits for something, most likely for a lock."""


class Dead(BaseException):
    """The process of the worker was killed: from here on it does nothing any more."""


class Operation:
    """What a worker does in one go; `fate` says what happens at the fault point, if there is one.

    `step` says what it may do to rows at the moment, for whoever judges that.
    """

    def __init__(self, step, work, point=None, fate=GOES_ON, nth=1):
        self.step = step
        self.work = work
        self.point = point
        self.fate = fate
        self.nth = nth
        self.result = self.error = None
        self.is_done = self.is_held_up = self.is_dead = self.is_inside_transaction = False
        self.recovered = None
        self.is_recovering = False
        self.arrived = self.was_held_up = False
        self.told = []
        self._news = threading.Semaphore(0)
        self._go = threading.Event()

    # For who started it

    def wait(self):
        """Wait until it is done or held up."""
        if not self._news.acquire(timeout=PATIENCE):
            raise Stuck

    def resume(self, fate):
        self.fate = fate
        self._go.set()
        self.wait()

    def leave(self):
        """End it, whatever it is doing."""
        if self.is_held_up:
            self.resume(DIES)
        elif not self.is_done:
            self.wait()

    # In the thread of its worker

    def perform(self):
        _here.operation = self
        point = fault(*self.point, self._arrive, self.nth) if self.point else nullcontext()
        try:
            with connection.execute_wrapper(self._around), point:
                self.result = self.work(self)
        except BaseException as error:
            self.error = error
        finally:
            _here.operation = None
            if self.is_dead:
                with suppress(Exception):
                    connection.close()
                connection.connection = None  # also where closing it was an error
            self.is_done = True
            self._news.release()

    def _around(self, execute, sql, params, many, context):
        if self.is_dead:
            raise Dead
        return execute(sql, params, many, context)

    def _arrive(self, connection):
        self.arrived = True
        self.is_inside_transaction = connection.in_atomic_block
        if self.fate == IS_HELD_UP:
            if is_locked_in_full(connection):
                return
            self.is_held_up = self.was_held_up = True
            self._news.release()
            # Whoever started it is gone where this takes so long.
            if not self._go.wait(10 * PATIENCE):
                self.fate = DIES
            self.is_held_up = self.is_inside_transaction = False
        if self.fate == DIES:
            self.is_dead = True
            cut(connection)
            raise Dead
        if self.fate == LOSES_CONNECTION:
            cut(connection)
            raise OperationalError(2013, "the connection to the server was lost")


class _Here(threading.local):
    operation = None


_here = _Here()


def cut(connection):
    """End a connection. It is rolled back now, not when the server finds out: so all is repeatable."""
    if connection.vendor != "sqlite":
        with suppress(Exception):
            connection.connection.rollback()
        connection.connection.close()


def is_locked_in_full(connection):
    """Say whether the open transaction of this thread keeps all others from writing, as on SQLite alone."""
    if connection.vendor != "sqlite" or not connection.in_atomic_block:
        return False
    probe = sqlite3.connect(connection.settings_dict["NAME"], timeout=0, isolation_level=None)
    try:
        probe.execute("BEGIN EXCLUSIVE")
        probe.execute("ROLLBACK")
    except sqlite3.OperationalError:
        return True
    finally:
        probe.close()
    return False


class Worker:
    """A thread that performs one operation after the other."""

    def __init__(self, number):
        self.number = number
        self.operation = None
        self.claims = {}
        self._operations = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __repr__(self):
        return f"worker {self.number}"

    def _work(self):
        try:
            while (operation := self._operations.get()) is not None:
                operation.perform()
        finally:
            connections.close_all()

    def start(self, operation):
        self.operation = operation
        self._operations.put(operation)
        operation.wait()

    def close(self):
        self._operations.put(None)
        self._thread.join(PATIENCE)


class Crew:
    """Some workers, for as long as a test takes; each operation hears what it is told by signals."""

    def __init__(self, size):
        self.workers = [Worker(number) for number in range(size)]

    def __enter__(self):
        signals.task_finished.connect(_tell_finished)
        signals.lease_lost.connect(_tell_lost)
        signals.task_recovered.connect(_tell_recovered)
        return self

    def __exit__(self, *error):
        signals.task_finished.disconnect(_tell_finished)
        signals.lease_lost.disconnect(_tell_lost)
        signals.task_recovered.disconnect(_tell_recovered)
        for worker in self.workers:
            worker.close()


def _tell_finished(sender, **arguments):
    if _here.operation is not None:
        _here.operation.told.append(("finished", arguments["status"]))


def _tell_lost(sender, **arguments):
    if _here.operation is not None:
        _here.operation.told.append(("lost", arguments["status"]))


def _tell_recovered(sender, **arguments):
    if _here.operation is not None and _here.operation.recovered is not None:
        _here.operation.recovered()
