"""One process of a worker: claims, runs and completes tasks until its supervisor tells it to stop.

It talks with the supervisor by a pipe. When that breaks the supervisor is gone, and the process stops in
order.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import django
from django.apps import apps

from modelqueue.engines import full_since
from modelqueue.queues import declared_queues
from modelqueue.worker.bell import Bell
from modelqueue.worker.board import Blank, Board
from modelqueue.worker.claimer import Claimer
from modelqueue.worker.completer import Completer
from modelqueue.worker.ears import Ears
from modelqueue.worker.limits import Limits
from modelqueue.worker.listener import Tables
from modelqueue.worker.loop import Loop
from modelqueue.worker.names import name_sessions
from modelqueue.worker.options import Options
from modelqueue.worker.running import Claimed, Register
from modelqueue.worker.slots import Lane, Slots
from modelqueue.worker.system import end_without_fail, leave_stop_signals_to_the_supervisor, memory
from modelqueue.worker.threads import Threads
from modelqueue.worker.verbosity import show_log_lines

__all__ = ["main"]

logger = logging.getLogger("modelqueue")

#: The thresholds of Python's garbage collector, and what is set for the first of them.
_PYTHONS, _COLLECT = gc.get_threshold(), 5_000
#: Seconds between two reports to the supervisor.
_TICK = 0.1
#: Seconds after the grace time for all of it: for the last claim to come back, interrupted actions to end,
#: and the database to take the last outcomes. The first two have so many at most, to leave some to the rest.
_LAST_MOMENTS, _ONE_MOMENT = 2.0, 1.0
#: Seconds without a task after which a process that runs them alone is not needed any more.
_LONGEST_IDLE = 30.0
#: Seconds beyond that to see what is left. All this has to be well below what the supervisor allows beyond
#: the grace time, or the process is killed before it has said what it leaves.
_LAST_RENEWALS = 0.5


def main(options: Options, pipe: Connection[Any, Any], board: Board, bell: Bell) -> None:
    """Be a process of a worker, until its end."""
    leave_stop_signals_to_the_supervisor()
    if not apps.ready:
        django.setup()
    show_log_lines(options.verbosity)
    name_sessions(options.version, (queue for queue in declared_queues() if queue.name in options.names))
    # What is loaded by now lives as long as the process: the collector need not look at it again and again,
    # nor so often when hundreds of tasks are claimed at a time.
    gc.freeze()
    if gc.get_threshold() == _PYTHONS:  # and not that of the project
        gc.set_threshold(max(_COLLECT, _PYTHONS[0]))
    Process(options, pipe, board, bell).run()
    end_without_fail(_ONE_MOMENT)


class Process:
    def __init__(self, options: Options, pipe: Connection[Any, Any], board: Board, bell: Bell) -> None:
        self._options = options
        self._pipe = pipe
        #: The claimer has something to say, too.
        self._speaking = threading.Lock()
        queues = [queue for queue in declared_queues() if queue.name in options.names]
        if gone := sorted(set(options.names) - {queue.name for queue in queues}):
            logger.error(
                "The code has no queue any more of the name %s. Restart the worker.", ", ".join(gone)
            )
        if options.alone:
            queues = [queue for queue in queues if queue.has_last_attempts]
        lanes = [Lane(queue, options.threads, options.alone) for queue in queues]
        self._ears = Ears(queues)
        self._slots = Slots(lanes, options.threads, options.max_tasks, options.alone, bell, self._ears)
        self._register = Register(self._slots, board, self._tell_claimed)
        self._completer = Completer(self._register, lambda: self._threads.waiting)
        self._threads = Threads(self._register, self._completer, options.threads)
        self._loop = Loop(self._completer)
        self._claimer = Claimer(self._slots, self._register, self._threads, self._loop, self._completer)
        self._limits = Limits(self._register, self._threads, self._loop)
        self._began = self._worked_at = self._reported_at = time.monotonic()
        #: Not all processes of a worker at once.
        self._lives = math.inf if options.max_seconds is None else options.max_seconds * _jitter()
        self._deadline: float | None = None
        """Until when running actions may end, by the monotonic clock; None: it is not to stop yet."""

    def run(self) -> None:
        self._receive(0)  # perhaps it is to stop already
        if self._deadline is None:
            self._completer.start()
            self._claimer.start()
            self._send("ready")
        while self._deadline is None:
            self._receive(_TICK)
            self._report()
            self._end_if_broken()
            self._enforce_limits()
            self._threads.give_back_what_waits()
            if self._deadline is None and (reason := self._reason_to_be_replaced()):
                self._send("full", reason)
                self._deadline = math.inf  # what it runs may end, however long it takes
        if self._claimer.is_started:
            self._stop()

    def _enforce_limits(self) -> None:
        """Claim no more once an action can not be ended, but by the end of this process."""
        if overdue := self._limits.enforce():
            self._send("overdue", [running.number for running in overdue])
            if self._deadline is None:
                self._deadline = math.inf  # until the supervisor says how long the others have

    def _end_if_broken(self) -> None:
        """End, to be replaced, rather than go on with a part of it dead: its tasks are recovered."""
        is_claiming = self._claimer.is_alive or self._slots.is_stopped  # then it is to end
        if not (is_claiming and self._completer.is_alive and self._loop.is_alive):
            logger.critical("A thread of this process has died by a fault of its own: to be replaced.")
            logging.shutdown()
            os._exit(1)

    # Messages

    def _receive(self, seconds: float) -> None:
        try:
            if not self._pipe.poll(seconds):
                return
            message, *arguments = self._pipe.recv()
        except (EOFError, OSError):
            if self._deadline in (None, math.inf):
                logger.warning("The supervisor of this process is gone, so it stops.")
                self._deadline = time.monotonic() + self._options.grace
            time.sleep(seconds)
            return
        if message == "due":
            self._slots.want(*arguments)
        elif message == "listen":
            self._listen_to(*arguments)
        elif message == "stop":
            (grace,) = arguments
            self._deadline = time.monotonic() + grace
        self._send("answer", self._slots.running)

    def _listen_to(self, tables: dict[str, Tables]) -> None:
        self._ears.listen_to(tables)
        # Whoever waits wakes up for these, and listens before it waits again.
        self._slots.want(name for some in tables.values() for names in some.values() for name in names)

    def _send(self, *message: Any) -> None:
        with suppress(OSError), self._speaking:  # the supervisor is gone, which `_receive` finds out
            self._pipe.send(message)

    def _tell_claimed(self, claimed: Sequence[Claimed | Blank]) -> None:
        try:
            self._send("claimed", claimed)
        except Exception as error:  # a primary key of a class that can not be pickled
            logger.debug("Claims can not be told, of %s: %s", claimed[0], error)

    def _report(self) -> None:
        if ended := self._register.report():
            self._send("ended", dict(ended))
        if self._ears.has_heard():
            self._send("heard")
        full, self._reported_at = full_since(self._reported_at), time.monotonic()
        if full:
            self._send("no room", full)

    def _reason_to_be_replaced(self) -> str | None:
        options = self._options
        if self._slots.running:
            self._worked_at = time.monotonic()
        if options.alone and time.monotonic() - self._worked_at > _LONGEST_IDLE:
            return "has no last attempts to run any more"
        if self._slots.is_used_up:  # what it still runs may take long
            return f"has run {options.max_tasks} task{'' if options.max_tasks == 1 else 's'}"
        if time.monotonic() - self._began >= self._lives:
            return f"has run for {options.max_seconds:g} s"
        if options.max_memory is not None and (used := memory() or 0) > options.max_memory:
            return f"uses {used} MiB of memory, more than --max-memory {options.max_memory},"
        return None

    # The end

    def _stop(self) -> None:
        """Finish what runs within the grace time, then interrupt it; what does not end is left."""
        self._claimer.stop()
        while not self._has_ended() and time.monotonic() < (self._deadline or 0.0):
            self._receive(0)
            self._report()
            self._enforce_limits()
            self._threads.give_back_what_waits()
            if self._deadline == math.inf:  # else it ends soon, and what is left is given back
                self._end_if_broken()
        deadline = time.monotonic() + _LAST_MOMENTS
        self._claimer.join(_ONE_MOMENT)  # it may have claimed in the last moment
        self._threads.interrupt()
        self._loop.interrupt()
        self._register.wait_for_all(min(_ONE_MOMENT, deadline - time.monotonic()))
        self._completer.stop(deadline - time.monotonic())
        self._claimer.join(deadline - time.monotonic())  # what it claims after this, nobody would give back
        self._report()
        if self._register.let_go(deadline + _LAST_RENEWALS - time.monotonic()):
            logging.shutdown()
            os._exit(0)  # with its actions, which nothing else ends; the supervisor gives them back
        self._threads.stop()

    def _has_ended(self) -> bool:
        """Wait a moment; return whether nothing is being claimed or run any more."""
        self._claimer.join(_TICK)
        return not self._claimer.is_alive and self._register.wait_for_all(_TICK)


def _jitter() -> float:
    return random.uniform(1.0, 1.1)  # noqa: S311
