"""Every setting: its name, its default, and what it does. All are optional.

They stand in one dictionary of the project's settings, and are read when they are used::

    MODELQUEUE = {"ENGINE": "portable", "PREPARED_STATEMENTS": False}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

__all__ = ["SETTINGS", "Setting", "get", "problems"]


@dataclass(frozen=True)
class Setting:
    """One setting: what it is without being set, what it may be, and what it does."""

    default: Any
    choices: tuple[Any, ...]
    help: str


SETTINGS = {
    "ENGINE": Setting(
        "auto",
        ("auto", "portable"),
        'How tasks are claimed: "auto" is the fastest way that the database has, "portable" the one that '
        "works on every database, step by step.",
    ),
    "PREPARED_STATEMENTS": Setting(
        True,
        (True, False),
        "Whether statements that a session sends often are prepared (PostgreSQL). PgBouncer does not mind; "
        "Amazon's RDS Proxy pins the session.",
    ),
}


def get(name: str) -> Any:
    """Return the value of a setting.

    Raises:
        django.core.exceptions.ImproperlyConfigured: the project has given it a value that it can not have.
    """
    setting = SETTINGS[name]
    given = getattr(settings, "MODELQUEUE", {})
    value = given.get(name, setting.default) if isinstance(given, dict) else None
    if value not in setting.choices:
        raise ImproperlyConfigured(" ".join(problems()[0]))
    return value


def problems() -> list[tuple[str, str]]:
    """Return what is wrong with the project's settings: pairs of the problem and the cure."""
    given = getattr(settings, "MODELQUEUE", {})
    if not isinstance(given, dict):
        return [(f"MODELQUEUE is {given!r}, not a dictionary.", 'Give for example {"ENGINE": "auto"}.')]
    found = []
    for name, value in given.items():
        if name not in SETTINGS:
            found.append((f"MODELQUEUE has no setting {name!r}.", f"There are: {', '.join(SETTINGS)}."))
        elif value not in SETTINGS[name].choices:
            default = SETTINGS[name].default
            found.append((_wrong_value(name, value), f"Remove it for the default, {default!r}."))
    return found


def _wrong_value(name: str, value: object) -> str:
    choices = " or ".join(map(repr, SETTINGS[name].choices))
    return f"MODELQUEUE[{name!r}] is {value!r}, but can only be {choices}."
