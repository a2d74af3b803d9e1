"""Adds a task each time it is told to, and says when that was committed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any


def feed(add: Callable[[int], Any]) -> None:
    """Add a task to the queue with the number that each line of the input has."""
    for line in sys.stdin:
        add(int(line))
        print(f"added {time.time()}", flush=True)
