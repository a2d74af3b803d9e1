"""Hooks of ``on_commit`` in a transaction that is never committed, such as that of a `TestCase`.

In production they are called when the outermost ``atomic()`` of the action, or of the outcome, is left, or
at once where there is none. So inside of `as_in_autocommit` each connection does as if the transaction around
it were not there: whatever leaves the outermost block since then calls the hooks. What the test itself has
registered before stays where it is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from django.db import connections, transaction

from modelqueue.fields import Saved

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

__all__ = ["Pretence", "as_in_autocommit", "pretence_of"]

#: Where Django logs a robust hook that fails.
logger = logging.getLogger("django.db.backends.base")


class Pretence:
    """A connection inside a transaction, which does as if it were in autocommit."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self.connection = connection
        #: In how many blocks of atomic() it is where production would be in none.
        self.depth = len(connection.atomic_blocks)
        self._of_the_test = len(connection.run_on_commit)
        self._register = connection.on_commit

    @property
    def is_outside(self) -> bool:
        """Whether production would be in no transaction here."""
        return len(self.connection.atomic_blocks) == self.depth

    def on_commit(self, func: Callable[[], object], robust: bool = False) -> None:
        """Take the place of the method of the connection."""
        if self.is_outside and callable(func) and not _is_of_the_library(func):
            _call(func, robust)
        else:
            self._register(func, robust)

    def leave_block(self) -> None:
        """Do what a commit does, if the block that was just left would have been committed."""
        if self.is_outside and not self.connection.needs_rollback:
            self.call_hooks()

    def call_hooks(self) -> None:
        hooks: list[Any] = self.connection.run_on_commit[self._of_the_test :]
        self.connection.run_on_commit[self._of_the_test :] = [
            hook for hook in hooks if _is_of_the_library(hook[1])
        ]
        for _, func, robust in hooks:  # as in production, none after one that fails
            if not _is_of_the_library(func):
                _call(func, robust)

    @contextmanager
    def outside_here(self) -> Iterator[None]:
        """Count the block of atomic() that was just entered as part of the transaction around."""
        block: Any = self.connection.atomic_blocks[-1]
        block._from_testcase = True  # else atomic(durable=True) would refuse to begin in it
        before, self.depth = self.depth, len(self.connection.atomic_blocks)
        try:
            yield
        finally:
            self.depth = before


#: By connection. One belongs to a thread.
_pretences: dict[Any, Pretence] = {}
_lock = threading.Lock()
_users = 0
_django_exit = transaction.Atomic.__exit__


@contextmanager
def as_in_autocommit() -> Iterator[None]:
    """Let the connections of this thread that are inside a transaction call hooks as if they were not."""
    with ExitStack() as stack:
        for connection in connections.all(initialized_only=True):
            if connection.in_atomic_block and connection not in _pretences:
                stack.enter_context(_pretending(connection))
        yield


def pretence_of(using: str) -> Pretence | None:
    return _pretences.get(connections[using])


@contextmanager
def _pretending(connection: BaseDatabaseWrapper) -> Iterator[None]:
    pretence = Pretence(connection)
    _watch_blocks(1)
    _pretences[connection] = pretence
    try:
        with patch.object(connection, "on_commit", pretence.on_commit):
            yield
    finally:
        del _pretences[connection]
        _watch_blocks(-1)


def _watch_blocks(more: int) -> None:
    # Django tells nobody that a block was left, and blocks with savepoint=False do nothing that could be
    # seen. Counted, as tests may use threads.
    global _users  # noqa: PLW0603
    with _lock:
        _users += more
        transaction.Atomic.__exit__ = _exit if _users else _django_exit  # type: ignore[method-assign]


def _exit(block: transaction.Atomic, exc_type: Any, exc_value: Any, traceback: Any) -> None:
    _django_exit(block, exc_type, exc_value, traceback)
    pretence = _pretences.get(transaction.get_connection(block.using))
    if pretence is not None:  # after an error there are no hooks left, or needs_rollback is set
        pretence.leave_block()


def _is_of_the_library(func: Callable[[], object]) -> bool:
    """Say whether a hook only notes that a save() stands.

    It may still fall: the savepoint around the action is rolled back where the database asks for it, and
    then what was saved has to be written with the outcome.
    """
    return isinstance(getattr(func, "__self__", None), Saved)


def _call(func: Callable[[], object], robust: bool) -> None:
    if not robust:
        func()
        return
    try:
        func()
    except Exception:
        logger.exception("A robust hook of on_commit() failed: %r", func)
