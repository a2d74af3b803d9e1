"""The bell of a process: who rings it wakes the claimer, from within the process or from its supervisor.

A word by the pipe of the process would first wake its main thread, and that the claimer. To wait for the
claimer twice costs a third of a millisecond, a fifth of what it takes until the action of a new task begins.
"""

from __future__ import annotations

import math
import select
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from modelqueue.worker.system import context

__all__ = ["Bell", "File"]


class File(Protocol):
    """What can be waited for."""

    def fileno(self) -> int: ...


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
        self._files: Sequence[File] = ()
        self._poll: Callable[[float | None], set[int]] | None = None

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

    def wait(self, seconds: float | None, files: Sequence[File] = ()) -> None:
        """Wait until it is rung, or has been since this was called last; None: however long that takes.

        Args:
            files: wait also until there is something to read in one of these.
        """
        if self._poll is None or files != self._files:
            self._files, self._poll = files, _poll([self._reader, *files])
        if self._reader.fileno() in self._poll(seconds):
            with suppress(BlockingIOError):
                self._reader.recv(4096)

    def leave(self) -> None:
        """Let go of it, as the supervisor does of that of a dead process."""
        self._writer.close()
        self._reader.close()

    def __del__(self) -> None:
        self.leave()  # or its sockets warn that nobody has closed them


def _poll(files: Sequence[File]) -> Callable[[float | None], set[int]]:
    """Return what waits for so many seconds, and returns which of the files have something to read."""
    if not hasattr(select, "poll"):  # Windows
        return partial(_select, files)
    poller = select.poll()
    for file in files:
        poller.register(file.fileno(), select.POLLIN)
    return lambda seconds: {
        number for number, _ in poller.poll(None if seconds is None else math.ceil(seconds * 1000))
    }


def _select(files: Sequence[File], seconds: float | None) -> set[int]:
    try:
        return {file.fileno() for file in select.select(files, [], [], seconds)[0]}
    except OSError:  # of one that is closed, which is found out when it is read
        return {file.fileno() for file in files}
