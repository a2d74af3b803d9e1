"""Where the actions of a soak leave that they run, have ended, and were run twice."""

from __future__ import annotations

from pathlib import Path

#: The variable that says in which folder.
FOLDER = "MODELQUEUE_SOAK_FOLDER"


def make_folders(folder: Path) -> None:
    for name in ("running", "ended", "twice"):
        (folder / name).mkdir()
