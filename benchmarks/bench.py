"""What all measures share: how much is to be measured, the stores that are open, and turns that may fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from benchmarks.crew import Crew, Load
from benchmarks.environments import python_of, versions
from benchmarks.inside import run_inside
from benchmarks.roster import CONTENDERS, Contender
from benchmarks.stores import Postgres, Store, Unavailable, open_store

__all__ = ["Bench", "Options", "say"]

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    full: Sequence[str]
    """Measures that are not shortened, as they are asked for by name, or as there is time."""
    tasks: int
    rounds: int
    further_rounds: int
    """Of slow contenders, and of the other measures than the first."""
    processes: Sequence[int]
    databases: Sequence[str]
    """Of the contenders: "postgres" whatever its version."""
    postgres: str
    """Which server that is."""
    only: Sequence[str]
    history: Sequence[int]
    decay_tasks: int
    seconds: float
    waits: int
    """Tasks of a turn of which is told how soon each was begun."""
    queues: Sequence[int]
    """That share a table."""
    idle: float
    """Seconds without a task; 0: there is no such time."""


@dataclass
class Bench:
    options: Options
    stack: ExitStack
    stores: dict[str, Store | str] = field(default_factory=dict)
    """Those that were asked for; of one that is not to be had, why."""
    versions: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)
    is_stopped: bool = False

    def contenders(self, among: Iterable[Contender] = CONTENDERS) -> list[Contender]:
        """Return those that were asked for."""
        names, databases = self.options.only, self.options.databases
        return [one for one in among if one.store in databases and (not names or one.name in names)]

    def store(self, name: str) -> Store:
        """Return the store, which is opened the first time.

        Raises:
            Unavailable: this machine lacks it, or it is not asked for.
        """
        if name not in self.options.databases:
            raise Unavailable(f"{name} is not asked for")
        if name not in self.stores:
            try:
                server = self.options.postgres if name == "postgres" else name
                store = self.stack.enter_context(open_store(server))
                self.stores[name] = store
                self.versions.add(store.version)
            except Unavailable as error:
                self.stores[name] = str(error)
        found = self.stores[name]
        if isinstance(found, str):
            raise Unavailable(found)
        return found

    def postgres(self) -> Postgres:
        store = self.store("postgres")
        assert isinstance(store, Postgres)
        return store

    def inside(self, measure: str, *values: float) -> Any:
        """Return what `inside` of a measure gives in a process of its own."""
        return run_inside(measure, self.postgres(), *values)

    def crew(self, contender: Contender, load: Load, **more: str) -> Crew:
        """Return the contender, with its packages."""
        store = self.store(contender.store)
        python = python_of(contender)
        self.versions.update(versions(python, contender.requirements or ("psycopg",)))
        return Crew(contender, store, load, dict(more))

    def attempt(self, what: str, turn: Callable[[], T]) -> T | None:
        """Do it, unless it has failed before; None: it has, and why is told at the end.

        Ctrl-C ends only the measuring: what has been measured is shown.
        """
        if self.is_stopped or what in self.failures:
            return None
        say(what)
        try:
            return turn()
        except KeyboardInterrupt:
            self.is_stopped = True
            self.failures[what] = "stopped here"
            return None
        except Exception as error:  # one contender less is no reason to lose what was measured
            first = (str(error).strip().splitlines() or ["it does not say why"])[0]
            self.failures[what] = f"{type(error).__name__}: {first}"
            say(f"{what}: not run: {self.failures[what]}")
            return None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
