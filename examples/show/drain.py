"""A worker drains the queue, one of its processes is killed, and everything is written down for the proof."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from documents.models import Document
from modelqueue import Status
from show.files import short
from show.progress import Progress
from show.worker import Line, Worker

#: Seconds without any news after which the demo gives up. Recovery and retries take less.
PATIENCE = 60
#: Seconds after which a worker is started again, when there are documents that were not due.
PAUSE = 1.0
#: Seconds in which a supervisor has certainly taken back what a dead process ran.
TIME_TO_TAKE_BACK = 2.0

Say = Callable[[str], None]


class Drain:
    """One drain of the queue, as seen by the process that starts the worker."""

    def __init__(self, total: int, large: set[int], log: Path) -> None:
        self.attempts: Counter[int] = Counter()
        """By primary key: the attempts that were reported as ended or recovered."""
        self.killed: int | None = None
        """The pid of the killed process."""
        self.taken_along: list[Document] = []
        """What it ran."""
        self.recovered: dict[int, int] = {}
        """By primary key: the pid of the supervisor that has taken the document back."""
        self.problems: list[str] = []
        self.seconds = 0.0

        self._total = total
        self._large = large
        self._log = log
        self._lock = threading.Lock()
        #: By pid and primary key: what a process has begun and not yet reported on, with the attempts before.
        self._holds: defaultdict[int, dict[int, int]] = defaultdict(dict)
        self._suspect: int | None = None
        self._died_at = math.inf
        self._news: list[str] = []
        self._heard = time.monotonic()

    def run(self, processes: int) -> None:
        """Have a worker of so many processes drain the queue, until no document is left."""
        progress = Progress(self._total)
        try:
            with self._log.open("w", encoding="utf-8") as log:
                tally = self._drain_once(processes, log, progress)
                if tally["waiting"] or tally["working"]:
                    progress.say("nothing more is due, so the worker has ended, but not all is done:")
                    progress.say(f"  {tally['waiting']} documents have failed and wait for the next attempt")
                    progress.say(f"  {tally['working']} are held by a lease that has not run out yet")
                    progress.say("  so the worker is started again until all is done")
                while not self.problems and (tally["waiting"] or tally["working"]):
                    time.sleep(PAUSE)
                    tally = self._drain_once(processes, log, progress)
        finally:
            self.seconds = progress.seconds
            progress.close()

    def _drain_once(self, processes: int, log: TextIO, progress: Progress) -> dict[str, int]:
        """See a worker to its end; return the tally after it."""
        with Worker(processes, log, self._hear) as worker:
            is_gone = False
            while not is_gone:
                time.sleep(0.1)
                is_gone = worker.is_gone()  # before the last look, so that this misses nothing
                while self._news:
                    progress.say(self._news.pop(0))
                self._inspect(progress.say, TIME_TO_TAKE_BACK if not is_gone else 0.0)
                tally = Status.tally(Document.objects.all(), "status")
                progress.show(tally)
                if time.monotonic() - self._heard > PATIENCE:
                    self.problems.append(f"there was no news for {PATIENCE} s: {worker.last_words}")
                    break
        if failure := worker.failure():
            self.problems.append(failure)
        return tally

    # While the worker runs; called by the thread that listens to it

    def _hear(self, line: Line) -> None:
        with self._lock:
            pid = line["process"]
            if "event" in line:
                self._heard = time.monotonic()
                self._note(pid, line)
            elif line["level"] == "ERROR" and f"Process {self._suspect} " in line["message"]:
                # By the supervisor: the process is gone, so nothing more is to come from it.
                self._died_at = time.monotonic()
                self._news.append(line["message"])

    def _note(self, pid: int, line: Line) -> None:
        pk = line["pk"]
        if line["event"] == "task_claimed":
            self._holds[pid][pk] = line["attempts"]
            self._kill_if_it_is_time(pid, pk)
            return
        if line["event"] == "task_recovered":
            self.recovered[pk] = pid
            self._news.append(f"the supervisor has taken back document {pk}: {line['state']}")
        else:
            self._holds[pid].pop(pk, None)
        # What an attempt counts that lost its lease was counted by its recovery.
        if line["event"] != "lease_lost" and line["outcome"] not in ("retry", "release"):
            self.attempts[pk] += 1
        if line["event"] == "task_finished" and pk in self.recovered:
            outcome = f"{line['state']} with {line['attempts']} attempts"
            self._news.append(f"pid {pid} has run document {pk} again: {outcome}")

    def _kill_if_it_is_time(self, pid: int, pk: int) -> None:
        """Kill one process, once some work is done, when it has just begun a large document."""
        done = sum(self.attempts.values()) / self._total
        is_large = pk in self._large or done > 0.8
        if self.killed is None and self._suspect is None and done > 0.2 and is_large:
            self._suspect = pid
            # Without a chance to tidy up. Windows has another name for that.
            os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    # After the kill

    def _inspect(self, say: Say, seconds: float) -> None:
        """Once the killed process is gone for so many seconds: see what was taken back of what it ran."""
        with self._lock:
            pid = self._suspect
            if pid is None or time.monotonic() < self._died_at + seconds:
                return
            held = self._holds.pop(pid, {})
            # It was quicker than the signal with some of them, and only its report is missing.
            self.attempts.update(set(held) - set(self.recovered))
            left = list(Document.objects.filter(pk__in=set(held) & set(self.recovered)))
            self._suspect, self._died_at = None, math.inf
            if not left:
                say(f"pid {pid} was killed just after it had done what it held; it will be another")
                return
            self.killed, self.taken_along = pid, left
        say(f"pid {pid} was killed while it ran {len(left)} documents:")
        for document in left:
            say(f"  document {document.pk}, {short(document.path)}")
            say(f"    now its status is {int(document.status)}: {document.status}")
