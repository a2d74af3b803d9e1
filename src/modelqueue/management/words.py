"""How several sub-commands say things: numbers, and what to do about an error."""

from __future__ import annotations

from django.db import Error, InterfaceError, OperationalError, ProgrammingError, connections

from modelqueue.engines import engine_for

__all__ = ["DATABASE_HINT", "SOURCE_HINT", "counted", "hint", "trouble"]

#: What to look at when a database can not be used.
DATABASE_HINT = (
    "Is its server up, does DATABASES name the right one, may its user use the table, and are all migrations "
    "applied (migrate)?"
)

LOCK_HINT = "Somebody holds a lock, in a long transaction perhaps. Try again."
REFUSAL_HINT = "Is it against a constraint or a trigger of the table?"
#: What to look at when a queue gives no queryset.
SOURCE_HINT = "What it is declared over has to give a queryset of its model each time."


def hint(error: Exception) -> str:
    """Return what to look at after an error."""
    if not isinstance(error, Error):
        return SOURCE_HINT
    if _is_lock(error):
        return LOCK_HINT
    unusable = isinstance(error, (InterfaceError, OperationalError, ProgrammingError))
    return DATABASE_HINT if unusable else REFUSAL_HINT


def trouble(error: Error) -> str:
    """Return what has happened, to stand before the text of an error."""
    return {
        DATABASE_HINT: "The database can not be used",
        LOCK_HINT: "The database is busy",
        REFUSAL_HINT: "The database has refused it",
    }[hint(error)]


def _is_lock(error: Error) -> bool:
    """Say whether a database asks to try again: somebody holds a lock, or it was a deadlock."""
    used = connections.all(initialized_only=True)
    return any(engine_for(connection.alias).is_try_again(error) for connection in used)


def counted(count: int, what: str) -> str:
    """Return how many of a thing there are.

    >>> counted(1, "task"), counted(1204, "task"), counted(2, "process")
    ('1 task', '1,204 tasks', '2 processes')
    """
    many = "" if count == 1 else "es" if what.endswith("s") else "s"
    return f"{count:,} {what}{many}"
