"""MySQL and MariaDB: which errors mean "try again", and READ COMMITTED for our transactions.

In a Galera cluster each node locks rows on its own. Of two that have changed one row the cluster lets one
commit, and the other one gets error 1213, in its COMMIT or whatever it sends next. That is enough for compare
and set. It is not for what relies on a lock that everybody sees, see `is_of_cluster`, nor where a row was not
found as it should be: a node may lag behind what another one has committed, see `catch_up`.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from django.db import transaction
from django.db.utils import Error

from modelqueue.engines.base import Engine
from modelqueue.engines.sessions import Place

#: ER_LOCK_DEADLOCK, which is also how a Galera node says that another node won.
_DEADLOCK = 1213
_TRY_AGAIN = {
    1020,  # ER_CHECKREAD: record has changed since last read (MariaDB, snapshot isolation)
    1180,  # ER_ERROR_DURING_COMMIT, of a Galera node that has just lost the others
    1205,  # ER_LOCK_WAIT_TIMEOUT
    _DEADLOCK,
}
_FULL = {
    1021,  # ER_DISK_FULL
    1114,  # ER_RECORD_FILE_FULL
}
#: ER_UNKNOWN_COM_ERROR, of a Galera node that is cut off from the others, or has just been started.
_NOT_PREPARED = 1047
_NO_SAVEPOINT = 1305  # ER_SP_DOES_NOT_EXIST
_MARK = "modelqueue_mark"
#: The attribute of a connection that says whether its session is with a node of a cluster.
_CLUSTER = "modelqueue_cluster"


class MySQLEngine(Engine):
    connection: Any  # with attributes of this vendor's own

    def is_try_again(self, error: Error) -> bool:
        return bool(error.args) and error.args[0] in _TRY_AGAIN

    def is_full(self, error: Error) -> bool:
        return bool(error.args) and error.args[0] in _FULL

    def is_away(self, error: Error) -> bool:
        return bool(error.args) and error.args[0] == _NOT_PREPARED

    def is_of_cluster(self) -> bool:
        # Asked once of each session. MySQL does not have the variable, so it can not be selected.
        connection = self.connection
        connection.ensure_connection()
        session, is_known = getattr(connection, _CLUSTER, (None, False))
        if session is not connection.connection:
            with connection.cursor() as cursor:
                cursor.execute("SHOW GLOBAL VARIABLES LIKE 'wsrep_on'")
                is_known = (cursor.fetchone() or ("", "OFF"))[1] == "ON"
            setattr(connection, _CLUSTER, (connection.connection, is_known))
        return bool(is_known)

    def is_overruled(self, error: Error) -> bool:
        return bool(error.args) and error.args[0] == _DEADLOCK and self.is_of_cluster()

    def catch_up(self) -> bool:
        if not self.is_of_cluster():
            return False
        with self.connection.cursor() as cursor:
            cursor.execute("SET @modelqueue = @@SESSION.wsrep_sync_wait, SESSION wsrep_sync_wait = 1")
            try:
                cursor.execute("SELECT 1")
            finally:
                cursor.execute("SET SESSION wsrep_sync_wait = @modelqueue")
        return True

    def deepest_json(self) -> int | None:
        # By json_valid() of MariaDB 10.11, by which Django checks its fields, and by the manual of MySQL.
        try:
            return 31 if self.connection.mysql_is_mariadb else 100
        except Error:  # a connection that has not been used yet asks the server
            return None

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
