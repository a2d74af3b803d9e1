"""The course of a soak: the load, the faults, the end, and what is checked there."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from django.db import Error, connection, connections

from tests.processes import ROOT
from tests.servers import Server
from tests.soak.queues import LEDGER, what
from tests.soak.signs import FOLDER
from tests.testapp.models import Ledger, Task
from tests.worker.workers import Worker

T = TypeVar("T")

#: The workers, and what each is told. The grace is short, as it is waited for.
WORKERS = 2
QUEUES = ("soak.plain", "soak.atomic", "soak.asynchronous")
OPTIONS = (*QUEUES, "--processes", 2, "--threads", 3, "--grace", 3, "-v", 2)
#: Seconds between two faults.
SHORTEST, LONGEST = 0.5, 4.0
#: Tasks that wait at most; how many are canceled by themselves, and how many take this long: two leases.
MOST, CANCELED, LONG, LENGTH = 60, 0.03, 0.02, 8.0
#: An atomic task holds up all who write on SQLite.
SHORT_OF_SQLITE = 0.05
#: So that a table grows. (What it is in a message is not worth the reading.)
PADDING = 4000 * " "
#: Workers that may end by themselves until that is enough.
MOST_ENDED = 10
#: Where the logs of the workers are left when something was wrong.
LOGS = ROOT / "build" / "soak"
#: Seconds after the last fault within which all has to be done.
PATIENCE = 90


class Course:
    """What is done to workers, by whom it calls, while it makes tasks and sees to it that workers run.

    Args:
        workers: how each is started.
    """

    def __init__(self, server: Server, chance: random.Random, workers: dict[str, Any]) -> None:
        self.server = server
        self.options_of_workers = workers
        #: What happens, and what the tasks are: apart, as how many there are depends on the machine.
        self.chance = chance
        self.chance_of_load = random.Random(chance.random())
        self.done: Counter[str] = Counter()
        self.workers: list[Worker] = []
        self.former: list[Worker] = []
        #: Who was frozen, or cut off alone, ever; and until when those are frozen who still are.
        self.away: set[int] = set()
        self.thaw_at: dict[int, float] = {}
        #: Is an attempt of each task to be enough that does not write to the database of the queue?
        self.charges_nothing = False
        self.wrong: list[str] = []
        self.began = time.monotonic()
        self.made = 0

    def run(self, harm: Callable[[Course], None]) -> list[str]:
        """Go through it; return which promises were not kept."""
        self.make_tables()
        try:
            self.workers = [self.start() for _ in range(WORKERS)]
            harm(self)
            self.end()
        finally:
            if self.wrong:
                self.keep_logs()
            for worker in [*self.workers, *self.former]:
                worker.close()
        self.tally()
        return self.wrong

    def keep_logs(self) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        for worker in [*self.workers, *self.former]:
            (LOGS / f"{worker.pid}.log").write_text(worker.output)
        self.say(f"what the workers have said is in {LOGS}")

    def make_tables(self) -> None:
        for using in {"default", LEDGER}:
            self.make_database(using)
            with connections[using].schema_editor() as editor:
                editor.create_model(Ledger)
        with connection.schema_editor() as editor:
            editor.create_model(Task)

    def make_database(self, using: str) -> None:
        vendor, name = connection.vendor, connections[using].settings_dict["NAME"]
        if vendor == "sqlite":
            return
        with connections[using]._nodb_cursor() as cursor:
            if self.server.space and using == "default":
                cursor.execute(f"CREATE TABLESPACE small LOCATION '{self.server.space}'")
                name += " TABLESPACE small"
            # MariaDB knows a folder on a disk of its own as a database already.
            cursor.execute(f"CREATE DATABASE {'IF NOT EXISTS ' if vendor == 'mysql' else ''}{name}")

    def start(self) -> Worker:
        return Worker(*OPTIONS, **self.options_of_workers)

    def pause(self, seconds: float) -> None:
        """See to the load, and to those who are frozen, for a while."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.feed()
            self.thaw()
            self.see_to_workers()
            time.sleep(0.05)

    def pause_until(self, condition: Callable[[], object]) -> None:
        """Do so until this holds, but not for ever: at the end it is seen what was not done."""
        deadline = time.monotonic() + PATIENCE
        while not condition() and time.monotonic() < deadline:
            self.pause(0.05)

    def feed(self) -> None:
        with suppress(Error):  # there is the next time
            if Task.objects.filter(status__state="waiting").count() < MOST:
                Task.objects.bulk_create([self.task() for _ in range(20)])
                self.made += 20
            return
        self.done["(no tasks could be made)"] += 1
        connection.close()

    def task(self) -> Task:
        chance = self.chance_of_load
        word = "cancel" if chance.random() < CANCELED else ""
        seconds = LENGTH if chance.random() < LONG else chance.expovariate(4)
        kind = chance.choice(KINDS)
        if kind == "atomic" and connection.vendor == "sqlite":
            seconds = min(seconds, SHORT_OF_SQLITE)
        return Task(data=f"{kind} {seconds:.3f} {word}{PADDING}")

    def thaw(self, everybody: bool = False) -> None:
        for pid, moment in list(self.thaw_at.items()):
            if everybody or time.monotonic() >= moment:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                del self.thaw_at[pid]

    def see_to_workers(self) -> None:
        """None ends by itself. (Whom a fault has ended was replaced there.)"""
        for worker in list(self.workers):
            if worker.process.poll() is not None:
                self.wrong.append(f"Worker {worker.pid} has ended with code {worker.process.returncode}.")
                if len(self.wrong) > MOST_ENDED:
                    raise RuntimeError("Worker after worker ends by itself.")
                self.replace(worker)

    def replace(self, worker: Worker) -> None:
        """Start another in its place, as whoever watches over the workers of a machine does."""
        self.workers[self.workers.index(worker)] = self.start()
        self.former.append(worker)

    # The end

    def end(self) -> None:
        self.thaw(everybody=True)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and (left := self.patiently(self.left)):
            self.see_to_workers()
            time.sleep(0.2)
        if left:
            self.wrong.append(f"{left} tasks were not done {PATIENCE} s after the last fault.")
        else:
            self.say("all tasks are done")
        for worker in self.workers:
            code, seconds = worker.stop()
            if code != 0:
                self.wrong.append(f"Worker {worker.pid} has stopped with code {code}.")
            self.say(f"a worker has stopped in {seconds:.1f} s")
        self.find_orphans()
        self.patiently(self.check_tasks)
        self.check_twice()

    def left(self) -> int:
        return Task.objects.filter(status__state__in=["waiting", "working"]).count()

    def find_orphans(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if not (left := [pid for worker in [*self.workers, *self.former] for pid in worker.members()]):
                return
            time.sleep(0.1)
        self.wrong.append(f"These processes of workers are left: {left}")

    def runs(self) -> Counter[tuple[int, str]]:
        """Return how often each task has written down that it runs, by its key and kind."""
        runs: Counter[tuple[int, str]] = Counter()
        for using in {"default", LEDGER}:
            runs.update(Ledger.objects.using(using).values_list("task", "worker"))
        return runs

    def check_tasks(self) -> None:
        effects = self.runs()
        tasks = list(Task.objects.all())
        if len(tasks) < self.made:
            self.wrong.append(f"Of {self.made} tasks {len(tasks)} are there.")
        for task in tasks:
            kind, is_canceled = task.data.split()[0], what(task)[1]
            count = effects[task.pk, kind]
            if task.status.state.name != ("canceled" if is_canceled else "finished"):
                self.wrong.append(f"Task {task.pk}, {task.data.rstrip()!r}, ended as {task.status}.")
            if kind == "atomic" and count != (not is_canceled):
                self.wrong.append(f"Task {task.pk}, {task.data.rstrip()!r}, has had {count} effects.")
            if kind != "atomic" and self.charges_nothing and task.status.attempts != 1:
                self.wrong.append(f"Task {task.pk}, {task.data.rstrip()!r}, was charged: {task.status}.")
            if kind != "atomic" and count < 1:
                self.wrong.append(f"Task {task.pk}, {task.data.rstrip()!r}, was never run.")

    def check_twice(self) -> None:
        for sign in (Path(os.environ[FOLDER]) / "twice").iterdir():
            pk, state, first, second = sign.name.split()
            task = Task.objects.get(pk=pk)
            if int(first) in self.away:
                self.done["(a task ran again while its process was frozen, or cut off)"] += 1
            elif task.data.startswith("atomic") and state == "ended":
                self.done["(an atomic action ran again as it could not be committed)"] += 1
            else:
                self.wrong.append(
                    f"Process {second} ran task {pk}, {task.data.rstrip()!r}, whose action in {first}, which "
                    f"was alive, was {state}."
                )

    def tally(self) -> None:
        print("\nFaults:")
        for name, count in sorted(self.done.items()):
            print(f"  {count:5} {name}")
        print("Tasks:")
        states = Counter(task.status.state.name for task in Task.objects.only("status"))
        again = sum(count - 1 for count in self.runs().values())
        print(f"  {self.made:5} made")
        for state, count in sorted(states.items()):
            print(f"  {count:5} {state}")
        print(f"  {again:5} runs that a fault has cost", flush=True)

    def patiently(self, function: Callable[[], T]) -> T:
        """Ask the database, which may have ended our session."""
        try:
            return function()
        except Error:
            connection.close()
            return function()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {text}", flush=True)

    # What is hit

    def worker(self) -> Worker:
        return self.chance.choice(self.workers)

    def a_process(self) -> int | None:
        """One that runs tasks."""
        draw = self.chance.random()  # always one, so that a seed repeats
        worker = self.worker()
        server = worker.fork_server
        found = sorted(worker.members(parent=server)) if server else []
        return found[int(draw * len(found))] if found else None

    def kill(self, pid: int | None) -> None:
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def freeze(self, pid: int | None, seconds: float) -> None:
        if pid and pid not in self.thaw_at:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self.away.add(pid)
                self.thaw_at[pid] = time.monotonic() + seconds


KINDS = ("plain", "atomic", "async")


# Faults


def kill_process(course: Course) -> None:
    course.kill(course.a_process())


def kill_supervisor(course: Course) -> None:
    worker = course.worker()
    worker.process.kill()
    worker.process.wait()
    course.replace(worker)


def kill_fork_server(course: Course) -> None:
    course.kill(course.worker().fork_server)


def kill_group(course: Course) -> None:
    worker = course.worker()
    worker.kill_group()
    course.replace(worker)


def stop_worker(course: Course) -> None:
    """As a deployment does: the next one is there before the last one has stopped."""
    worker = course.worker()
    worker.send(signal.SIGTERM)
    course.replace(worker)


def freeze_process(course: Course) -> None:
    seconds = course.chance.uniform(0.5, 8)
    course.freeze(course.a_process(), seconds)


def freeze_supervisor(course: Course) -> None:
    seconds = course.chance.uniform(0.5, 5)
    course.freeze(course.worker().pid, seconds)


def end_some_sessions(course: Course) -> None:
    end_sessions(course.chance.uniform(0.1, 0.7), course.chance.random())


def end_all_sessions(course: Course) -> None:
    """Each second, for some."""
    for _ in range(course.chance.randint(1, 6)):
        end_sessions(1.0, 0.0)
        course.pause(1)


def end_sessions(share: float, seed: float) -> None:
    """Let the server end this share of all sessions but ours."""
    chance = random.Random(seed)
    find, end = _SESSIONS[connection.vendor]
    with suppress(Error):
        with connection.cursor() as cursor:
            cursor.execute(find)
            for (number,) in sorted(cursor.fetchall()):
                if chance.random() < share:
                    with suppress(Error):  # it has just ended by itself
                        cursor.execute(end.format(number))
        return
    connection.close()


#: How to find the sessions of others, and to end one.
_SESSIONS = {
    "postgresql": (
        "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid != pg_backend_pid()",
        "SELECT pg_terminate_backend({})",
    ),
    "mysql": (
        "SELECT id FROM information_schema.processlist WHERE command != 'Daemon' AND id != CONNECTION_ID()",
        "KILL {}",
    ),
}


def restart_server(course: Course) -> None:
    restart(course, course.chance.random() < 0.5, course.chance.uniform(0, 2))


def stop_server_for_long(course: Course) -> None:
    """For longer than all leases."""
    restart(course, course.chance.random() < 0.5, course.chance.uniform(5, 12))


def restart(course: Course, at_once: bool, seconds: float) -> None:
    course.server.stop(at_once)
    course.pause(seconds)
    course.server.start()


FAULTS: dict[str, Callable[[Course], None]] = {
    "kill a process": kill_process,
    "kill a supervisor": kill_supervisor,
    "kill a fork server": kill_fork_server,
    "kill a group": kill_group,
    "stop a worker": stop_worker,
    "freeze a process": freeze_process,
    "freeze a supervisor": freeze_supervisor,
    "end some sessions": end_some_sessions,
    "end all sessions": end_all_sessions,
    "restart the server": restart_server,
    "stop the server for long": stop_server_for_long,
}


def at_random(faults: list[str], until: float) -> Callable[[Course], None]:
    """Return what does these faults, in an order and with pauses that come by chance, until then.

    All of them in turns, as one that is drawn each time may not come at all: one did not in 86.
    """

    def harm(course: Course) -> None:
        turn: list[str] = []
        while time.monotonic() < until:
            turn = turn or course.chance.sample(faults, len(faults))
            name = turn.pop()
            course.done[name] += 1
            course.say(name)
            FAULTS[name](course)
            course.pause(course.chance.uniform(SHORTEST, LONGEST))
        course.say("no more faults")

    return harm
