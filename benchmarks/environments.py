"""An environment of its own for each contender, with its packages from the package index."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from benchmarks.roster import Contender
from benchmarks.stores import Unavailable

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "contenders"
#: What a process gets as PYTHONPATH that runs with this checkout.
CHECKOUT = os.pathsep.join([str(ROOT / "src"), str(ROOT)])


def python_of(contender: Contender) -> str:
    """Return the Python of a contender, with its packages.

    Raises:
        Unavailable: they can not be had.
    """
    return python_with(f"{contender.name}-{contender.store}", contender.requirements, contender.python)


@cache
def python_with(name: str, requirements: tuple[str, ...], least: tuple[int, int] = (3, 10)) -> str:
    """Return a Python that has the packages, and is made if it is not there; without any it is this one.

    Args:
        least: the oldest version that will do.

    Raises:
        Unavailable: they can not be had.
    """
    if not requirements:
        return sys.executable
    base = _interpreter(least)
    folder = FOLDER / re.sub(r"[^a-z0-9.]+", "-", name.lower())
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    stamp, wanted = folder / ".stamp", "\n".join([sys.version, base, *requirements])
    if not (stamp.exists() and stamp.read_text() == wanted):
        uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
        if uv is None:
            raise Unavailable("there is no uv to get its packages with")
        _run(uv, "venv", "--quiet", "--clear", "--python", base, str(folder))
        _run(uv, "pip", "install", "--quiet", "--python", str(python), *requirements)
        stamp.write_text(wanted)
    return str(python)


def _interpreter(least: tuple[int, int]) -> str:
    """Return this Python, or else one of this machine that is new enough."""
    if sys.version_info[:2] >= least:
        return sys.executable
    # The shims of pyenv refuse a version that is not activated, so look behind them.
    folders = [*map(Path, os.get_exec_path()), *(Path.home() / ".pyenv" / "versions").glob("3.*/bin")]
    for minor in range(least[1], least[1] + 4):
        for folder in folders:
            python = folder / f"python{least[0]}.{minor}"
            if python.exists() and _starts(python):
                return str(python)
    raise Unavailable(f"it needs Python {least[0]}.{least[1]}, which this machine lacks")


def _starts(python: Path) -> bool:
    return not subprocess.run([python, "-c", ""], check=False, capture_output=True).returncode


@cache
def versions(python: str, requirements: tuple[str, ...]) -> list[str]:
    """Return which versions of the packages it has."""
    names = [match.group() for one in requirements if (match := re.match(r"[\w.-]+", one))]
    code = f"from importlib.metadata import version\nfor name in {names}: print(name, version(name))"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it does not say why"]
        raise Unavailable(f"{Path(command[0]).name} {command[1]} has failed: {last[0]}")
