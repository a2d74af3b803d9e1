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
    def __init__(self, receiver: socket.socket) -> None:
        self._receiver = receiver

    def next(self) -> float:
        """Wait for the next action to begin; return when it did."""
        return float(self._receiver.recv(100))


@contextmanager
def moments() -> Iterator[Moments]:
    """Receive what the processes tell that are started meanwhile."""
    with (
        tempfile.TemporaryDirectory(prefix="modelqueue-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver,
    ):
        address = str(Path(folder) / "moments")
        receiver.bind(address)
        receiver.settimeout(PATIENCE)
        os.environ["BENCHMARK_MOMENTS"] = address
        yield Moments(receiver)
