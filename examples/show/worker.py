"""A worker, and what it tells: the log lines of modelqueue, as JSON on its standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

#: The demo is of this one alone.
QUEUE = "documents.analyze"
MANAGE = Path(__file__).resolve().parent.parent / "manage.py"

Line = dict[str, Any]


class Worker:
    """`manage.py modelqueue worker --drain`. Leaving the context stops it, if it has not ended by then.

    Its processes share its standard output, so one thread hears all of them.
    """

    def __init__(self, processes: int, log: TextIO, hear: Callable[[Line], None]) -> None:
        self._log = log
        self._hear = hear
        self._last_words: list[str] = []
        # Old files have odd escapes in their strings, which Python would warn of again and again.
        warnings = "ignore::SyntaxWarning,ignore::DeprecationWarning"
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(MANAGE),
                "modelqueue",
                "worker",
                QUEUE,
                "--drain",
                "--processes",
                str(processes),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": warnings},
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """Of the supervisor, which starts the processes and replaces a dead one."""
        return self._process.pid

    def is_gone(self) -> bool:
        """Say whether it has ended, and all that it said was heard."""
        return self._process.poll() is not None and not self._listener.is_alive()

    def failure(self) -> str | None:
        """Return what is to be said of a worker that ended by a fault of its own."""
        if self._process.returncode in (0, 3):  # 3: in the last moment something became due
            return None
        return f"the worker ended with code {self._process.returncode}: {self.last_words}"

    @property
    def last_words(self) -> str:
        return " ".join(self._last_words)

    def _listen(self) -> None:
        output = self._process.stdout
        if output is None:
            return
        with output:
            for text in output:
                self._log.write(text)
                try:
                    line = json.loads(text)
                except ValueError:  # a traceback, what it tells people, or a line that the kill cut short
                    line = None
                if isinstance(line, dict):
                    self._hear(line)
                else:
                    self._last_words = [*self._last_words[-4:], text.strip()]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its processes notice, and stop
            self._process.wait()
        self._listener.join()
