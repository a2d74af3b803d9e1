"""Fault points: named moments of a claim, a renewal, an outcome and a recovery, where a test does its worst.

A point is a step and a moment of it::

    with fault("outcome", "before the commit", kill):
        run(Task.objects, "status", succeed)

Nothing of this is in the package, so it costs nothing there: the methods that begin a step are wrapped while
a test runs, statements are seen by Django's own `execute_wrapper`, and commits by a wrapped `_commit`.

"Before the commit" is after each statement inside a transaction. One in autocommit is committed by the server
before it answers, so it has no such moment that a client could see.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from modelqueue.attempts import AtomicAttempt, Attempt
from modelqueue.engines import Engine

#: What a step does to the database, in the order of the life of a task. "hold" begins `atomic=True`.
STEPS = ("claim", "hold", "renewal", "outcome", "recovery")
MOMENTS = ("before the statement", "before the commit", "before the answer")

#: What changes or locks a row. (EXECUTE runs a prepared statement.)
_WRITES = re.compile(r"\s*(UPDATE|INSERT|DELETE|WITH|EXECUTE|SELECT\b.*\bFOR (NO KEY )?UPDATE)\b", re.DOTALL)


class Fault:
    """What happens in this thread at the nth arrival at a point; `count` says how many there were."""

    def __init__(self, step: str, moment: str, do: Callable[[BaseDatabaseWrapper], object], nth: int) -> None:
        assert step in STEPS, step
        assert moment in MOMENTS, moment
        self.point = step, moment
        self.do = do
        self.nth = nth
        self.count = 0

    def arrive(self, point: tuple[str | None, str], connection: BaseDatabaseWrapper) -> None:
        if point == self.point:
            self.count += 1
            if self.count == self.nth:
                self.do(connection)


class _Here(threading.local):
    """What this thread is doing."""

    step: str | None = None
    faults: tuple[Fault, ...] = ()


_here = _Here()


def _arrive(moment: str, connection: BaseDatabaseWrapper) -> None:
    for fault in _here.faults:
        fault.arrive((_here.step, moment), connection)


@contextmanager
def fault(
    step: str, moment: str, do: Callable[[BaseDatabaseWrapper], object], nth: int = 1, using: str = "default"
) -> Iterator[Fault]:
    """Do something the nth time that this thread comes to a point, inside the block.

    Args:
        do: gets Django's connection. It may kill the process, end the connection, wait, or raise, which
            then comes out of the statement or the commit.
    """
    new = Fault(step, moment, do, nth)
    _install()
    before = _here.faults
    _here.faults = (*before, new)
    try:
        with connections[using].execute_wrapper(_around_statement):
            yield new
    finally:
        _here.faults = before
        _here.step = None


def fault_in_any_thread(
    step: str, moment: str, do: Callable[[BaseDatabaseWrapper], object], nth: int = 1
) -> Fault:
    """Do something the nth time that any thread of this process comes to a point, from now on."""
    new = Fault(step, moment, do, nth)
    _install()
    _Here.faults = (new,)
    connection_created.connect(_see_statements)
    return new


def _see_statements(connection: BaseDatabaseWrapper, **_: Any) -> None:
    if _around_statement not in connection.execute_wrappers:
        connection.execute_wrappers.append(_around_statement)


def _around_statement(execute: Any, sql: Any, params: Any, many: bool, context: dict[str, Any]) -> Any:
    connection = context["connection"]
    is_write = _WRITES.match(str(sql)) is not None
    if is_write:
        _arrive("before the statement", connection)
    result = execute(sql, params, many, context)
    if is_write:
        _arrive("before the commit" if connection.in_atomic_block else "before the answer", connection)
    return result


@functools.cache
def _install() -> None:
    """Learn of steps and commits. Once and for all: without a fault in its thread it does nothing."""
    _during(Engine, "claim", "claim")
    _during(Engine, "hold", "hold")
    _during(Engine, "renew", "renewal")
    _during(Engine, "_recover_among", "recovery")
    # An outcome is written between these two, by `Attempt` and by `AtomicAttempt`, whose commit it is, too.
    _from(Attempt, "decide", "outcome")
    _from(Attempt, "conclude", None)
    assert "decide" not in vars(AtomicAttempt)
    assert "conclude" not in vars(AtomicAttempt)

    commit = BaseDatabaseWrapper._commit

    @functools.wraps(commit)
    def watched(connection: BaseDatabaseWrapper) -> None:
        commit(connection)
        _arrive("before the answer", connection)

    BaseDatabaseWrapper._commit = watched


def _during(owner: type, name: str, step: str) -> None:
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        before, _here.step = _here.step, step
        try:
            return method(*arguments, **named)
        finally:
            _here.step = before

    setattr(owner, name, wrapped)


def _from(owner: type, name: str, step: str | None) -> None:
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        _here.step = step
        return method(*arguments, **named)

    setattr(owner, name, wrapped)
