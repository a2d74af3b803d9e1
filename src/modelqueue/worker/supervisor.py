"""The supervisor: starts the processes of a worker, tells them of work, replaces dead ones, stops them.

It runs no task. Before it gives anything back it makes sure that the process is dead, so that no action goes
on.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, Protocol

from django.db import connections

from modelqueue.engines import note_full
from modelqueue.exceptions import WorkerDied
from modelqueue.queues import Queue
from modelqueue.worker.child import Child
from modelqueue.worker.give_back import GiveBack
from modelqueue.worker.health import Health
from modelqueue.worker.listener import Listener
from modelqueue.worker.options import Options
from modelqueue.worker.pools import too_small_pools
from modelqueue.worker.prober import Prober, Seen
from modelqueue.worker.recovery import Recovery
from modelqueue.worker.system import OutOfMemory, context, describe_exit, on_stop_signals
from modelqueue.worker.team import Team
from modelqueue.worker.upkeep import Upkeep

__all__ = ["FAULT", "SOMETHING_IS_DUE", "Supervisor"]

logger = logging.getLogger("modelqueue")

#: Exit codes: the worker has stopped by a fault of its own; a drain has left something due.
FAULT, SOMETHING_IS_DUE = 1, 3

#: Seconds that the loop waits at most for something to happen.
_TICK = 0.5
#: Seconds before a process that died is replaced: the first time, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0
#: Seconds of work after which it is no wonder that a process has run no task.
_SHORT = 5.0
#: Seconds after which a process counts as sound, so that its death is the first one again.
_SOUND = 60.0
#: Seconds for which nothing may be claimed as all processes run their last tasks, until that is told.
_LONGEST_STANDSTILL = 10.0
#: Seconds between two looks at who answers, and questions to a process that only ends what it runs.
_ASK_INTERVAL = 1.0
#: Seconds without an answer after which a process hangs, if they are more than those of the lease. By then it
#: has not renewed either what it has in hand.
_LONGEST_HANG = 10.0
#: Seconds, beyond the longest time between two looks, without a look of the prober, or an answer of any
#: process, after which the worker is not well.
_LONGEST_SILENCE = 30.0


class _Part(Protocol):
    """What begins and ends with the worker."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    @property
    def has_ended(self) -> bool:
        """Say whether it did begin, and does nothing any more."""


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
        self._ordinary = Team(options, queues)
        self._teams = [self._ordinary, Team.alone(options, queues)]
        self._wake_reader, self._wake_writer = context().Pipe(duplex=False)
        self._prober = Prober(queues, options.poll, self._found, self._ordinary.hint, options.drain)
        self._recovery = Recovery(queues)
        self._upkeep = Upkeep(queues)
        hand_over = self._ordinary.listen_to if self._ordinary.hears_by_itself else None
        #: What goes on beside the supervisor, each in a thread of its own.
        self._parts: dict[str, _Part] = {
            "looks for work": self._prober,
            "hears of new tasks": Listener(queues, self._prober.ask, hand_over),
            "recovers tasks": self._recovery,
            "does the upkeep of the queues": self._upkeep,
        }
        #: What the prober has found last, how often it has looked, and what of that was passed on.
        self._seen: Seen | None = None
        self._looks = 0
        self._looks_told = 0
        #: Seconds after which all that a dead process held has come back. Not asked for when one dies: that
        #: takes code of the user, which may need a database that is away.
        self._lease = 0.0
        self._code = 0
        self._stops = 0
        self._stopped_at: float | None = None
        self._deaths = 0
        self._out_of_memory = OutOfMemory()
        self._start_at = 0.0
        #: Since when no process takes tasks, and no other one may be started.
        self._stands_since: float | None = None
        self._is_standstill_told = False
        self._give_back = GiveBack(self._queues)
        self._is_stopping_now = False
        self._looked_at = 0.0
        #: Since which look nothing is due and no process is at work, and before when that means nothing.
        self._idle_since: int | None = None
        self._drained_from = 0.0
        self._ask_at = 0.0
        self._health = Health(options.health_file)

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
        for part in self._parts.values():
            part.start()
        try:
            while self._stopped_at is None or self._children:
                self._start_missing()
                self._tell_standstill()
                self._wait()
                self._bury()
                self._stop_if_broken()
                self._stop_if_told()
                self._wake_children()
                self._see_who_answers()
                self._see_whether_drained()
                if self._is_well():
                    self._health.write([child.pid for child in self._children])
        finally:
            self._stop_parts()
            self._end_all()
            self._give_back.wait()
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
            for team in self._teams:
                while team.lacks_one:
                    team.start_one()
        except (OSError, EOFError) as error:  # the second of a fork server that has just died
            self._say(f"A process can not be started: {error}.")
            self._pause()

    def _tell_standstill(self) -> None:
        """Say once that nothing is claimed, and why, if that lasts."""
        team = self._ordinary
        if self._stops or self._is_standstill_told or team.lacks_one or team.is_at_work:
            self._stands_since = None
        elif self._stands_since is None:
            self._stands_since = time.monotonic()
        elif time.monotonic() - self._stands_since > _LONGEST_STANDSTILL:
            self._is_standstill_told = True
            logger.warning(
                "Nothing is claimed: %d processes are to be replaced and run their last tasks, and beside so "
                "many no other one is started. Where tasks take long give more --processes, or raise "
                "--max-tasks, --max-seconds or --max-memory.",
                len(team.children),
            )

    def _wait(self) -> None:
        """Wait until a process says something or dies, the prober has found something, or a signal came."""
        handles: dict[Any, tuple[Team, Child] | None] = {self._wake_reader: None}
        for team, child in self._members():
            handles[child.pipe] = team, child
            if child.process.exitcode is None:  # else its fork server has died, and it says nothing new
                handles[child.process.sentinel] = team, child
        for ready in wait(list(handles), _TICK):
            speaker = handles[ready]
            if speaker is None:
                self._wake_reader.recv_bytes()
            elif ready is speaker[1].pipe:
                self._receive(*speaker)

    def _members(self) -> list[tuple[Team, Child]]:
        return [(team, child) for team in self._teams for child in team.children]

    @property
    def _children(self) -> list[Child]:
        return [child for team in self._teams for child in team.children]

    def _receive(self, team: Team, child: Child) -> None:
        while message := child.next_message():
            self._hear(team, child, *message)

    def _hear(self, team: Team, child: Child, message: str, *arguments: Any) -> None:
        if message == "ready":
            child.is_ready = True
            child.began = time.monotonic()
            team.welcome(child)
        elif message == "ended":
            child.has_run_tasks = True
            self._prober.look_again()
            with suppress(OSError):  # nobody reads of it any more
                self._ended(Counter(*arguments))
        elif message == "heard":
            self._prober.ask([])
        elif message == "full":
            (child.reason,) = arguments
            child.was_short = time.monotonic() - child.began < _SHORT
        elif message == "overdue":
            child.overdue.update(*arguments)
            child.reason = "has an action that goes on after its timeout"
            child.stop(self._options.grace)
        elif message == "claimed":
            child.has_claimed(*arguments)
        elif message == "answer":
            child.answered(*arguments)
        elif message == "no room":
            (databases,) = arguments
            for using in databases:
                note_full(using)

    def _bury(self) -> None:
        """Take leave of processes that have ended, and give back what they have left."""
        for team, child in self._members():
            if child.kill_at is not None and time.monotonic() > child.kill_at and not child.has_ended:
                self._say(f"Process {child.pid} does not stop and is killed.")
                child.kill()
                child.kill_at = None
            if not child.has_ended:
                if child.process.exitcode is not None and child.kill_at is None:
                    child.stop(self._options.grace)  # nobody would tell of its end
                continue
            self._receive(team, child)  # what it said last
            child.process.join()
            child.close()
            team.children.remove(child)
            death = None if child.has_ended_in_order else self._describe_death(child)
            why = None if death is None else WorkerDied(f"its process {child.pid} {death}")
            self._give_back.start(child.held(), why)
            if death is not None and not child.is_stopping:
                self._note_death(child, death)
            elif child.reason is not None:
                what = "ends" if team.options.alone else "is replaced"
                self._say(f"Process {child.pid} {child.reason} and {what}.")
                if child.was_short and not child.has_run_tasks:
                    self._say("It had run no task: the limit is too low. Raise it.")
                    self._pause()

    def _describe_death(self, child: Child) -> str:
        if child.was_killed:
            return f"did not answer for {child.silences * _ASK_INTERVAL:.0f} s and was killed"
        return describe_exit(child.process.exitcode, self._out_of_memory.has_killed())

    def _note_death(self, child: Child, death: str) -> None:
        if time.monotonic() - child.began > _SOUND:
            self._deaths = 0
        logger.error("Process %s of the worker %s.", child.pid, death)
        pause = self._pause()
        self._say(f"No process starts within {pause:.1f} s. What {child.pid} had in hand is given back.")
        if not (child.board.is_all_told and child.has_told_all):
            self._drained_from = time.monotonic() + self._lease + 1.0
            self._say(
                "It was claiming just then. What that has taken comes back when its leases have run out, in "
                f"{self._lease:.0f} s at most."
            )

    def _pause(self) -> float:
        """Put off the start of further processes; return for how many seconds."""
        self._deaths += 1
        pause: float = min(_FIRST_PAUSE * 2 ** (self._deaths - 1), _LONGEST_PAUSE)
        self._start_at = time.monotonic() + pause
        return pause

    # Stopping

    def _stop_if_broken(self) -> None:
        """End, for whoever watches over the worker to start another, rather than go on without a part."""
        ended = [what for what, part in self._parts.items() if part.has_ended]
        if self._stopped_at is None and ended:
            logger.critical("The thread that %s has died by a fault of its own: the worker stops.", ended[0])
            self._code = FAULT
            self._stops = max(self._stops, 1)

    def _stop_parts(self) -> None:
        for part in self._parts.values():
            part.stop()

    def _stop_if_told(self, why: str = "") -> None:
        if self._stops == 0:
            return
        grace = self._options.grace if self._stops == 1 else 0.0
        if self._stopped_at is None:
            if why or self._stops == 1:
                grace_time = f"running tasks may end within {grace:g} s; a second signal ends them now."
                self._say(why or f"Stopping: {grace_time}")
            self._stopped_at = time.monotonic()
            self._stop_parts()
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

    def _found(self, seen: Seen | None) -> None:
        """The prober has looked; called in its thread."""
        self._seen = seen
        self._looks += 1
        self._looked_at = time.monotonic()
        self._recovery.look_at({} if seen is None else seen.expired)
        self._wake()

    def _wake(self) -> None:
        self._wake_writer.send_bytes(b".")

    def _wake_children(self) -> None:
        """Pass on what the prober has found."""
        if self._looks == self._looks_told:
            return
        self._looks_told, seen = self._looks, self._seen or Seen.nothing()
        for team, due in zip(self._teams, (seen.due, seen.alone), strict=True):
            team.due = due
            team.tell()

    def _see_who_answers(self) -> None:
        """Kill who hangs, as an action does that lets no other thread of Python go on: nothing else ends it.

        Those have to answer, too, whom nobody tells of work any more. A silence is counted in looks: by the
        clock all would be silent when the machine has stood still.
        """
        if time.monotonic() < self._ask_at:
            return
        self._ask_at = time.monotonic() + _ASK_INTERVAL
        for child in self._children:
            child.note_silence()
            if child.silences * _ASK_INTERVAL > max(self._lease, _LONGEST_HANG):
                child.kill()
            elif child.is_ready and not child.is_at_work:
                child.send("due", [])

    def _see_whether_drained(self) -> None:
        """Stop when no process is at work, and a look that began after that finds nothing due.

        What a process has said before does not count: it may have claimed since, and be too busy to say so.
        """
        seen = self._seen
        if not self._options.drain or self._stopped_at is not None or seen is None:
            return
        is_at_work = not all(child.is_idle for child in self._children)
        something = any(seen) or self._prober.holds_back or self._give_back.is_busy
        # What could not be given back comes back when its leases have run out.
        drained_from = max(self._drained_from, self._give_back.failed_at + self._lease + 1.0)
        if something or is_at_work or time.monotonic() < drained_from:
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
            seen = self._prober.look()
        except Exception:  # whatever it is, nobody knows that nothing is
            logger.exception("Whether something is due can not be seen.")
            return True
        if left_out := self._prober.left_out:
            self._say(f"Nobody knows whether something is due in {', '.join(left_out)}.")
        return bool(seen.due or seen.alone or left_out)

    def _is_well(self) -> bool:
        """Say whether the prober looks, and at least one process answers."""
        latest = max((child.answered_at for child in self._children), default=0.0)
        heard = latest if self._stopped_at is not None else min(self._looked_at, latest)
        silence = time.monotonic() - heard
        return self._seen is not None and silence < _LONGEST_SILENCE + self._options.poll


def _longest_lease(queue: Queue[Any]) -> float:
    """Return after how many seconds its abandoned tasks are taken back."""
    try:
        lease = queue.recovery().lease or queue.lease
    except Exception:  # of the callable that makes its queryset, which the prober tells
        lease = queue.lease
    return lease.total_seconds()


def _nothing(*_: Any) -> None:
    """Restore no signals; tell nobody."""
