"""The health file: who watches over the worker looks when it was written last."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Health"]

logger = logging.getLogger("modelqueue")

#: Seconds between two times that it is written.
_INTERVAL = 1.0


class Health:
    def __init__(self, path: str | None) -> None:
        self._path = path
        self._next = 0.0
        self._is_failing = False

    def write(self, processes: Sequence[int | None]) -> None:
        """Say that the worker is well; if it can not be written, that is told once."""
        path = self._path
        if path is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _INTERVAL
        facts = {"time": time.time(), "pid": os.getpid(), "processes": processes}
        temporary = Path(f"{path}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(facts))
            temporary.replace(path)
        except OSError as error:
            level = logging.DEBUG if self._is_failing else logging.ERROR
            logger.log(level, "The health file %s can not be written: %s", path, error)
            self._is_failing = True
        else:
            self._is_failing = False
