"""A session with a database: short transactions, errors that mean "try again", connections that were lost.

"Try again" errors are retried inside, with jitter, for up to 30 s, and once where a single wait took longer.
Inside an outer transaction they are raised at once, since only who began it can begin it again.

Nothing here knows of tasks. A vendor's engine says what its database's errors mean and how it sees that a
transaction is open, by overriding what is here.
"""

from __future__ import annotations

import datetime as dt
import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from django.db import InterfaceError, OperationalError, connections, transaction
from django.db.transaction import TransactionManagementError
from django.db.utils import Error

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

__all__ = ["RowLocked", "Session", "end_queries_of", "full_since", "note_full"]

T = TypeVar("T")

#: A session with the database, and the atomic() blocks that are open in it, the outermost first.
Place = tuple[Any, "list[transaction.Atomic]"]

_LONGEST_ROUND_TRIP = dt.timedelta(seconds=0.2)

#: When the disk of a database was full for this process, by the monotonic clock.
_full_at: dict[str, float] = {}


def note_full(using: str) -> None:
    """The disk of a database is full just now."""
    _full_at[using] = time.monotonic()


def full_since(moment: float) -> list[str]:
    """Return the databases whose disk was full for this process after a moment of the monotonic clock."""
    return [using for using, latest in list(_full_at.items()) if latest > moment]


class RowLocked(Exception):  # noqa: N818
    """Somebody else has locked a row that was not to be waited for."""


