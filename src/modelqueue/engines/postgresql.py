"""PostgreSQL: which errors mean "try again", and how to see that a transaction is open."""

from __future__ import annotations

from django.db.utils import Error

from modelqueue.engines.base import Engine

_TRY_AGAIN = {
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
    "55P03",  # lock_not_available
}
_IDLE = 0  # libpq's PQTRANS_IDLE, the same in psycopg 2 and 3


class PostgreSQLEngine(Engine):
    def is_try_again(self, error: Error) -> bool:
        cause = error.__cause__
        # psycopg 3 calls it sqlstate, psycopg 2 pgcode
        return (getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)) in _TRY_AGAIN

    def _roll_back_open_transaction(self) -> bool:
        connection = self.connection.connection
        if connection.info.transaction_status == _IDLE:
            return False
        connection.rollback()
        return True
