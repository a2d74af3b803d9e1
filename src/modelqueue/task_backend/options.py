"""What stands in ``TASKS[alias]["OPTIONS"]``: checked in full when the backend is built."""

from __future__ import annotations

import datetime as dt
import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.utils.module_loading import import_string

from modelqueue.backoff import Delay
from modelqueue.outcomes import Policy
from modelqueue.queues import DEFAULT_LEASE, DEFAULT_RETRY, checked_lease
from modelqueue.status import ONE_HOUR, ZERO_SECS

__all__ = ["OPTIONS", "Options", "backends_of_setting", "duration"]

#: Each option, and what it does.
OPTIONS = {
    "database": "the alias of the database that the tasks are in; by default the one that the routers name",
    "retry": "attempts after the first that failed, 0 to 8, or None for no limit (default: 3)",
    "timeout": "how long an attempt may take, in seconds or as a timedelta (default: an hour)",
    "lease": "after how long without a sign of life from its worker a task is taken back (default: 30 s)",
    "delay": "how long a task waits after a failed attempt: seconds, a timedelta, a callable "
    "(attempts) -> timedelta, or its dotted path (default: 0)",
    "result_ttl": "after how long finished and failed tasks are deleted; None: never (default)",
    "id_function": "a callable without arguments, or its dotted path, that makes the id of a result, of 64 "
    "characters at most",
}


def backends_of_setting() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the backends that the setting TASKS names; what can be none Django tells of."""
    setting = getattr(settings, "TASKS", {})
    if isinstance(setting, Mapping):
        yield from ((alias, one) for alias, one in setting.items() if isinstance(one, Mapping))


@dataclass(frozen=True)
class Options:
    database: str | None = None
    retry: int | None = DEFAULT_RETRY
    timeout: dt.timedelta = ONE_HOUR
    lease: dt.timedelta = DEFAULT_LEASE
    delay: Delay = ZERO_SECS
    result_ttl: dt.timedelta | None = None
    id_function: Callable[[], object] | None = None

    @classmethod
    def of(cls, given: object) -> Options:
        """Check options.

        Raises:
            TypeError, ValueError: what is wrong, and what to do about it.
        """
        if not isinstance(given, Mapping):
            raise TypeError(f"OPTIONS is {given!r}, not a dictionary. There are: {', '.join(OPTIONS)}.")
        for name in given:
            if name not in OPTIONS:
                raise ValueError(f"there is no option {name!r}. {_suggestion(name)}")
        known: dict[str, Any] = dict(given)
        for name in ("timeout", "lease", "result_ttl"):
            if name in known and not (name == "result_ttl" and known[name] is None):
                known[name] = duration(name, known[name])
        if "delay" in known:
            known["delay"] = _delay(known["delay"])
        if known.get("id_function") is not None:
            known["id_function"] = _callable("id_function", known["id_function"])
        if (database := known.get("database")) is not None and not isinstance(database, str):
            raise TypeError(f"database={database!r} is no alias of DATABASES, a str.")
        made = cls(**known)
        Policy.of(made.retry, made.timeout, made.delay)
        checked_lease(made.lease)
        if made.result_ttl is not None and made.result_ttl < ZERO_SECS:
            raise ValueError(f"result_ttl={made.result_ttl} is negative. Give None to keep results for ever.")
        return made


def duration(name: str, value: object) -> dt.timedelta:
    """Return a duration that is given in seconds or as a timedelta.

    Raises:
        TypeError, ValueError: it is neither, or too long.
    """
    if isinstance(value, dt.timedelta):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a number of seconds or a datetime.timedelta, not {value!r}.")
    try:
        return dt.timedelta(seconds=value)
    except (OverflowError, ValueError):
        raise ValueError(f"{name}={value!r} is no number of seconds that a timedelta can hold.") from None


def _delay(value: object) -> Delay:
    if isinstance(value, str):
        value = _callable("delay", value)
    made: Delay = value if callable(value) else duration("delay", value)
    return made


def _callable(name: str, value: object) -> Callable[..., Any]:
    found = value
    if isinstance(value, str):
        try:
            found = import_string(value)
        except ImportError as error:
            raise ValueError(f"{name}={value!r} can not be imported: {error}") from error
    if not callable(found):
        raise TypeError(f"{name}={value!r} is no callable, nor the dotted path of one.")
    return found


def _suggestion(name: object) -> str:
    close = difflib.get_close_matches(str(name), OPTIONS, n=1)
    meant = f"Did you mean {close[0]!r}? " if close else ""
    return f"{meant}There are: {', '.join(OPTIONS)}."
