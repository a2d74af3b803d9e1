"""What was measured on: machine, date, versions."""

from __future__ import annotations

import datetime as dt
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import django


def description(versions: Iterable[str]) -> str:
    """Return lines of Markdown to stand above the tables."""
    facts = [
        f"{dt.datetime.now(dt.timezone.utc):%d %B %Y %H:%M} UTC",
        platform.platform(),
        f"{os.cpu_count()} cores, {_processor()}",
        f"Python {platform.python_version()}",
        f"Django {django.__version__}",
        *versions,
    ]
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    return f"Command: `{command}`\n\n{'; '.join(dict.fromkeys(facts))}.\n"


def load() -> str:
    """Return how busy the machine was in the last minute."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory(process: int) -> float:
    """Return the MiB of a process with all that descend from it, where what is shared counts once.

    Zero where the system does not tell it.
    """
    return sum(map(_share, _family(process))) / 1024


def processor(process: int) -> float:
    """Return how many seconds of the processor it has taken, with all that descend from it.

    Those that have ended count, if somebody has waited for them. Zero where the system does not tell it.
    """
    ticks = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 1
    return sum(sum(map(int, fields[11:15])) for fields in _family(process).values()) / ticks


def _family(process: int) -> dict[int, list[str]]:
    """Return what /proc tells of a process and of all that descend from it, from its third field on."""
    known = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            known[int(stat.parent.name)] = stat.read_text().rpartition(")")[2].split()
    family = {process} & set(known)
    while more := {one for one, fields in known.items() if int(fields[1]) in family} - family:
        family |= more
    return {one: known[one] for one in family}


def _share(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
