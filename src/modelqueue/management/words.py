"""How several sub-commands say things."""

from __future__ import annotations

__all__ = ["DATABASE_HINT", "SOURCE_HINT", "counted"]

#: What to look at when a database can not be used.
DATABASE_HINT = (
    "Is its server up, does DATABASES name the right one, and are all migrations applied (migrate)?"
)

#: What to look at when a queue gives no queryset.
SOURCE_HINT = "What it is declared over has to give a queryset of its model each time."


def counted(count: int, what: str) -> str:
    """Return how many of a thing there are.

    >>> counted(1, "task"), counted(1204, "task"), counted(2, "process")
    ('1 task', '1,204 tasks', '2 processes')
    """
    many = "" if count == 1 else "es" if what.endswith("s") else "s"
    return f"{count:,} {what}{many}"
