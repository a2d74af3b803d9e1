"""The supervisor: starts the processes of a worker, tells them of work, replaces dead ones, stops them.

It runs no task. Before it gives anything back it makes sure that the process is dead, so that no action goes
on.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from django.db import connections
from django.db.utils import Error

from modelqueue import verbs
from modelqueue.queues import Queue
from modelqueue.worker import process
from modelqueue.worker.options import Options
from modelqueue.worker.prober import Prober
from modelqueue.worker.running import Left
from modelqueue.worker.system import context, describe_exit, on_stop_signals

__all__ = ["Supervisor"]

logger = logging.getLogger("modelqueue")

#: Seconds that the loop waits at most for something to happen.
_TICK = 0.5
#: Seconds beyond the grace time after which a process that has not ended is killed.
_EXTRA = 4.0
#: Seconds before a process that died is replaced: the first time, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0
#: Seconds after which a process counts as sound, so that its death is the first one again.
_SOUND = 60.0


class Child:
    """A process of the worker, as its supervisor knows it."""

    def __init__(self, options: Options) -> None:
        system = context()
        self.pipe, theirs = system.Pipe()
        self.process = system.Process(target=process.main, args=(options, theirs), name="modelqueue-worker")
        self.process.start()
        theirs.close()  # so that their death breaks the pipe
        self.pid = self.process.pid
        self.began = time.monotonic()
        self.is_ready = False
        self.is_stopping = False
        #: Why it is to be replaced, if it has said so.
        self.reason: str | None = None
        self.left: list[Left] = []
        self.kill_at: float | None = None

    def send(self, *message: Any) -> None:
        try:
            self.pipe.send(message)
        except OSError:  # it has died, which its sentinel tells
            logger.debug("Process %s does not listen.", self.pid)


class Supervisor:
    """Runs a worker until it is stopped or, with `Options.drain`, until nothing is due.

    Args:
        queues: what to serve, one or more.
        told: called with what there is to say to the one who started the worker.
        ended: called with the attempts that have ended since, by outcome.
    """

    def __init__(
        self,
        options: Options,
        queues: list[Queue[Any]],
        told: Callable[[str], None] = lambda text: None,
        ended: Callable[[Counter[str]], None] = lambda counts: None,
    ) -> None:
        self._options = options
        self._queues = {queue.name: queue for queue in queues}
        self._tell = told
        self._ended = ended
        self._children: list[Child] = []
        self._wake_reader, self._wake_writer = context().Pipe(duplex=False)
        self._prober = Prober(queues, options.poll, self._found)
        #: What the prober has found last, how often it has looked, and what of that was passed on.
        self._due: list[str] | None = None
        self._expired: list[str] = []
        self._looks = 0
        self._looks_told = 0
        self._told: list[str] = []
        self._stops = 0
        self._stopped_at: float | None = None
        self._deaths = 0
        self._start_at = 0.0
        self._turn = 0
        self._ping: _Ping | None = None
        self._health_at = 0.0

    def run(self, handle_signals: bool = True) -> int:
        """Serve; return the exit code: 0, or 1 when draining has left something due.

        Args:
            handle_signals: whether SIGINT and SIGTERM stop it. For the main thread alone.
        """
        if handle_signals:
            on_stop_signals(self.stop)
        self._prober.start()
        try:
            while self._stopped_at is None or self._children:
                self._start_missing()
                self._wait()
                self._bury()
                self._stop_if_told()
                self._wake_children()
                self._see_whether_drained()
                self._write_health()
        finally:
            self._prober.stop()
            self._kill_all()
        code = 0
        if self._options.drain and self._is_anything_due():
            code = 1
        connections.close_all()
        return code

    def stop(self) -> None:
        """Stop in order; a second time: at once. May be called from a signal handler or another thread."""
        self._stops += 1
        self._wake()

    # Processes

    def _start_missing(self) -> None:
        if self._stopped_at is not None or time.monotonic() < self._start_at:
            return
        while len(self._children) < self._options.processes:
            self._children.append(Child(self._options))

    def _wait(self) -> None:
        """Wait until a process says something or dies, the prober has found something, or a signal came."""
        handles: dict[Any, Child | None] = {self._wake_reader: None}
        for child in self._children:
            handles[child.pipe] = handles[child.process.sentinel] = child
        for ready in wait(list(handles), _TICK):
            speaker = handles[ready]
            if speaker is None:
                self._wake_reader.recv_bytes()
            elif ready is speaker.pipe:
                self._receive(speaker)

    def _receive(self, child: Child) -> None:
        try:
            while child.pipe.poll():
                self._hear(child, *child.pipe.recv())
        except (EOFError, OSError):  # it has died, which its sentinel tells
            time.sleep(0.01)

    def _hear(self, child: Child, message: str, *arguments: Any) -> None:
        if message == "ready":
            child.is_ready = True
            child.send("due", self._due or [])
        elif message == "ended":
            self._prober.look_again()
            self._ended(Counter(*arguments))
        elif message == "full":
            (child.reason,) = arguments
            child.is_stopping = True
            child.kill_at = time.monotonic() + self._options.grace + _EXTRA
        elif message == "left":
            (child.left,) = arguments
        elif message == "pong" and self._ping is not None:
            self._ping.answer(child, *arguments)

    def _bury(self) -> None:
        """Take leave of processes that have ended, and give back what they have left."""
        for child in list(self._children):
            if child.kill_at is not None and time.monotonic() > child.kill_at and child.process.is_alive():
                self._tell(f"Process {child.pid} does not stop and is killed.")
                child.process.kill()
                child.kill_at = None
            if child.process.exitcode is None:
                continue
            self._receive(child)  # what it said last
            child.process.join()
            child.pipe.close()
            self._children.remove(child)
            self._give_back(child.left)
            if child.reason is not None:
                self._tell(f"Process {child.pid} {child.reason} and is replaced.")
            elif not child.is_stopping:
                self._note_death(child)

    def _note_death(self, child: Child) -> None:
        self._deaths = 1 if time.monotonic() - child.began > _SOUND else self._deaths + 1
        pause = min(_FIRST_PAUSE * 2 ** (self._deaths - 1), _LONGEST_PAUSE)
        self._start_at = time.monotonic() + pause
        how = describe_exit(child.process.exitcode)
        logger.error("Process %s of the worker %s.", child.pid, how)
        self._tell(f"Process {child.pid} {how}. The next one starts in {pause:.1f} s.")

    def _give_back(self, left: list[Left]) -> None:
        for task in left:
            try:
                if verbs.release(self._queues[task.queue].source(), task.row, task.leases):
                    logger.warning("%s %s did not end in time: given back.", task.queue, task.row.pk)
            except Error:
                logger.exception(
                    "%s %s can not be given back; it is recovered later.", task.queue, task.row.pk
                )

    # Stopping

    def _stop_if_told(self) -> None:
        if self._stops == 0:
            return
        grace = self._options.grace if self._stops == 1 else 0.0
        if self._stopped_at is None:
            self._tell("Stopping: running tasks may end." if grace else "Stopping now.")
            self._stopped_at = time.monotonic()
            self._prober.stop()
        for child in self._children:
            if not child.is_stopping or grace == 0.0:
                child.send("stop", grace)
                kill_at = time.monotonic() + grace + _EXTRA
                child.kill_at = min(kill_at, child.kill_at or kill_at)
                child.is_stopping = True
        if grace == 0.0:
            self._stops = 2

    def _kill_all(self) -> None:
        for child in self._children:  # only after an error of our own
            child.process.kill()
            child.process.join()

    # Work

    def _found(self, due: list[str] | None, expired: list[str]) -> None:
        """The prober has looked; called in its thread."""
        self._due, self._expired = due, expired
        self._looks += 1
        self._wake()

    def _wake(self) -> None:
        self._wake_writer.send_bytes(b".")

    def _wake_children(self) -> None:
        """Pass on what the prober has found: to one process, in turns, and to all if that did not suffice."""
        ready = [child for child in self._children if child.is_ready and not child.is_stopping]
        if not ready or self._looks == self._looks_told:
            return
        self._looks_told = self._looks
        self._turn += 1
        chosen = ready[self._turn % len(ready)]
        due, told = self._due or [], self._told
        self._told = due
        if self._expired:
            chosen.send("recover", self._expired)
        if again := [name for name in due if name in told]:
            for child in ready:
                child.send("due", again)
        if fresh := [name for name in due if name not in told]:
            chosen.send("due", fresh)

    def _see_whether_drained(self) -> None:
        """Stop when no process is at work, and a look that began after that finds nothing due."""
        if not self._options.drain or self._stopped_at is not None or self._due is None:
            return
        if self._due or (self._ping is not None and not self._ping.is_idle):
            self._ping = None
        elif self._ping is None:
            self._ping = _Ping(self._looks, self._children)
        elif self._ping.missing:
            self._ping.looks = self._looks
        elif self._looks >= self._ping.looks + 2:
            self._stops = max(self._stops, 1)
            self._stop_if_told()

    def _is_anything_due(self) -> bool:
        try:
            due, _ = self._prober.look()
        except Error:
            return True
        return bool(due)

    def _write_health(self) -> None:
        path = self._options.health_file
        if path is None or time.monotonic() < self._health_at or self._due is None:
            return
        self._health_at = time.monotonic() + 1.0
        facts = {
            "time": time.time(),
            "pid": os.getpid(),
            "processes": [child.pid for child in self._children],
        }
        temporary = Path(f"{path}.{os.getpid()}")
        temporary.write_text(json.dumps(facts))
        temporary.replace(path)


class _Ping:
    """A question to all processes whether they are at work."""

    def __init__(self, looks: int, children: list[Child]) -> None:
        self.looks = looks
        self.missing = set(children)
        self.is_idle = True
        for child in children:
            child.send("ping", looks)
        self._number = looks

    def answer(self, child: Child, number: int, running: int) -> None:
        if number == self._number:
            self.missing.discard(child)
            self.is_idle &= running == 0
