"""The supervisor: starts the processes of a worker, tells them of work, replaces dead ones, stops them.

It runs no task. Before it gives anything back it makes sure that the process is dead, so that no action goes
on.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from django.db import connections

from modelqueue import verbs
from modelqueue.engines import RowLocked
from modelqueue.queues import Queue
from modelqueue.worker import process
from modelqueue.worker.options import Options
from modelqueue.worker.pools import too_small_pools
from modelqueue.worker.prober import Prober
from modelqueue.worker.running import Left
from modelqueue.worker.system import (
    OutOfMemory,
    context,
    describe_exit,
    is_alive,
    on_stop_signals,
    stop_signals_blocked,
)
from modelqueue.worker.upkeep import Upkeep

__all__ = ["FAULT", "SOMETHING_IS_DUE", "Supervisor"]

logger = logging.getLogger("modelqueue")

#: Exit codes: the worker has stopped by a fault of its own; a drain has left something due.
FAULT, SOMETHING_IS_DUE = 1, 3

#: Messages to a process that it has not answered; more are not sent.
_MOST_UNANSWERED = 8
#: What multiprocessing takes for the exit code when nobody could tell it.
_FORK_SERVER_DIED = 255
#: Seconds for which tasks that were left are given back; what is locked for longer is recovered.
_LONGEST_GIVE_BACK = 5.0
#: Seconds between two tries to give back what is locked.
_GIVE_BACK_PAUSE = 0.2
#: Seconds that the loop waits at most for something to happen.
_TICK = 0.5
#: Seconds beyond the grace time after which a process that has not ended is killed.
_EXTRA = 4.0
#: Seconds before a process that died is replaced: the first time, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0
#: Seconds of work after which it is no wonder that a process has run no task.
_SHORT = 5.0
#: Seconds after which a process counts as sound, so that its death is the first one again.
_SOUND = 60.0
#: Seconds for which nothing may be claimed as all processes run their last tasks, until that is told.
_LONGEST_STANDSTILL = 10.0
#: Seconds between two questions to a process that only ends what it runs.
_ASK_INTERVAL = 1.0
#: Seconds, beyond the longest time between two looks, without a look of the prober, or an answer of any
#: process, after which the worker is not well.
_LONGEST_SILENCE = 30.0


class Child:
    """A process of the worker, as its supervisor knows it."""

    def __init__(self, options: Options) -> None:
        system = context()
        self.pipe, theirs = system.Pipe()
        self.process = system.Process(target=process.main, args=(options, theirs), name="modelqueue-worker")
        with stop_signals_blocked():
            self.process.start()
        theirs.close()  # so that their death breaks the pipe
        self.pid = self.process.pid
        self.began = time.monotonic()
        self.is_ready = False
        #: Was it told to stop, and within how many seconds?
        self.is_stopping = False
        self._grace: float | None = None
        #: Why it is to be replaced, if it has said so: it lets its tasks end, and stops by itself.
        self.reason: str | None = None
        self.has_run_tasks = False
        #: Was it to be replaced almost as soon as it was ready?
        self.was_short = False
        self.answered_at = self.began
        self.left: list[Left] = []
        self.kill_at: float | None = None
        #: How many slots are taken, as it said last.
        self.running = 0
        self._unanswered = 0
        #: How many of its answers are to come until one is to a message that was sent after `doubt`.
        self._awaited = 0

    def send(self, *message: Any) -> None:
        """Send a message, unless it has not taken the last ones: nobody waits for a process that hangs."""
        if self._unanswered >= _MOST_UNANSWERED:
            return
        self._unanswered += 1
        try:
            self.pipe.send(message)
        except OSError:  # it has died, which its sentinel tells
            logger.debug("Process %s does not listen.", self.pid)

    def stop(self, grace: float) -> None:
        """Tell it to stop; whatever it does, it is killed some time after the grace."""
        if self._grace is None or grace < self._grace:  # once, and then at once
            self._grace = grace
            self._unanswered = min(self._unanswered, _MOST_UNANSWERED - 1)
            self.send("stop", grace)
        kill_at = time.monotonic() + grace + _EXTRA
        self.kill_at = min(kill_at, self.kill_at or kill_at)
        self.is_stopping = True

    def next_message(self) -> Any:
        """Return what it has said next; None: nothing yet, or nothing any more."""
        try:
            return self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError):  # it has died, which its sentinel tells
            time.sleep(0.01)
            return None

    def doubt(self) -> None:
        """Take what it has said so far for old: from now on its next answer is waited for."""
        self._awaited = self._unanswered + 1

    def answered(self, running: int) -> None:
        self._unanswered -= 1
        self._awaited -= 1
        self.answered_at = time.monotonic()
        self.running = running

    @property
    def is_at_work(self) -> bool:
        """Say whether it takes tasks, or soon will."""
        return not self.is_stopping and self.reason is None

    @property
    def is_idle(self) -> bool:
        """Say whether it runs nothing, as far as it has said; one that is to be replaced runs its last."""
        return self.is_ready and self.reason is None and not self.running

    @property
    def has_answered(self) -> bool:
        """Say whether it has answered a message that was sent after `doubt`."""
        return self._awaited <= 0

    @property
    def has_ended(self) -> bool:
        """Say whether it is dead, for sure: one whose fork server has died only looks so."""
        if self.process.exitcode is None:
            return False
        return self.process.exitcode != _FORK_SERVER_DIED or self.pid is None or not is_alive(self.pid)

    def kill(self) -> None:
        if self.process.exitcode is None:
            self.process.kill()
        elif not self.has_ended and self.pid is not None:
            # Without its fork server nobody knows of its end, and the pid may be that of another by now.
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)


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
        self._upkeep = Upkeep(queues)
        #: What the prober has found last, how often it has looked, and what of that was passed on.
        self._due: list[str] | None = None
        self._expired: list[str] = []
        self._looks = 0
        self._looks_told = 0
        self._told: list[str] = []
        #: Seconds after which all that a dead process held has come back. Not asked for when one dies: that
        #: takes code of the user, which may need a database that is away.
        self._lease = 0.0
        self._code = 0
        self._stops = 0
        self._stopped_at: float | None = None
        self._deaths = 0
        self._out_of_memory = OutOfMemory()
        self._start_at = 0.0
        self._turn = 0
        #: Since when no process takes tasks, and no other one may be started.
        self._stands_since: float | None = None
        self._is_standstill_told = False
        self._giving_back: list[threading.Thread] = []
        self._is_stopping_now = False
        self._looked_at = 0.0
        #: Since which look nothing is due and no process is at work, and before when that means nothing.
        self._idle_since: int | None = None
        self._drained_from = 0.0
        self._ask_at = 0.0
        self._health_at = 0.0
        self._is_health_told = False

    def run(self, handle_signals: bool = True) -> int:
        """Serve; return the exit code: 0 stopped, or drained; `FAULT`; `SOMETHING_IS_DUE`.

        Args:
            handle_signals: whether SIGINT and SIGTERM stop it. For the main thread alone.
        """
        for text in too_small_pools(self._queues.values(), self._options):
            logger.warning(text)
        self._lease = max(map(_longest_lease, self._queues.values()))
        restore = _nothing
        if handle_signals:
            restore = on_stop_signals(self.stop)
        self._upkeep.start()
        self._prober.start()
        try:
            while self._stopped_at is None or self._children:
                self._start_missing()
                self._tell_standstill()
                self._wait()
                self._bury()
                self._stop_if_broken()
                self._stop_if_told()
                self._wake_children()
                self._ask_those_that_end()
                self._see_whether_drained()
                self._write_health()
        finally:
            self._upkeep.stop()
            self._prober.stop()
            self._end_all()
            self._see_given_back()
            restore()
        if self._code == 0 and self._options.drain and self._is_anything_due():
            self._code = SOMETHING_IS_DUE
        connections.close_all()
        return self._code

    def stop(self) -> None:
        """Stop in order; a second time: at once. May be called from a signal handler or another thread."""
        self._stops += 1
        self._wake()

    # Processes

    def _start_missing(self) -> None:
        if self._stops or time.monotonic() < self._start_at:
            return
        try:
            while self._is_one_missing():
                self._children.append(Child(self._options))
        except (OSError, EOFError) as error:  # the second of a fork server that has just died
            self._say(f"A process can not be started: {error}.")
            self._pause()

    def _is_one_missing(self) -> bool:
        """Say whether to start one; also beside those to be replaced, which may run their tasks for long."""
        most = self._options.processes
        at_work = sum(child.is_at_work for child in self._children)
        return at_work < most and len(self._children) < 2 * most

    def _tell_standstill(self) -> None:
        """Say once that nothing is claimed, and why, if that lasts."""
        if self._stops or self._is_standstill_told or self._is_one_missing() or self._is_one_at_work():
            self._stands_since = None
        elif self._stands_since is None:
            self._stands_since = time.monotonic()
        elif time.monotonic() - self._stands_since > _LONGEST_STANDSTILL:
            self._is_standstill_told = True
            logger.warning(
                "Nothing is claimed: %d processes are to be replaced and run their last tasks, and beside so "
                "many no other one is started. Where tasks take long give more --processes, or raise "
                "--max-tasks, --max-seconds or --max-memory.",
                len(self._children),
            )

    def _is_one_at_work(self) -> bool:
        return any(child.is_at_work for child in self._children)

    def _wait(self) -> None:
        """Wait until a process says something or dies, the prober has found something, or a signal came."""
        handles: dict[Any, Child | None] = {self._wake_reader: None}
        for child in self._children:
            handles[child.pipe] = child
            if child.process.exitcode is None:  # else its fork server has died, and it says nothing new
                handles[child.process.sentinel] = child
        for ready in wait(list(handles), _TICK):
            speaker = handles[ready]
            if speaker is None:
                self._wake_reader.recv_bytes()
            elif ready is speaker.pipe:
                self._receive(speaker)

    def _receive(self, child: Child) -> None:
        while message := child.next_message():
            self._hear(child, *message)

    def _hear(self, child: Child, message: str, *arguments: Any) -> None:
        if message == "ready":
            child.is_ready = True
            child.began = time.monotonic()
            child.send("due", self._due or [])
        elif message == "ended":
            child.has_run_tasks = True
            self._prober.look_again()
            with suppress(OSError):  # nobody reads of it any more
                self._ended(Counter(*arguments))
        elif message == "full":
            (child.reason,) = arguments
            child.was_short = time.monotonic() - child.began < _SHORT
        elif message == "left":
            (child.left,) = arguments
        elif message == "answer":
            child.answered(*arguments)

    def _bury(self) -> None:
        """Take leave of processes that have ended, and give back what they have left."""
        for child in list(self._children):
            if child.kill_at is not None and time.monotonic() > child.kill_at and not child.has_ended:
                self._say(f"Process {child.pid} does not stop and is killed.")
                child.kill()
                child.kill_at = None
            if not child.has_ended:
                if child.process.exitcode is not None and child.kill_at is None:
                    child.stop(self._options.grace)  # nobody would tell of its end
                continue
            self._receive(child)  # what it said last
            child.process.join()
            child.pipe.close()
            self._children.remove(child)
            self._give_back(child.left)
            if not child.is_stopping and (child.reason is None or child.process.exitcode != 0):
                self._note_death(child)
            elif child.reason is not None:
                self._say(f"Process {child.pid} {child.reason} and is replaced.")
                if child.was_short and not child.has_run_tasks:
                    self._say("It had run no task: the limit is too low. Raise it.")
                    self._pause()

    def _note_death(self, child: Child) -> None:
        if time.monotonic() - child.began > _SOUND:
            self._deaths = 0
        end = describe_exit(child.process.exitcode, self._out_of_memory.has_killed())
        logger.error("Process %s of the worker %s.", child.pid, end)
        pause = self._pause()
        # What it held comes back when its leases are over.
        self._drained_from = time.monotonic() + self._lease + 1.0
        self._say(
            f"The next process starts in {pause:.1f} s. What {child.pid} was running is taken back when its "
            f"leases have run out, in {self._lease:.0f} s at most."
        )

    def _pause(self) -> float:
        """Put off the start of further processes; return for how many seconds."""
        self._deaths += 1
        pause: float = min(_FIRST_PAUSE * 2 ** (self._deaths - 1), _LONGEST_PAUSE)
        self._start_at = time.monotonic() + pause
        return pause

    def _give_back(self, left: list[Left]) -> None:
        """Give tasks back whose process is dead, beside all else, as rows may be locked."""
        if left:
            thread = threading.Thread(target=self._release_all, args=[left], daemon=True)
            thread.start()
            self._giving_back.append(thread)

    def _see_given_back(self) -> None:
        """Wait until all is given back, but not for longer than a moment."""
        deadline = time.monotonic() + _LONGEST_GIVE_BACK + _GIVE_BACK_PAUSE
        for thread in self._giving_back:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _release_all(self, left: list[Left]) -> None:
        """Give back first what nobody has locked, as that holds up the others, and then the rest in time."""
        deadline = time.monotonic() + _LONGEST_GIVE_BACK
        locked = [task for task in left if not self._release(task)]
        while locked and time.monotonic() < deadline:
            time.sleep(_GIVE_BACK_PAUSE)
            locked = [task for task in locked if not self._release(task)]
        for task in locked:
            logger.error(
                "%s %s can not be given back, as somebody has locked its row; it is recovered later.",
                task.queue,
                task.row.pk,
            )
        connections.close_all()  # those of this thread

    def _release(self, task: Left) -> bool:
        """Give a task back, if that can be done at all; return whether nobody has locked its row."""
        try:
            if verbs.release(self._queues[task.queue].source(), task.row, task.leases, waits=False):
                logger.warning("%s %s did not end in time: given back.", task.queue, task.row.pk)
        except RowLocked:
            return False
        except Exception:
            logger.exception("%s %s can not be given back; it is recovered later.", task.queue, task.row.pk)
        return True

    # Stopping

    def _stop_if_broken(self) -> None:
        """End, for whoever watches over the worker to start another, rather than go on without a part."""
        if self._stopped_at is not None or (self._prober.is_alive and not self._upkeep.has_ended):
            return
        part = "does the upkeep of the queues" if self._prober.is_alive else "looks for work"
        logger.critical("The thread that %s has died by a fault of its own: the worker stops.", part)
        self._code = FAULT
        self._stops = max(self._stops, 1)

    def _stop_if_told(self, why: str = "") -> None:
        if self._stops == 0:
            return
        grace = self._options.grace if self._stops == 1 else 0.0
        if self._stopped_at is None:
            if why or self._stops == 1:
                grace_time = f"running tasks may end within {grace:g} s; a second signal ends them now."
                self._say(why or f"Stopping: {grace_time}")
            self._stopped_at = time.monotonic()
            self._upkeep.stop()
            self._prober.stop()
        if self._stops > 1 and not self._is_stopping_now:
            self._say("Stopping now.")
            self._is_stopping_now = True
        for child in self._children:
            child.reason = None  # it is to stop, and may take its time no longer
            if child.kill_at is None or grace == 0.0:
                child.stop(grace)

    def _end_all(self) -> None:
        """After an error of our own: stop what is left, leave nothing behind, and give back what is left."""
        if not self._children:
            return
        self._tell = self._ended = _nothing  # perhaps it was raised there
        for child in self._children:
            child.stop(0.0)
        try:
            while self._children:
                self._wait()
                self._bury()
        finally:
            for child in self._children:
                child.kill()
                child.process.join()

    def _say(self, text: str) -> None:
        try:
            self._tell(text)
        except OSError:  # nobody reads it any more
            logger.debug(text)

    # Work

    def _found(self, due: list[str] | None, expired: list[str]) -> None:
        """The prober has looked; called in its thread."""
        self._due, self._expired = due, expired
        self._looks += 1
        self._looked_at = time.monotonic()
        self._wake()

    def _wake(self) -> None:
        self._wake_writer.send_bytes(b".")

    def _wake_children(self) -> None:
        """Pass on what the prober has found: to one process, in turns, and to all if that did not suffice."""
        ready = [child for child in self._children if child.is_ready and child.is_at_work]
        if not ready or self._looks == self._looks_told:
            return
        self._looks_told = self._looks
        self._turn += 1
        chosen = ready[self._turn % len(ready)]
        due, told = self._due or [], self._told
        self._told = due
        if self._expired:
            chosen.send("recover", self._expired)
        again = [name for name in due if name in told]
        chosen.send("due", due)
        for child in ready:
            # While something is due the others are left alone, lest they take the processor from the chosen
            # one; else all are asked, as they answer.
            if child is not chosen and (again or not due):
                child.send("due", again)

    def _ask_those_that_end(self) -> None:
        """Have also those answer, for the health of the worker, whom nobody tells of work any more."""
        if time.monotonic() < self._ask_at:
            return
        self._ask_at = time.monotonic() + _ASK_INTERVAL
        for child in self._children:
            if child.is_ready and not child.is_at_work:
                child.send("due", [])

    def _see_whether_drained(self) -> None:
        """Stop when no process is at work, and a look that began after that finds nothing due.

        What a process has said before does not count: it may have claimed since, and be too busy to say so.
        """
        if not self._options.drain or self._stopped_at is not None or self._due is None:
            return
        is_at_work = not all(child.is_idle for child in self._children)
        something = self._due or self._expired or self._prober.holds_back
        if something or is_at_work or time.monotonic() < self._drained_from:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = self._looks
            for child in self._children:
                child.doubt()
        elif self._looks >= self._idle_since + 3 and all(child.has_answered for child in self._children):
            self._stops = max(self._stops, 1)
            self._stop_if_told("Nothing is due any more.")

    def _is_anything_due(self) -> bool:
        try:
            due, _ = self._prober.look()
        except Exception:  # whatever it is, nobody knows that nothing is
            logger.exception("Whether something is due can not be seen.")
            return True
        if left_out := self._prober.left_out:
            self._say(f"Nobody knows whether something is due in {', '.join(left_out)}.")
        return bool(due or left_out)

    def _write_health(self) -> None:
        path = self._options.health_file
        latest = max((child.answered_at for child in self._children), default=0.0)
        heard = latest if self._stopped_at is not None else min(self._looked_at, latest)
        silence = time.monotonic() - heard
        is_well = self._due is not None and silence < _LONGEST_SILENCE + self._options.poll
        if path is None or time.monotonic() < self._health_at or not is_well:
            return
        self._health_at = time.monotonic() + 1.0
        facts = {
            "time": time.time(),
            "pid": os.getpid(),
            "processes": [child.pid for child in self._children],
        }
        temporary = Path(f"{path}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(facts))
            temporary.replace(path)
        except OSError as error:
            level = logging.DEBUG if self._is_health_told else logging.ERROR
            logger.log(level, "The health file %s can not be written: %s", path, error)
            self._is_health_told = True
        else:
            self._is_health_told = False


def _longest_lease(queue: Queue[Any]) -> float:
    """Return after how many seconds its abandoned tasks are taken back."""
    try:
        lease = queue.recovery().lease or queue.lease
    except Exception:  # of the callable that makes its queryset, which the prober tells
        lease = queue.lease
    return lease.total_seconds()


def _nothing(*_: Any) -> None:
    """Restore no signals; tell nobody."""
