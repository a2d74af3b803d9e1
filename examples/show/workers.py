"""Worker processes, and what they tell: the log lines of modelqueue, as JSON on their standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

MANAGE = Path(__file__).resolve().parent.parent / "manage.py"

Event = dict[str, Any]
Hear = Callable[["Worker", Event], None]


class Worker:
    """One process of `manage.py analyze_documents`."""

    def __init__(self, log: TextIO, hear: Hear) -> None:
        self.process = subprocess.Popen(
            # Old files have odd escapes in their strings, which Python would warn of again and again.
            [
                *(sys.executable, "-W", "ignore::SyntaxWarning", "-W", "ignore::DeprecationWarning"),
                *(str(MANAGE), "analyze_documents", "--until-done"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        )
        self.was_killed = False
        self.holds: int | None = None
        """The primary key of the document that it has claimed and not yet reported on."""
        self._last_words: list[str] = []
        self.listener = threading.Thread(target=self._listen, args=(log, hear), daemon=True)
        self.listener.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """End it without a chance to tidy up: SIGKILL, on Windows TerminateProcess."""
        self.was_killed = True
        self.process.kill()

    def is_gone(self) -> bool:
        """Say whether it has ended, and all that it said was heard."""
        return self.process.poll() is not None and not self.listener.is_alive()

    def failure(self) -> str | None:
        """Return what is to be said of a worker that ended by a fault of its own."""
        if self.was_killed or not self.process.returncode:
            return None
        return f"worker {self.pid} ended with code {self.process.returncode}: {' '.join(self._last_words)}"

    def _listen(self, log: TextIO, hear: Hear) -> None:
        output = self.process.stdout
        if output is None:
            return
        with output:
            for line in output:
                log.write(line)
                try:
                    event = json.loads(line)
                except ValueError:  # a traceback, or the line that the kill cut short
                    self._last_words = [*self._last_words[-4:], line.strip()]
                    continue
                if "event" in event:
                    hear(self, event)


class Workers:
    """Starts workers, and leaves none behind."""

    def __init__(self, log: TextIO, hear: Hear) -> None:
        self.started: list[Worker] = []
        self._log = log
        self._hear = hear

    def start(self) -> Worker:
        worker = Worker(self._log, self._hear)
        self.started.append(worker)
        return worker

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.started:
            worker.process.terminate()
        for worker in self.started:
            try:
                worker.process.wait(5)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.listener.join()
