"""When an action began, told to the benchmark at once, and the same way by every worker that is measured."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Seconds after which a task is not waited for any more.
PATIENCE = 60.0


def tell() -> None:
    """To be called by an action, first of all."""
    now = time.time()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(repr(now).encode(), os.environ["BENCHMARK_MOMENTS"])


class Moments:
    def __init__(self, receiver: socket.socket, address: str) -> None:
        self._receiver = receiver
        self.address = address
        """What a process has to have as BENCHMARK_MOMENTS."""

    def next(self) -> float:
        """Wait for the next action to begin; return when it did."""
        try:
            return float(self._receiver.recv(100))
        except TimeoutError:
            raise TimeoutError(f"No task was begun within {PATIENCE:.0f} s.") from None


@contextmanager
def moments() -> Iterator[Moments]:
    with (
        tempfile.TemporaryDirectory(prefix="modelqueue-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver,
    ):
        address = str(Path(folder) / "moments")
        receiver.bind(address)
        receiver.settimeout(PATIENCE)
        yield Moments(receiver, address)
