"""What a database can tell about itself, for ``manage.py modelqueue doctor``. `examination_for` chooses one.

One method for each question, the same for all vendors. Whoever has no answer returns None: not known here.
"""

from __future__ import annotations

from django.db import connections

from modelqueue.engines.examinations.base import Examination
from modelqueue.engines.examinations.facts import (
    Access,
    Isolation,
    OneWriter,
    Pin,
    Plan,
    Pooler,
    Refusal,
    Silence,
    Vacuum,
)
from modelqueue.engines.examinations.mysql import MySQLExamination
from modelqueue.engines.examinations.postgresql import PostgreSQLExamination
from modelqueue.engines.examinations.sqlite import SQLiteExamination

__all__ = [
    "Access",
    "Examination",
    "Isolation",
    "OneWriter",
    "Pin",
    "Plan",
    "Pooler",
    "Refusal",
    "Silence",
    "Vacuum",
    "examination_for",
]

_EXAMINATIONS: dict[str, type[Examination]] = {
    "mysql": MySQLExamination,
    "postgresql": PostgreSQLExamination,
    "sqlite": SQLiteExamination,
}


def examination_for(using: str) -> Examination:
    """Return that of a database alias; for a vendor without one of its own, what any database can tell."""
    return _EXAMINATIONS.get(connections[using].vendor, Examination)(using)
