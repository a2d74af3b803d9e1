"""What a task does, the same for each contender. It is named by BENCHMARK_KIND.

Imports nothing but the standard library, as each contender has an environment of its own.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

#: Seconds that a task of this kind sleeps.
SLEEPS = {"sleep 10 ms": 0.01, "sleep 50 ms": 0.05, "sleep 10 min": 600.0}
#: Seconds of the processor that a task of this kind takes.
SPINS = {"1 ms of CPU": 0.001}
KINDS = ("nothing", *SPINS, *SLEEPS)

_RECORD = struct.Struct("dqq")
"""When it was, in which process, and which task it was."""


def action() -> Callable[[int], None]:
    """Return what a synchronous contender calls with the number of a task."""
    kind, tell = os.environ["BENCHMARK_KIND"], teller()
    seconds, spin = SLEEPS.get(kind, 0.0), SPINS.get(kind, 0.0)

    def act(task: int) -> None:
        if tell is not None:
            tell(task)
        if seconds:
            time.sleep(seconds)
        elif spin:
            until = time.thread_time() + spin
            while time.thread_time() < until:
                pass

    return act


def async_action() -> Callable[[int], Coroutine[Any, Any, None]]:
    """Return the same for a contender that is asynchronous."""
    act, seconds = action(), SLEEPS.get(os.environ["BENCHMARK_KIND"], 0.0)
    tell = teller()

    async def doze(task: int) -> None:
        if tell is not None:
            tell(task)
        await asyncio.sleep(seconds)

    async def act_at_once(task: int) -> None:
        act(task)

    return doze if seconds else act_at_once


# Where a database can not say when a task was done, or is not asked, the action does


def teller() -> Callable[[int], None] | None:
    """Return what notes that a task begins, in the file BENCHMARK_TOLD if there is one to be."""
    if not (path := os.environ.get("BENCHMARK_TOLD")):
        return None
    return teller_into(path)


def teller_into(path: str) -> Callable[[int], None]:
    files: dict[int, int] = {}

    def tell(task: int) -> None:
        now, process = time.time(), os.getpid()
        file = files.get(process)
        if file is None:  # a fork has its own
            file = files[process] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.write(file, _RECORD.pack(now, process, task))

    return tell


def count_told(path: Path) -> int:
    return path.stat().st_size // _RECORD.size if path.exists() else 0


def told(path: Path) -> Iterator[tuple[float, int, int]]:
    """Yield what has been told: time, process, task."""
    content = path.read_bytes() if path.exists() else b""
    return _RECORD.iter_unpack(content[: len(content) // _RECORD.size * _RECORD.size])
