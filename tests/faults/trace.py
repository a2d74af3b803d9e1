"""What happened to the tasks, as told by several processes, and what may never be read there.

A trace is a file to which each event adds a line, by one write each. So their order is that in which they
happened, and what a process has told outlives it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from django.db.models import F, Model

from modelqueue import signals
from tests.actions import write_down
from tests.faults import harm


class Trace:
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def note(self, what: str, **facts: Any) -> None:
        line = json.dumps({"what": what, "by": os.getpid(), **facts}) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def read(self, *whats: str) -> list[dict[str, Any]]:
        """The events of some kinds, or all, in their order."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        events = [json.loads(line) for line in lines]
        return [event for event in events if not whats or event["what"] in whats]

    @contextmanager
    def listening(self) -> Iterator[Trace]:
        """Note what this process tells by the signals of the library."""
        receivers = []
        for name in signals.__all__:

            def receive(sender: Any, signal: Any, pk: Any, name: str = name, **facts: Any) -> None:
                known = {key: facts[key] for key in ("lease", "status", "outcome") if key in facts}
                self.note(name, pk=pk, **known)

            getattr(signals, name).connect(receive)
            receivers.append((name, receive))
        try:
            yield self
        finally:
            for name, receive in receivers:
                getattr(signals, name).disconnect(receive)

    def action(
        self, before: Callable[[], object] | None = None, after: Callable[[], object] | None = None
    ) -> Callable[[Model], None]:
        """Return an action that has an effect, an insert, and changes its task where that has `pages`.

        Args:
            before, after: what happens to the worker before the effect, and after it.
        """

        def act(task: Any) -> None:
            self.note("begins", pk=task.pk, lease=task.status)
            try:
                if before is not None:
                    before()
                write_down(task)
                if hasattr(task, "pages"):
                    task.pages = F("pages") + 1
                if after is not None:
                    after()
            finally:
                self.note("ends", pk=task.pk)

        return act

    def die(self, connection: object = None) -> None:
        self.note("dies")
        harm.kill()

    def check(self) -> None:
        """No lease was given twice, and no task was worked on by two at a time."""
        for what, name in (("task_claimed", "status"), ("begins", "lease")):
            leases = Counter((event["pk"], event[name]) for event in self.read(what))
            assert set(leases.values()) <= {1}, leases
        owners: dict[Any, int] = {}
        for event in self.read("begins", "ends", "dies"):
            if event["what"] == "begins":
                assert event["pk"] not in owners, event
                owners[event["pk"]] = event["by"]
            elif event["what"] == "ends":
                del owners[event["pk"]]
            else:
                owners = {pk: owner for pk, owner in owners.items() if owner != event["by"]}
