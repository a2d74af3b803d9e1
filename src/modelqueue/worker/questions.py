"""Questions to many queues in one statement: is there such a task, and what is the status of the first one?

Each begins at its bounds, see `modelqueue.worker.bounds`, unless it is time to read all.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from typing import Any

from modelqueue import clock
from modelqueue.engines import engine_for
from modelqueue.queues import Queue
from modelqueue.source import Question
from modelqueue.worker.bounds import Bounds, Sweeps

__all__ = ["Asked", "Questions", "soon"]

#: How long it may take to put a question: what becomes due meanwhile is to be found, too.
_TO_ASK = dt.timedelta(milliseconds=10)

#: Where to note the answer for a queue, if there is one.
Asked = tuple["dict[str, int]", str, Question]


def soon(moment: dt.datetime | None = None) -> dt.datetime:
    """Return until when a task is to be due that a question finds which is put now, or at that moment."""
    return (moment or clock.now()) + _TO_ASK


class Questions:
    """Those of one thread."""

    def __init__(self) -> None:
        #: Where each question begins, and, by database, when to ask it of all rows.
        self._bounds: defaultdict[object, Bounds] = defaultdict(Bounds)
        self.sweeps: defaultdict[str, Sweeps] = defaultdict(Sweeps)

    def perhaps_due(self, using: str, queues: Iterable[Queue[Any]], is_whole: bool) -> list[str]:
        """Return the names of those of several queues on a database that have due tasks.

        Args:
            is_whole: whether to read from the first row on, and not from the bounds.

        Raises:
            django.db.Error: it does not answer, or one of the queues can not be asked.
        """
        found: dict[str, int] = {}
        moment = soon()
        asked = [(found, queue.name, queue.shared().any_due(moment)) for queue in queues]
        self.answer(using, asked, is_whole, is_usual=True)
        return list(found)

    def answer(self, using: str, asked: list[Asked], is_whole: bool, is_usual: bool = False) -> None:
        """Ask in one statement, from the bounds on if not all; note the answers, if there are any."""
        parts = []
        for _, name, question in asked:
            ranges = [] if is_whole else self.bounds_of(name, question).ranges()
            parts.append([question.between(*ends) for ends in ranges] or [question])
        # Of which queues the others are asked is another one each time, and so are the ranges.
        answers = engine_for(using).probe([part for some in parts for part in some], is_whole and is_usual)
        left = iter(answers)
        for (answered, name, question), some in zip(asked, parts, strict=True):
            found = [first for first in islice(left, len(some)) if first is not None]
            # Where there is nothing up to the last one, there is nothing to read again.
            self.bounds_of(name, question).note([found[0] if found else question.last])
            if found:
                answered[name] = found[0]

    def bounds_of(self, name: str, question: Question) -> Bounds:
        source = question.source
        return self._bounds[name, question.state, source.below, source.at_least]
