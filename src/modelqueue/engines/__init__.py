"""Engines: the only code that knows what databases do differently. `engine_for` chooses one."""

from __future__ import annotations

from django.db import connections

from modelqueue.engines.base import Engine
from modelqueue.engines.claims import Candidate, Change, Claim, Note, Renewal, Verdict
from modelqueue.engines.mysql import MySQLEngine
from modelqueue.engines.postgresql import PostgreSQLEngine
from modelqueue.engines.sessions import Place, RowLocked, end_queries_of, full_since, note_full
from modelqueue.engines.sqlite import SQLiteEngine

__all__ = [
    "Candidate",
    "Change",
    "Claim",
    "Engine",
    "Note",
    "Place",
    "Renewal",
    "RowLocked",
    "Verdict",
    "end_queries_of",
    "engine_for",
    "full_since",
    "note_full",
]

_ENGINES: dict[str, type[Engine]] = {
    "mysql": MySQLEngine,
    "postgresql": PostgreSQLEngine,
    "sqlite": SQLiteEngine,
}


def engine_for(using: str) -> Engine:
    """Return the engine for a database alias; the portable one for a vendor that has none of its own.

    It is for the thread that asks. To ask takes 3 us, nearly all of it Django's, as the connection may belong
    to a coroutine: as long as all else of a short task.
    """
    return _ENGINES.get(connections[using].vendor, Engine)(using)
