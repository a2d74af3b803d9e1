"""MySQL and MariaDB: which errors mean "try again", and READ COMMITTED for our transactions."""

from __future__ import annotations

import datetime as dt
from typing import Any

from django.db import transaction
from django.db.utils import Error

from modelqueue.engines.base import Engine
from modelqueue.engines.sessions import Place

_TRY_AGAIN = {
    1020,  # ER_CHECKREAD: record has changed since last read (MariaDB, snapshot isolation)
    1205,  # ER_LOCK_WAIT_TIMEOUT
    1213,  # ER_LOCK_DEADLOCK, which is also how a Galera node says that another node won
}


_NO_SAVEPOINT = 1305  # ER_SP_DOES_NOT_EXIST
_MARK = "modelqueue_mark"


class MySQLEngine(Engine):
    connection: Any  # with attributes of this vendor's own

    def is_try_again(self, error: Error) -> bool:
        return bool(error.args) and error.args[0] in _TRY_AGAIN

    def transaction(self) -> transaction.Atomic:
        # Under REPEATABLE READ a locking read takes gap locks, which block inserts of waiting rows
        # until our commit. Django's default is READ COMMITTED, but OPTIONS may say otherwise.
        connection = self.connection
        connection.ensure_connection()
        is_ours = not connection.in_atomic_block and connection.get_autocommit()
        if is_ours and connection.isolation_level != "read committed":
            with connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")  # of the next one alone
        return super().transaction()

    def connections_in_use(self) -> tuple[int, int]:
        with self.connection.cursor() as cursor:
            cursor.execute("SHOW GLOBAL STATUS LIKE 'Threads_connected'")
            used = int(cursor.fetchone()[1])
            cursor.execute("SELECT @@max_connections")
            return used, int(cursor.fetchone()[0])

    def clock_offset(self) -> dt.timedelta | None:
        return self._offset_of("SELECT UTC_TIMESTAMP(6)")

    def mark(self) -> Place:
        # A deadlock rolls back the whole transaction, and what comes after it begins another one, without
        # a word to who has caught the error. A savepoint does not outlive that.
        self._execute_plainly(f"SAVEPOINT {_MARK}")
        return super().mark()

    def _is_still_open(self) -> bool:
        try:
            self._execute_plainly(f"RELEASE SAVEPOINT {_MARK}")
        except Error as error:
            if error.args[0] != _NO_SAVEPOINT:
                raise
            return False
        return True

    def _execute_plainly(self, sql: str) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute(sql)

    def _roll_back_open_transaction(self) -> bool:
        # The driver does not tell; MariaDB does when asked. On MySQL a ROLLBACK that was not needed
        # is harmless.
        was_open = False
        if self.connection.mysql_is_mariadb:
            with self.connection.cursor() as cursor:
                cursor.execute("SELECT @@in_transaction")
                was_open = bool(cursor.fetchone()[0])
            if not was_open:
                return False
        self.connection.connection.rollback()
        return was_open