class Session:
    """The connection of one thread to one database, and how to work with it patiently.

    To be made and used in the same thread, as Django's connection.
    """

    connection: BaseDatabaseWrapper
    #: Seconds for which "try again" errors are retried. Who holds up others meanwhile takes less.
    patience = 30.0
    #: Does a query of which not all rows were read keep others from writing?
    locks_by_reading = False

    def __init__(self, using: str) -> None:
        self.using = using
        self.connection = connections[using]
        self._has_lost_connection = False

    def forget(self) -> None:
        """Be as new, for the next task."""
        self.patience, self._has_lost_connection = Session.patience, False

    # Transactions

    def place(self) -> Place:
        """Return in which transaction the connection is: its session, and each atomic() around."""
        return self.connection.connection, list(self.connection.atomic_blocks)

    def mark(self) -> Place:
        """Mark the open transaction, to know it again by `is_at`; return its place."""
        return self.place()

    def return_to(self, place: Place) -> bool:
        """Roll back each atomic() that was entered since and never left; return whether there was one."""
        open_blocks, (_, known) = self.connection.atomic_blocks, place
        left_open = open_blocks[len(known) :] if open_blocks[: len(known)] == known else []
        for block in reversed(left_open):
            block.__exit__(TransactionManagementError, TransactionManagementError(), None)
        return bool(left_open)

    def is_at(self, place: Place) -> bool:
        """Say whether the transaction is still the one that was marked last, and as deep."""
        is_ours = not self.connection.closed_in_transaction and self.place() == place
        return is_ours and (self.connection.needs_rollback or self._is_still_open())

    def _is_still_open(self) -> bool:
        """Say whether the transaction is open, as the database sees it; asked within one that was marked."""
        return True

    def is_aborted(self) -> bool:
        """Say whether the open transaction can only be rolled back."""
        return self.connection.needs_rollback

    def transaction(self) -> transaction.Atomic:
        """Return the context manager for one short transaction of ours."""
        return transaction.atomic(using=self.using)

    def is_try_again(self, error: Error) -> bool:
        """Say whether the database asks to try the same transaction again. The portable engine knows none."""
        return False

    def is_full(self, error: Error) -> bool:
        """Say whether the database has no room for a write. The portable engine does not know."""
        return False

    def patiently(self, work: Callable[[], T], reconnect: bool = False) -> T:
        """Do work in a transaction of its own, again while the database says "try again".

        For as long as `patience`, and once more after a wait that was longer.

        Args:
            reconnect: try again also when the connection was lost. Only for work that may be done
                twice, as the answer that was lost may have been a success.

        After an error of the connection itself the connection is closed, so that the next query
        opens another.
        """
        deadline = time.monotonic() + self.patience
        # One wait for a lock can take longer than that, 50 s on MySQL and MariaDB, and the lock be free then:
        # who holds up nobody tries once more.
        has_another = self.patience >= Session.patience
        pause = 0.001
        while True:
            is_outer, session = self.is_inside_transaction(), None
            try:
                self.connection.ensure_connection()
                session = self.connection.connection
                return work()
            except (OperationalError, InterfaceError) as error:
                if is_outer:
                    raise
                is_try_again = self.is_try_again(error)
                was_lost = not is_try_again and self._has_lost(session, error)
                self._has_lost_connection = was_lost
                if self.is_full(error):
                    note_full(self.using)
                if not ((was_lost and reconnect) or is_try_again):
                    raise
                if time.monotonic() > deadline:
                    if not (is_try_again and has_another):
                        raise
                    has_another = False
            self.note_contention()
            time.sleep(random.uniform(pause / 2, pause))  # noqa: S311  (jitter)
            pause = min(pause * 2, 0.5)

    def is_inside_transaction(self) -> bool:
        """Say whether a transaction of the caller is open; asks nothing of the database."""
        connection = self.connection
        if connection.connection is None and not connection.in_atomic_block:
            return not connection.settings_dict["AUTOCOMMIT"]
        return connection.in_atomic_block or not connection.autocommit

    def is_away(self, error: Error) -> bool:
        """Say whether a server that answers says that it can do nothing for anybody just now."""
        return False

    def _has_lost(self, session: Any, error: Error) -> bool:
        """Say whether the connection to the database is another one than `session`, none, or of no use."""
        if self.is_away(error):
            self._throw_connection_away()  # perhaps it was not set up in full
            return True
        # On its way out of a transaction Django has opened another where it found the first one broken.
        return session is None or self.connection.connection is not session or self._close_if_broken()

    def is_of_the_database_itself(self, error: Exception) -> bool:
        """Say whether an error is no fault of a row or a queryset, but of the session, a lock or the disk."""
        if not isinstance(error, (OperationalError, InterfaceError)):
            return isinstance(error, RowLocked)
        return self.is_try_again(error) or self.is_full(error) or self._has_lost_connection

    def meets_everybody(self, error: Error) -> bool:
        """Say whether any other statement would end with this error, too, as the database is away."""
        return self._has_lost_connection

    def is_of_cluster(self) -> bool:
        """Say whether there are several servers that take writes, none of which sees the locks of another."""
        return False

    def is_overruled(self, error: Error) -> bool:
        """Say whether the open transaction was rolled back for that of another server of a cluster."""
        return False

    def catch_up(self) -> bool:
        """Wait until all is seen that the other servers of a cluster have committed by now.

        Returns whether there is such a thing. It takes as long as nothing can be committed.
        """
        return False

    def is_connected(self) -> bool:
        """Say whether the database answers on this connection; opens none."""
        return self.connection.connection is not None and bool(self.connection.is_usable())

    def _close_if_broken(self) -> bool:
        if self.connection.is_usable():
            return False
        self._throw_connection_away()
        return True

    def restore_connection(self) -> bool:
        """Make the connection fit for use after code that may have closed, broken or misused it.

        Called outside of transactions only. Returns True if a transaction was found open, and
        rolled back.
        """
        if self.connection.connection is None:
            return False
        was_open = self.is_inside_transaction()
        try:
            return self._restore_connection()
        except Exception:  # it is dead, and whatever was open on it was rolled back by the server
            self._throw_connection_away()
            return was_open

    def _restore_connection(self) -> bool:
        connection = self.connection
        if connection.in_atomic_block:  # an atomic() that was entered and never left
            connection.close()
            connection.connect()
            return True
        if not connection.autocommit:
            connection.rollback()
            connection.set_autocommit(True)
            return True
        if connection.errors_occurred and self._close_if_broken():
            return False
        return self._roll_back_open_transaction()

    def _throw_connection_away(self) -> None:
        connection = self.connection
        with suppress(Exception):  # even that asks the server
            connection.close()
        # Django keeps it until the end of an atomic(), which will not come.
        connection.connection, connection.in_atomic_block = None, False

    def _roll_back_open_transaction(self) -> bool:
        """Roll back what was begun by a BEGIN of the action's own; return whether there was such a thing."""
        connection = self.connection.connection
        connection.rollback()
        return False

    # The server

    def name_sessions(self, version: str) -> None:
        """Let the server know the next sessions of this process as those of a worker of this version."""

    def connections_in_use(self) -> tuple[int, int] | None:
        """Return how many connections the server has, and may have; None where there is no such limit."""
        return None

    def _offset_of(self, sql: str) -> dt.timedelta | None:
        """Return how far the time that a statement gives is ahead of ours in the middle of its round trip.

        None after a long one, of which nobody knows the middle.
        """
        with self.connection.cursor() as cursor:
            before = dt.datetime.now(dt.timezone.utc)
            cursor.execute(sql)
            moment: dt.datetime = cursor.fetchone()[0]
            after = dt.datetime.now(dt.timezone.utc)
        if after - before > _LONGEST_ROUND_TRIP:
            return None
        return moment.replace(tzinfo=dt.timezone.utc) - (before + (after - before) / 2)

    # Fairness

    def note_contention(self) -> None:
        """Remember that other workers want this database, too."""

    def rest(self, seconds: float) -> None:
        """Let others write between two batches, one of which took so long: where one writes at a time."""

    def give_way(self) -> None:
        """Let other workers come to their turn; called after a task, outside of transactions."""


def end_queries_of(error: BaseException) -> None:
    """End the queries that are open, also on a connection that is closed, as long as somebody has an error.

    The frames that it came through have the cursors. They lose all their local variables.
    """
    for one in _with_causes(error):
        traceback.clear_frames(one.__traceback__)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all from which it has come, each once, as they may be a circle."""
    found, known = [error], set[int]()
    while found:
        one = found.pop()
        if id(one) not in known:
            known.add(id(one))
            yield one
            found += [cause for cause in (one.__cause__, one.__context__) if cause is not None]
