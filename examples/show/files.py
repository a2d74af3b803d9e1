"""The input: every Python file that this machine has anyway."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

INVALID = Path(__file__).resolve().parent.parent / "invalid"


def choose(limit: int) -> tuple[list[Path], str]:
    """Return the files, and a sentence on where they are from.

    All of them up to the limit, else as many of all sizes, the largest included; and always the files that
    are not valid. In random order, the same each time, so that the work is spread evenly.
    """
    standard = _python_files(Path(sysconfig.get_path("stdlib")))
    packages = {
        file for name in ("purelib", "platlib") for file in _python_files(Path(sysconfig.get_path(name)))
    }
    invalid = sorted(INVALID.glob("*.py"))
    files = sorted(standard | packages, key=lambda file: (file.stat().st_size, file), reverse=True)
    text = (
        f"{len(standard):,} of Python's standard library, {len(packages):,} of the installed packages, "
        f"{len(invalid)} of our own that are not valid"
    )
    if 0 < limit < len(files):
        files = [files[index * len(files) // limit] for index in range(limit)]
        text += f"; {limit:,} of the {len(standard | packages):,} are taken, see --files"
    files += invalid
    random.Random(0).shuffle(files)
    return files, text


def _python_files(folder: Path) -> set[Path]:
    # Some Pythons keep the installed packages inside their standard library.
    return {
        file
        for file in folder.rglob("*.py")
        if file.is_file() and not {"site-packages", "dist-packages"} & set(file.relative_to(folder).parts)
    }


def short(path: str) -> str:
    """Return the end of a path, as much as tells which file it is."""
    return "/".join(Path(path).parts[-3:])
