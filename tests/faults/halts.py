"""Standing still: a real worker waits at a moment that a test has named, to be killed just then.

A test names the moment in the environment of the worker, and waits for the sign that a process is there::

    halt = Halt(tmp_path, "acting")
    worker = workers.start(variables=halt.variables)
    os.kill(halt.wait(), signal.SIGKILL)

The processes of the worker find it there when they import the queues of the test app. Only the first one that
comes to the moment stands still, in each thread that comes there, until the test lets it go on.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.processes import wait_until

#: In the life of a task: claimed, and nobody else knows; known to the supervisor; in its action; its outcome
#: written, not committed; committed, and the supervisor does not know yet.
MOMENTS = ("claimed", "told", "acting", "writing", "written")

_VARIABLE = "MODELQUEUE_TEST_HALT"
#: Seconds between two looks for a sign.
_TICK = 0.005


class Halt:
    def __init__(self, folder: Path, moment: str) -> None:
        self.folder = folder
        self.moment = moment
        self._lock = threading.Lock()
        self._both = threading.Barrier(2)

    # In the test

    @property
    def variables(self) -> dict[str, str]:
        """What the environment of the worker says."""
        return {_VARIABLE: f"{self.moment}:{self.folder}"}

    def wait(self) -> int:
        """Wait until a process is there; return its pid."""
        return int(wait_until(lambda: self._is("here") and self._sign("here").read_text()))

    def strike(self) -> None:
        """Let the actions that are a way to die go on, see `DEEDS`."""
        self._sign("strike").touch()

    def go_on(self) -> None:
        """Let everybody go on."""
        self._sign("go on").touch()

    # In the process

    def arrive(self, *_: object) -> None:
        """Stand still, if this is the first process that has come here."""
        self._wait_for("go on")

    def die(self, deed: Callable[[Halt], None]) -> None:
        """Wait until the test says so, and do the deed, if this is the first process that has come here."""
        if self._wait_for("strike") and not self.is_over:
            self._sign("strike").unlink()  # once
            deed(self)

    def begin_together(self) -> None:
        """Let the first two actions begin before the first ends: its outcome may lock the whole database."""
        if not self._is("begun"):
            self._both.wait(30)
            self._sign("begun").touch()

    def _wait_for(self, sign: str) -> bool:
        """Wait for a sign, unless all may go on; return whether there was something to wait for."""
        with self._lock:
            if not self._is("here"):
                self._sign("here").write_text(str(os.getpid()))
        if self.is_over or self._sign("here").read_text() != str(os.getpid()):
            return False
        while not self.is_over and not self._is(sign):
            time.sleep(_TICK)
        return True

    @property
    def is_over(self) -> bool:
        return self._is("go on")

    def _is(self, sign: str) -> bool:
        return self._sign(sign).exists()

    def _sign(self, name: str) -> Path:
        return self.folder / name


# In the processes of a worker


@functools.cache
def _told() -> Halt | None:
    """What the environment of this worker says."""
    moment, _, folder = os.environ.get(_VARIABLE, "").partition(":")
    return Halt(Path(folder), moment) if moment else None


def install() -> None:
    """Stand still at the moment that the environment names. ("acting" is seen to by the actions.)"""
    halt = _told()
    if halt is None:
        return
    # Not before, as they take time to import.
    from modelqueue.worker.running import Register
    from tests.faults.points import fault_in_any_thread

    if halt.moment == "writing":
        # The first statement locks the row (SQLite: writes the status), the second one writes.
        fault_in_any_thread("outcome", "before the commit", halt.arrive, nth=2)
    elif halt.moment == "written":
        fault_in_any_thread("outcome", "before the answer", halt.arrive)
    elif halt.moment in ("claimed", "told"):
        Register.add = _around(Register.add, halt)


def _around(add: Callable[..., Any], halt: Halt) -> Callable[..., Any]:
    """`Register.add` is where a process tells of a claim, before it begins with it."""

    @functools.wraps(add)
    def wrapped(*arguments: Any) -> Any:
        if not arguments[-1]:  # a claim that has found nothing
            return add(*arguments)
        if halt.moment == "claimed":
            halt.arrive()
        added = add(*arguments)
        if halt.moment == "told":
            halt.arrive()
        return added

    return wrapped


def act(word: str) -> None:
    """What an action does that has begun, by a word of its task: stand still, or die in one of many ways."""
    halt = _told()
    if halt is None:
        return
    if halt.moment in ("writing", "written"):
        halt.begin_together()
    elif halt.moment == "acting" and word in DEEDS:
        halt.die(DEEDS[word])
    elif halt.moment == "acting":
        halt.arrive()


def _exit(halt: Halt) -> None:
    os._exit(3)


def _overflow(halt: Halt) -> None:
    """Recurse in C, in a thread with a stack that is smaller than what Python takes to be safe."""
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    threading.stack_size(64 * 2**10)
    thread = threading.Thread(target=repr, args=[nested])
    thread.start()
    thread.join()
    ctypes.string_at(0)  # where Python looks how large the stack is


def _hoard(halt: Halt) -> None:
    """Use 300 MiB of memory, until all may go on."""
    hoard = bytearray(b"x") * (300 * 2**20)
    halt.arrive()
    assert hoard


def _starve(halt: Halt) -> None:
    """Use more memory than the process may have."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**30, before[1]))
    try:
        assert bytearray(2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _ignore(halt: Halt) -> None:
    """Go on whatever is raised here."""
    while not halt.is_over:
        with suppress(BaseException):
            time.sleep(_TICK)


#: The ways to die, or not to, by their word in the title of a task.
DEEDS: dict[str, Callable[[Halt], None]] = {
    "exit": _exit,
    "overflow": _overflow,
    "hoard": _hoard,
    "starve": _starve,
    "ignore": _ignore,
}
