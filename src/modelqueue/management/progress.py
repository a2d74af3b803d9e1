"""How far a long job has come: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any, TextIO

from modelqueue.durations import in_short

__all__ = ["Progress"]


class Progress:
    """Shows how much of a job is done, how fast it goes, and when it will have ended.

    A context manager. On a terminal it is the bar of tqdm, where that is installed; else a line now and then,
    so that a log does not fill up with them, and none for a job that ends sooner.

    Args:
        what: what is done, such as "deleted".
        total: how much there is to do, if that is known. It may turn out to be more.
        stream: where to, the standard error by default.
        every: seconds between two lines.
    """

    def __init__(
        self, what: str, total: int | None = None, stream: TextIO | None = None, every: float = 5.0
    ) -> None:
        self.what = what
        self.total = total
        self.count = 0
        self._stream = sys.stderr if stream is None else stream
        self._every = every
        self._began = self._told = time.monotonic()
        self._bar = self._make_bar()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def rate(self) -> float:
        """How many a second, since it began."""
        seconds = time.monotonic() - self._began
        return self.count / seconds if seconds else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds until the end; None where nobody knows."""
        if self.total is None or not self.rate:
            return None
        return max(self.total - self.count, 0) / self.rate

    def add(self, count: int) -> None:
        """Tell that so many more are done."""
        self.count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._told >= self._every:
            self._told = time.monotonic()
            self._stream.write(f"{self}\n")
            self._stream.flush()

    def close(self) -> None:
        """End the bar, so that what is written next has a line of its own."""
        if self._bar is not None:
            self._bar.close()

    def __str__(self) -> str:
        total = "" if self.total is None else f" of {self.total:,}"
        eta = "" if self.eta is None else f", {in_short(self.eta)} left"
        return f"{self.what}: {self.count:,}{total}, {self.rate:,.0f} a second{eta}"

    def _make_bar(self) -> Any:
        if not self._stream.isatty():
            return None
        try:
            tqdm = importlib.import_module("tqdm")
        except ImportError:  # it is an extra
            return None
        return tqdm.tqdm(desc=self.what, total=self.total, file=self._stream, dynamic_ncols=True)
