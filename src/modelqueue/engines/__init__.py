"""Engines: the only code that knows what databases do differently. `engine_for` chooses one."""

from __future__ import annotations

from django.db import connections

from modelqueue.engines.base import Engine
from modelqueue.engines.claims import Candidate, Claim, Renewal, Verdict
from modelqueue.engines.mysql import MySQLEngine
from modelqueue.engines.postgresql import PostgreSQLEngine
from modelqueue.engines.sessions import Place, RowLocked
from modelqueue.engines.sqlite import SQLiteEngine

__all__ = ["Candidate", "Claim", "Engine", "Place", "Renewal", "RowLocked", "Verdict", "engine_for"]

_ENGINES: dict[str, type[Engine]] = {
    "mysql": MySQLEngine,
    "postgresql": PostgreSQLEngine,
    "sqlite": SQLiteEngine,
}


def engine_for(using: str) -> Engine:
    """Return the engine for a database alias; the portable one for a vendor that has none of its own."""
    return _ENGINES.get(connections[using].vendor, Engine)(using)
