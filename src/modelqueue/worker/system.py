"""What operating systems do differently: signals, memory, how a process ended."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from modelqueue.threads import interrupt_coroutine

__all__ = [
    "OutOfMemory",
    "context",
    "describe_exit",
    "end_without_fail",
    "interrupt_thread",
    "is_alive",
    "leave_stop_signals_to_the_supervisor",
    "memory",
    "on_stop_signals",
    "stop_signals_blocked",
]

#: Those by which a terminal, a supervisor of the system or a container asks a program to stop.
_STOP = [signal.SIGINT, signal.SIGTERM]


def context() -> Any:
    """Return how processes are started: without a fork of this one, which may hold connections and locks.

    With a fork server four of them take 0.8 s and 16 MB each; spawned they take 2.1 s and 44 MB (measured
    on two cores in November 2026).
    """
    methods = multiprocessing.get_all_start_methods()
    if "forkserver" not in methods:
        return multiprocessing.get_context("spawn")
    system = multiprocessing.get_context("forkserver")
    # Code of ours alone: an app of the project may open connections when it is loaded.
    system.set_forkserver_preload(["modelqueue.worker.process"])
    return system


def on_stop_signals(handler: Callable[[], None]) -> Callable[[], None]:
    """Call a function at each SIGINT and SIGTERM; of the main thread alone. Return what undoes that."""
    before = {number: signal.signal(number, lambda *_: handler()) for number in _STOP}

    def restore() -> None:
        for number, known in before.items():
            signal.signal(number, known)

    return restore


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Keep what is started meanwhile deaf to the signals for the supervisor, above all a fork server.

    A terminal, or the service manager, sends them to all processes of a group. Without its fork server a
    living process looks dead. Blocked, which is inherited; ignored for a moment they could get lost.
    """
    try:
        from multiprocessing import resource_tracker
    except ImportError:  # Windows, where there is none of it
        yield
        return
    resource_tracker.ensure_running()  # which would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_stop_signals_to_the_supervisor() -> None:
    """Do nothing at SIGINT and SIGTERM. By a handler: what an action starts would inherit SIG_IGN."""
    for number in _STOP:
        signal.signal(number, lambda *_: None)
    with suppress(AttributeError):  # Windows, where there is no fork server that has them blocked
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)


def is_alive(pid: int) -> bool:
    """Say whether a process is alive of which multiprocessing does not know.

    If the parent of a process has died, that of all processes inherits it: this one in a container, where it
    has to be waited for, or it stays there as if alive.
    """
    with suppress(OSError, AttributeError):  # it is no child of ours; Windows
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


class OutOfMemory:
    """Knows whether the system has killed a process of our control group since the last look, to get memory.

    By the count of cgroup v2 of Linux. Elsewhere nobody knows.
    """

    def __init__(self) -> None:
        self._count = _out_of_memory_kills()

    def has_killed(self) -> bool:
        before, self._count = self._count, _out_of_memory_kills()
        return self._count > before


def _out_of_memory_kills() -> int:
    try:
        groups = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
        (group,) = (line.removeprefix("0::") for line in groups if line.startswith("0::"))
        events = Path(f"/sys/fs/cgroup{group}/memory.events").read_text(encoding="ascii").split()
        return int(events[events.index("oom_kill") + 1])
    except (OSError, ValueError):  # not Linux, or an older one, or the root of all groups
        return 0


def describe_exit(code: int | None, is_out_of_memory: bool = False) -> str:
    """Say how a process ended.

    Args:
        is_out_of_memory: whether the system is known to have killed one to get memory.
    """
    if code is None:
        return "has vanished"
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if name == "SIGKILL" and is_out_of_memory:
        return "was killed by SIGKILL, as memory ran out"
    if name == "SIGKILL":
        return "was killed by SIGKILL, by somebody or because memory ran out"
    return f"was killed by {name}"


def memory() -> int | None:
    """Return how much memory this process uses, in MiB; None where nobody knows."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  (no file of the disk)
            pages = int(file.read().split()[1])
    except OSError:
        return _peak_memory()
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 2**20 if sys.platform == "darwin" else peak // 2**10


def end_without_fail(seconds: float) -> None:
    """End this process after so many seconds whatever keeps it, such as a thread that an action has left."""

    def end() -> None:
        time.sleep(seconds)
        logging.shutdown()
        os._exit(0)

    threading.Thread(target=end, name="modelqueue-end", daemon=True).start()


def interrupt_thread(ident: int, error: type[BaseException]) -> None:
    """Raise an exception in a thread, as soon as it runs code of Python again; or end its coroutine by it."""
    if not interrupt_coroutine(ident, error):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(error))
