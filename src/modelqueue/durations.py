"""Durations as people write and read them: ``90``, ``90s``, ``5m``, ``12h``, ``30d``.

Pure Python.
"""

from __future__ import annotations

import datetime as dt
import re

__all__ = ["in_short", "parse_duration"]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str, needs_unit: bool = False) -> dt.timedelta:
    """Return the duration that a number and its unit mean; without a unit they are seconds.

    Args:
        needs_unit: whether a number alone is refused, where a wrong guess would do harm.

    Raises:
        ValueError: it is none, or is longer than a `datetime.timedelta` can be.

    >>> parse_duration("90"), parse_duration("1.5h")
    (datetime.timedelta(seconds=90), datetime.timedelta(seconds=5400))
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip(), re.ASCII)
    if found is None:
        raise ValueError(f"{text!r} is no duration. Give seconds, or for example 90s, 5m, 12h, 30d.")
    number, unit = found.groups()
    if needs_unit and not unit:
        raise ValueError(
            f"{text!r} has no unit. Give for example {number}s, {number}m, {number}h or {number}d."
        )
    try:
        return dt.timedelta(seconds=float(number) * _SECONDS[unit or "s"])
    except OverflowError:
        raise ValueError(f"{text!r} is longer than a duration can be, {dt.timedelta.max.days}d.") from None


def in_short(seconds: float) -> str:
    """Return a duration in its two largest units.

    >>> in_short(7), in_short(303), in_short(7200), in_short(100_000), in_short(0.3)
    ('7s', '5m 3s', '2h', '1d 3h', '0s')
    """
    rest = int(max(seconds, 0))
    parts = []
    for unit, size in reversed(_SECONDS.items()):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
            if len(parts) == 2:
                break
        elif parts:
            break
    return " ".join(parts) or "0s"
