"""How big a worker is and how it behaves: what stands on the command line."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ASYNC_SLOTS", "Options"]

#: Tasks of an ``async def`` queue that a process runs at a time, where the queue does not say.
ASYNC_SLOTS = 100


@dataclass(frozen=True)
class Options:
    """What a worker is told. Sent to its processes, so it holds plain values."""

    names: tuple[str, ...]
    """The queues it serves."""
    processes: int = 1
    threads: int = 4
    """Synchronous actions that each process runs at a time."""
    alone: bool = False
    """Whether a process runs tasks on their last attempt, one at a time, instead of all others."""
    poll: float = 1.0
    """Seconds between two looks for work after a long idle time."""
    grace: float = 25.0
    """Seconds that running actions have to end when the worker is stopped."""
    drain: bool = False
    """Whether to stop when nothing is due."""
    max_tasks: int | None = None
    """Tasks after which a process is replaced."""
    max_memory: int | None = None
    """MiB of memory above which a process is replaced."""
    max_seconds: float | None = None
    """Seconds after which a process is replaced."""
    health_file: str | None = None
    """A file that is written every second while the worker is well."""
    verbosity: int = 1
    """How much it says, see `show_log_lines`."""
    version: str = ""
    """Of modelqueue, for the names of its sessions; empty: they have none."""
