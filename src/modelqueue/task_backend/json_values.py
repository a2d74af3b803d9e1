"""Arguments and return values as JSON that the database keeps; what it does not is refused before a write."""

from __future__ import annotations

import json
import re
from typing import Any

from modelqueue.engines import engine_for
from modelqueue.task_backend.apis import Api

__all__ = ["as_json"]

#: Levels of lists and dictionaries that every database takes.
_EVERYWHERE = 31
#: JSON writes NUL as an escape, and a text that only looks like one with another backslash.
_NO_TEXT = re.compile(r"[\ud800-\udfff]|(?<!\\)(?:\\\\)*\\u0000")


def as_json(api: Api, value: Any, using: str) -> Any:
    """Return what JSON makes of a value, to be kept in a database.

    Raises:
        TypeError, ValueError: JSON has no such thing, or the database does not keep it. Nor has JSON NaN and
            infinite numbers: Python writes them, and no database takes what it wrote.
    """
    try:
        made = api.normalize_json(value)
        text = json.dumps(made, allow_nan=False, ensure_ascii=False)
    except RecursionError:
        raise ValueError("it contains itself, or is nested too deeply") from None
    if _NO_TEXT.search(text):
        raise ValueError("a text in it has NUL or half of a surrogate pair, which not every database keeps")
    # The database is asked where it matters alone: a thread that runs actions may have no connection yet.
    if text.count("[") + text.count("{") > _EVERYWHERE and (depth := _depth(made)) > _EVERYWHERE:
        deepest = engine_for(using).deepest_json()
        if deepest is not None and depth > deepest:
            raise ValueError(f"it is nested {depth} levels deep, and the database takes {deepest} of JSON")
    return made


def _depth(value: Any) -> int:
    """Return how many levels of lists and dictionaries there are."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, (list, dict))]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth
