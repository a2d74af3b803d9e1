"""Workers drain the queue, one of them is killed, and everything is written down for the proof."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from documents.models import Document
from modelqueue import State, Status
from show.files import short
from show.progress import Progress
from show.workers import Event, Worker, Workers

#: Seconds without any news after which the demo gives up. Recovery and retries take less.
PATIENCE = 60


class Drain:
    """One drain of the queue, as seen by the process that starts the workers."""

    def __init__(self, total: int, large: set[int], log: Path) -> None:
        self.attempts: Counter[int] = Counter()
        """By primary key: the attempts that workers have reported as ended or recovered."""
        self.killed: Worker | None = None
        self.taken_along: Document | None = None
        """What the killed worker held."""
        self.recovered_by: dict[int, Worker] = {}
        self.problems: list[str] = []
        self.seconds = 0.0

        self._total = total
        self._large = large
        self._log = log
        self._lock = threading.Lock()
        self._suspect: Worker | None = None
        self._news: list[str] = []
        self._heard = time.monotonic()

    def run(self, count: int) -> None:
        """Start so many workers and see them to the end."""
        progress = Progress(self._total)
        try:
            with self._log.open("w", encoding="utf-8") as log, Workers(log, self._hear) as workers:
                for _ in range(count):
                    workers.start()
                pids = ", ".join(str(worker.pid) for worker in workers.started)
                progress.say(f"{count} workers have started: pid {pids}")
                while not all(worker.is_gone() for worker in workers.started):
                    time.sleep(0.1)
                    if self._suspect is not None and self._suspect.is_gone():
                        self._inspect(self._suspect, workers, progress.say)
                    while self._news:
                        progress.say(self._news.pop(0))
                    progress.show(Status.tally(Document.objects.all(), "status"))
                    if time.monotonic() - self._heard > PATIENCE:
                        self.problems.append(f"no worker has said anything for {PATIENCE} s")
                        break
                self.problems += filter(None, (worker.failure() for worker in workers.started))
        finally:
            self.seconds = progress.seconds
            progress.close()

    # While workers run; called by the threads that listen to them

    def _hear(self, worker: Worker, event: Event) -> None:
        with self._lock:
            self._heard = time.monotonic()
            if event["event"] == "task_claimed":
                worker.holds = event["pk"]
                self._kill_if_it_is_time(worker)
                return
            if event["event"] == "task_recovered":
                self.recovered_by[event["pk"]] = worker
                self._news.append(f"pid {worker.pid} has recovered document {event['pk']}: {event['state']}")
            else:
                worker.holds = None
            if event["event"] != "lease_lost":  # what that attempt counts was counted by its recovery
                self.attempts[event["pk"]] += 1
            if event["event"] == "task_finished" and event["pk"] in self.recovered_by:
                outcome = f"{event['state']} with {event['attempts']} attempts"
                self._news.append(f"pid {worker.pid} has run document {event['pk']} again: {outcome}")

    def _kill_if_it_is_time(self, worker: Worker) -> None:
        """Kill one worker, once some work is done, when it has just claimed a large document."""
        done = sum(self.attempts.values()) / self._total
        is_large = worker.holds in self._large or done > 0.8
        if self.killed is None and self._suspect is None and done > 0.2 and is_large:
            self._suspect = worker
            worker.kill()

    # After the kill

    def _inspect(self, worker: Worker, workers: Workers, say: Callable[[str], None]) -> None:
        """See what a killed worker has left, and start another in its place."""
        document = Document.objects.filter(pk=worker.holds or 0).first()
        self._suspect = None
        if document is None:
            say(f"pid {worker.pid} was killed when it held nothing")
        elif document.status.state == State.working:
            self.killed, self.taken_along = worker, document
            say(f"pid {worker.pid} was killed while it held document {document.pk}, {short(document.path)}")
            say(f"  its status is {int(document.status)}: {document.status}")
        else:
            # It was quicker than the signal, only its report is missing. Another one will be caught.
            self.attempts[document.pk] += 1
            say(f"pid {worker.pid} was killed just after it had finished document {document.pk}")
        say(f"  pid {workers.start().pid} takes its place")
