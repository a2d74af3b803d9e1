"""Calls functions of a contender, and says how long each took.

python -m benchmarks.contenders with_pgqueuer create enqueue 1000
"""

from __future__ import annotations

import sys
import time
from importlib import import_module


def main(module: str, *words: str) -> None:
    contender = import_module(f"benchmarks.contenders.{module}")
    for call in calls(list(words)):
        function, *numbers = call
        began = time.perf_counter()
        getattr(contender, function)(*map(int, numbers))
        print(f"took {function} {time.perf_counter() - began}", flush=True)


def calls(words: list[str]) -> list[list[str]]:
    """Part the words into calls, each a name and the numbers behind it."""
    parted: list[list[str]] = []
    for word in words:
        if word.isdigit():
            parted[-1].append(word)
        else:
            parted.append([word])
    return parted


if __name__ == "__main__":
    main(*sys.argv[1:])
