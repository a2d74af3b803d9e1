"""The bell of a process: who rings it wakes the claimer, from within the process or from its supervisor.

A word by the pipe of the process would first wake its main thread, and that the claimer. To wait for the
claimer twice costs a third of a millisecond, a fifth of what it takes until the action of a new task begins.
"""

from __future__ import annotations

import math
import select
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property

from modelqueue.worker.system import context

__all__ = ["Bell"]


class Bell:
    """Rung by anybody, at any time, without waiting; heard by one thread of one process.

    Args:
        names: of all queues for which it can be rung.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        #: For which queues it was rung. In shared memory, as there may be no room for a message.
        self._rung = context().RawArray("b", len(self._places))
        # Sockets, as Windows can not wait for pipes, nor have them make nobody wait.
        self._reader, self._writer = socket.socketpair()
        for end in self._reader, self._writer:
            end.setblocking(False)

    def ring(self, names: Iterable[str] = ()) -> None:
        """Wake who listens; say of which queues there may be due tasks. Other names are passed over."""
        for name in names:
            if (place := self._places.get(name)) is not None:
                self._rung[place] = 1
        # After the names, or who wakes up might not see them yet.
        with suppress(OSError):  # it is ringing, or nobody is there any more
            self._writer.send(b".")

    def heard(self) -> list[str]:
        """Return for which queues it was rung since this was asked last."""
        names = [name for name, place in self._places.items() if self._rung[place]]
        for name in names:
            self._rung[self._places[name]] = 0
        return names

    def wait(self, seconds: float | None) -> None:
        """Wait until it is rung, or has been since this was called last; None: however long that takes."""
        if self._poll(seconds):
            with suppress(BlockingIOError):
                self._reader.recv(4096)

    @cached_property
    def _poll(self) -> Callable[[float | None], object]:
        """Wait for so many seconds until there is something to read."""
        if not hasattr(select, "poll"):  # Windows
            return lambda seconds: select.select([self._reader], [], [], seconds)[0]
        poller = select.poll()
        poller.register(self._reader.fileno(), select.POLLIN)
        return lambda seconds: poller.poll(None if seconds is None else math.ceil(seconds * 1000))

    def leave(self) -> None:
        """Let go of it, as the supervisor does of that of a dead process."""
        self._writer.close()
        self._reader.close()

    def __del__(self) -> None:
        self.leave()  # or its sockets warn that nobody has closed them
