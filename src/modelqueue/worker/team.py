"""Processes of one kind: those that run tasks side by side, or those that run one alone, on its last attempt.

How many there are to be, and whom of them to tell of work.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from modelqueue.queues import Queue
from modelqueue.worker.child import Child
from modelqueue.worker.listener import Tables
from modelqueue.worker.options import Options
from modelqueue.worker.slots import most_at_a_time

__all__ = ["Team"]


class Team:
    def __init__(self, options: Options, queues: Iterable[Queue[Any]]) -> None:
        self.options = options
        #: The queues that have something for it to do, as the prober has found last.
        self.due: list[str] = []
        self.children: list[Child] = []
        self._places = 1 if options.alone else most_at_a_time(queues, options.threads)
        self._told: list[str] = []
        #: By database what its only process listens to.
        self._tables: dict[str, Tables] = {}
        #: Held by who tells that: there is a thread for each database, and what is told last counts.
        self._listening = threading.Lock()
        self._turn = 0

    @classmethod
    def alone(cls, options: Options, queues: Iterable[Queue[Any]]) -> Team:
        """Return the one for last attempts."""
        return cls(replace(options, alone=True, threads=1), queues)

    def start_one(self) -> None:
        """Raises `OSError` or `EOFError` if the system, or the fork server, can not start it."""
        self.children.append(Child(self.options, self._places))

    @property
    def lacks_one(self) -> bool:
        """Whether to start one; also beside those to be replaced, which may run their tasks for long."""
        at_work = [child for child in self.children if child.is_at_work]
        is_needed = not self.options.alone or (bool(self.due) and all(child.running for child in at_work))
        most = self.options.processes
        return is_needed and len(at_work) < most and len(self.children) < 2 * most

    @property
    def is_at_work(self) -> bool:
        return any(child.is_at_work for child in self.children)

    def hint(self, names: list[str]) -> None:
        """Tell one process that these queues have something to do, perhaps. May be called in any thread."""
        if ready := self._ready:
            self._whose_turn_it_is(ready).hint(names)

    @property
    def hears_by_itself(self) -> bool:
        """Whether its process is to listen: of several each would wake up for each task."""
        return self.options.processes == 1

    def listen_to(self, using: str, tables: Tables) -> None:
        """Have its only process listen to a database. May be called in any thread."""
        with self._listening:
            self._tables = {**self._tables, using: tables}
            for child in self._ready:
                child.send("listen", self._tables)

    def welcome(self, child: Child) -> None:
        """Tell a process that is ready what there is to know."""
        child.send("due", self.due)
        with self._listening:
            if self._tables:
                child.send("listen", self._tables)

    def tell(self) -> None:
        """Tell of what is due: one process, in turns, and all if that did not suffice."""
        if not (ready := self._ready):
            return
        chosen = self._whose_turn_it_is(ready)
        again = [name for name in self.due if name in self._told]
        self._told = self.due
        chosen.send("due", self.due)
        for child in ready:
            # While something is due the others are left alone, lest they take the processor from the chosen
            # one; else all are asked, as they answer.
            if child is not chosen and (again or not self.due):
                child.send("due", again)

    @property
    def _ready(self) -> list[Child]:
        return [child for child in self.children if child.is_ready and child.is_at_work]

    def _whose_turn_it_is(self, children: list[Child]) -> Child:
        """Return one of those that have the least to do: without a free slot it could claim nothing."""
        self._turn += 1
        burdens = [child.burden for child in children]
        idle = [child for child, burden in zip(children, burdens, strict=True) if burden == min(burdens)]
        return idle[self._turn % len(idle)]
