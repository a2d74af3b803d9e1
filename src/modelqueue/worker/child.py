"""A process of the worker as its supervisor knows it: what it has said last, and whether it is dead."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from modelqueue.worker import process
from modelqueue.worker.bell import Bell
from modelqueue.worker.board import Blank, Board
from modelqueue.worker.give_back import Held
from modelqueue.worker.options import Options
from modelqueue.worker.running import Claimed
from modelqueue.worker.system import context, is_alive, stop_signals_blocked

__all__ = ["Child"]

logger = logging.getLogger("modelqueue")

#: Messages to a process that it has not answered; more are not sent.
_MOST_UNANSWERED = 8
#: What multiprocessing takes for the exit code when nobody could tell it.
_FORK_SERVER_DIED = 255
#: Seconds beyond the grace time after which a process that has not ended is killed.
_EXTRA = 4.0


class Child:
    """Started at once."""

    def __init__(self, options: Options, places: int) -> None:
        system = context()
        self.pipe, theirs = system.Pipe()
        self.board = Board(places, options.names)
        self._bell = Bell(options.names)
        self.process = system.Process(
            target=process.main, args=(options, theirs, self.board, self._bell), name="modelqueue-worker"
        )
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
        #: The numbers of tasks whose actions took too long, and could not be ended.
        self.overdue: set[int] = set()
        self.has_run_tasks = False
        #: Was it to be replaced almost as soon as it was ready?
        self.was_short = False
        self.answered_at = self.began
        #: What it has claimed that its board can not name, by the place there.
        self.claimed: dict[int, Claimed] = {}
        self.kill_at: float | None = None
        self.was_killed = False
        self.has_told_all = True
        #: How many slots are taken, as it said last.
        self.running = 0
        #: Hints since it has said something last.
        self._hints = 0
        self._unanswered = 0
        #: How often in a row it was found to owe an answer.
        self.silences = 0
        #: Held by who sends, as hints come from other threads than that of the supervisor.
        self._speaking = threading.Lock()
        #: How many of its answers are to come until one is to a message that was sent after `doubt`.
        self._awaited = 0

    def send(self, *message: Any) -> None:
        """Send a message, unless it has not taken the last ones: nobody waits for a process that hangs."""
        with self._speaking:
            if self._unanswered < _MOST_UNANSWERED:
                self._send(message)

    def _send(self, message: tuple[Any, ...]) -> None:
        self._unanswered += 1
        try:
            self.pipe.send(message)
        except OSError:  # it has died, which its sentinel tells
            logger.debug("Process %s does not listen.", self.pid)

    def hint(self, names: list[str]) -> None:
        """Have it claim at once, as there may be due tasks of these queues. It does not answer."""
        with self._speaking:
            self._hints += 1
            self._bell.ring(names)

    def close(self) -> None:
        """Take leave of a dead one: what is sent to it from now on goes nowhere."""
        with self._speaking:
            self.pipe.close()
            self._bell.leave()

    def stop(self, grace: float) -> None:
        """Tell it to stop; whatever it does, it is killed some time after the grace."""
        if self._grace is None or grace < self._grace:  # once, and then at once
            self._grace = grace
            with self._speaking:  # whatever it has not taken
                self._unanswered = min(self._unanswered, _MOST_UNANSWERED - 1)
                self._send(("stop", grace))
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
        except Exception as error:  # of a primary key, perhaps, that can be pickled, but not made again
            logger.debug("What process %s has said can not be read: %s", self.pid, error)
            self.has_told_all = False
            return ("unreadable",)

    def doubt(self) -> None:
        """Take what it has said so far for old: from now on its next answer is waited for."""
        self._awaited = self._unanswered + 1

    def answered(self, running: int) -> None:
        with self._speaking:
            self._unanswered -= 1
            self._hints = 0
        self.silences = 0
        self._awaited -= 1
        self.answered_at = time.monotonic()
        self.running = running

    def note_silence(self) -> None:
        """Note, now and then, whether it owes an answer."""
        self.silences += self._unanswered > 0

    def has_claimed(self, claimed: Sequence[Claimed | Blank]) -> None:
        """What was at these places before has ended."""
        for one in claimed:
            if isinstance(one, Blank):
                self.board.learn(one)
            else:
                self.claimed[one.place] = one

    @property
    def has_ended_in_order(self) -> bool:
        """Say, of a dead one, whether it has ended as it should, or was killed as it did not stop."""
        if self.is_stopping:
            return self.was_killed or self.process.exitcode == 0
        # One that is replaced lets its tasks end. What is left then has ended the process.
        return self.reason is not None and self.process.exitcode == 0 and not self.held()

    @property
    def is_at_work(self) -> bool:
        """Say whether it takes tasks, or soon will."""
        return not self.is_stopping and self.reason is None

    @property
    def is_idle(self) -> bool:
        """Say whether it runs nothing, as far as it has said; one that is to be replaced runs its last."""
        return self.is_ready and self.reason is None and not self.running

    @property
    def burden(self) -> int:
        """How much it has to do, as far as is known: tasks to run, and messages to answer or to follow."""
        return self.running + self._unanswered + self._hints

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

    def held(self) -> list[Held]:
        """Return what it had in hand when it died."""
        held = []
        for place, note in self.board.read_all().items():
            told = self.claimed.get(place)
            if note.queue is not None and note.row is not None:
                queue, row = note.queue, note.row
            elif told is not None and told.number == note.number:
                queue, row = told.queue, told.row
            else:  # it was not told in time
                continue
            held.append(Held(queue, row, note.leases, note.has_begun, note.number in self.overdue))
        return held

    def kill(self) -> None:
        self.was_killed = True
        if self.process.exitcode is None:
            self.process.kill()
        elif not self.has_ended and self.pid is not None:
            # Without its fork server nobody knows of its end, and the pid may be that of another by now.
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)
