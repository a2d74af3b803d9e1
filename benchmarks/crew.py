"""A turn of a contender: its tasks, its worker, and how fast that was."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.actions import count_told, told
from benchmarks.environments import CHECKOUT, ROOT, python_of
from benchmarks.roster import Contender
from benchmarks.stores import Postgres, Spent, Store

__all__ = ["Crew", "Load", "Turn", "end"]

#: Seconds that a worker may take for its tasks.
PATIENCE = 900.0
#: Seconds between two looks at it.
_PAUSE = 0.02


@dataclass(frozen=True)
class Load:
    """What is to be done, and by how many."""

    tasks: int
    """0: the worker goes on until it is stopped."""
    processes: int = 1
    kind: str = "nothing"
    threads: int = 4
    slots: int = 0
    """Of an async action, in each process; 0: the action is synchronous."""


@dataclass
class Turn:
    began: float
    """When all processes were up and could claim."""
    outcomes: list[float]
    """When each of the others was committed, or (where no database tells) begun; in order."""
    ended: float
    """When the last of them was there."""
    spent: Spent = field(default_factory=Spent)
    """What PostgreSQL has done meanwhile."""

    @property
    def rate(self) -> float:
        return len(self.outcomes) / (self.ended - self.began)

    def rate_of_tenth(self, number: int) -> float:
        """Return the rate of the tasks of this tenth, by when they ended.

        Many end with one commit: it begins and ends with a whole one.
        """
        size = len(self.outcomes) // 10
        begin = self.outcomes[number * size - 1] if number else self.began
        end = self.outcomes[(number + 1) * size - 1]
        if begin == end:
            raise RuntimeError("too few tasks to tell one tenth of them from the next")
        return sum(begin < moment <= end for moment in self.outcomes) / (end - begin)


@dataclass
class Crew:
    """A contender with its store."""

    contender: Contender
    store: Store
    load: Load
    more: dict[str, str] = field(default_factory=dict)
    """Further environment."""

    def drain(
        self,
        history: int = 0,
        beside: AbstractContextManager[object] | None = None,
        watch: Callable[[int], None] = lambda process: None,
    ) -> Turn:
        """Make new tables, add the tasks and have them done.

        Args:
            history: so many finished rows are there already.
            beside: what is to be there meanwhile.
            watch: is called with the process of the worker now and then.
        """
        self.do("create", *(["history", history] if history else []), "enqueue", self.load.tasks)
        self.store.settle()
        is_told = not self.contender.done
        with tempfile.TemporaryDirectory(prefix="modelqueue-") as folder:
            path = Path(folder) / "told"
            if is_told:
                self.more["BENCHMARK_TOLD"] = str(path)
            with (
                beside or nullcontext(),
                self.store.closed(self.contender.table) as open_when_there_are,
                self.working() as workers,
            ):
                if open_when_there_are is not None:
                    began = open_when_there_are(self.load.processes)
                before = self._spent()
                ended = self._wait_until_drained(workers, path, watch)
                spent = self._spent().since(before)
            if is_told:
                return _as_told(path, ended)
        assert isinstance(self.store, Postgres)
        outcomes = self.store.outcomes(self.contender.done, began)
        if not outcomes:
            raise RuntimeError("no task was done")
        return Turn(began, outcomes, outcomes[-1], spent)

    def do(self, *calls: str | int) -> dict[str, float]:
        """Call functions of the contender: each a name, with its numbers behind it; return their seconds."""
        done = subprocess.run(
            [*self._command, *map(str, calls)],
            env=self._environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{calls[0]} has failed: {_last_line(done.stdout)}")
        lines = (line.split() for line in done.stdout.splitlines() if line.startswith("took "))
        return {function: float(seconds) for _took, function, seconds in lines}

    @contextmanager
    def working(self) -> Iterator[list[subprocess.Popen[str]]]:
        """Have its worker run, until the end of the block at the latest."""
        commands = 1 if self.contender.has_processes else self.load.processes
        with tempfile.TemporaryFile("w+") as log:
            processes = [self.start(log, "work") for _ in range(commands)]
            try:
                yield processes
            except Exception as error:
                log.seek(0)
                raise RuntimeError(f"{error} Its worker said: {_last_line(log.read())}") from error
            finally:
                end(processes)

    @contextmanager
    def feeding(self) -> Iterator[Callable[[int], float]]:
        """Yield what adds a task to the queue with this number, and returns when that was committed."""
        process = self.start(subprocess.PIPE, "feed", told=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        orders, answers = process.stdin, process.stdout

        def add(number: int) -> float:
            print(number, file=orders, flush=True)
            said = ""
            for line in answers:
                if line.startswith("added "):
                    return float(line.split()[1])
                said = line
            raise RuntimeError(f"adding a task has failed: {_last_line(said)}")

        try:
            yield add
        finally:
            orders.close()
            process.wait()
            answers.close()

    @property
    def _command(self) -> list[str]:
        return [python_of(self.contender), "-m", "benchmarks.contenders", self.contender.module]

    @property
    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            **self.store.environment,
            **self.contender.environment,
            "BENCHMARK_KIND": self.load.kind,
            "BENCHMARK_PROCESSES": str(self.load.processes),
            "BENCHMARK_THREADS": str(self.load.threads),
            "BENCHMARK_SLOTS": str(self.load.slots),
            "BENCHMARK_DRAIN": "1" if self.load.tasks else "0",
            # Others must not see the package of this checkout.
            "PYTHONPATH": str(ROOT) if self.contender.requirements else CHECKOUT,
            **self.more,
        }

    def start(
        self, log: IO[str] | int, *call: str | int, told: int = subprocess.DEVNULL
    ) -> subprocess.Popen[str]:
        """Call a function of the contender, without waiting for its end."""
        return subprocess.Popen(
            [*self._command, *map(str, call)],
            env=self._environment,
            cwd=ROOT,
            stdin=told,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _wait_until_drained(
        self, workers: list[subprocess.Popen[str]], path: Path, watch: Callable[[int], None]
    ) -> float | None:
        """Return when no row was left without an outcome; None: nobody has looked."""
        deadline, ended = time.monotonic() + PATIENCE, None
        while not self._is_drained(workers, path):
            if time.monotonic() > deadline:
                raise RuntimeError(f"It was not done within {PATIENCE:.0f} s.")
            if self.contender.left and ended is None and not self.store.has(self.contender.left):
                ended = time.time()
            watch(workers[0].pid)
            time.sleep(_PAUSE)
        return ended

    def _is_drained(self, workers: list[subprocess.Popen[str]], path: Path) -> bool:
        codes = [worker.poll() for worker in workers]
        if any(codes):
            raise RuntimeError(f"A worker has ended with code {max(filter(None, codes))}.")
        if self.contender.ends:
            return None not in codes
        if 0 in codes:
            raise RuntimeError("A worker has ended by itself.")
        return count_told(path) >= self.load.tasks

    def _spent(self) -> Spent:
        return self.store.spent() if isinstance(self.store, Postgres) else Spent()


def _as_told(path: Path, ended: float | None) -> Turn:
    """Count from when the last of the processes has begun its first task, to the end, or to the last task."""
    records = sorted(told(path))
    if not records:
        raise RuntimeError("no task was done")
    began: dict[int, float] = {}
    for moment, process, _task in records:
        began.setdefault(process, moment)
    begin = max(began.values())
    begun = [moment for moment, _process, _task in records if moment > begin]
    return Turn(begin, begun, ended or records[-1][0])


def end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        process.wait()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing"])[-1]
