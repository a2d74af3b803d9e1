"""What a process has in hand, in memory that it shares with its supervisor, who reads it when it is dead.

For each task: which it is, whether its action has begun, and what its lease is. That costs some writes to
memory, where messages would take longer than a short task itself; and what is written counts, however
suddenly the process dies.

Here are integers alone. A task with a key of another kind the process names once by their pipe, before it
begins with it; and so one in whose row something stood where the claim has set more than its status. Where
nothing stood, as in most that are claimed for the first time, that is told once, and has a number then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from modelqueue.engines import Candidate
from modelqueue.status import Status
from modelqueue.worker.system import context

__all__ = ["Blank", "Board", "Note"]

#: Integers for each task: its number, negative once its action has begun, what may stand in its row, and
#: which it is: its queue, its key, that in the owner's table, its status before the claim, and the number of
#: what stood in the fields that the claim has set. Queue 0: see the pipe.
_WIDTH = 8
_NUMBER, _LEASE, _RENEWED, _QUEUE, _PK, _KEY, _STATUS, _BLANK = range(_WIDTH)
#: So many kinds of nothing have a number.
_MOST_BLANKS = 100
#: What fits into an integer here, which has 64 bits.
_SMALLEST, _LARGEST = -(2**63), 2**63 - 1


class _Claiming:
    """The time of a claim. One that an error has ended is not over: what it has taken is not known."""

    def __init__(self, cells: Any) -> None:
        self._cells = cells

    def __enter__(self) -> None:
        self._cells[0] = 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._cells[0] = 0


class Blank(NamedTuple):
    """What a process says of the fields that its claims set: nothing stood there, in this way."""

    number: int
    before: dict[str, Any]


@dataclass(frozen=True)
class Note:
    """What stands at one place: nothing where the number is 0."""

    number: int
    has_begun: bool
    leases: frozenset[Status]
    """The claim, or what was stored and what was to be stored when it was renewed last."""
    queue: str | None
    """The name of its queue; None: the process has named the task by the pipe."""
    row: Candidate | None
    """As it was before the claim; None: it is not known here."""


class Board:
    """Places for the tasks of one process.

    Args:
        places: how many tasks it may have in hand at a time; of more nothing is noted.
        names: those of the queues that it serves.
    """

    def __init__(self, places: int, names: Iterable[str] = ()) -> None:
        self._names = [None, *names]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        #: The first one: is a claim under way, of which nothing is known yet?
        self._cells = context().RawArray("q", 1 + places * _WIDTH)
        self._free = deque(range(places))
        #: What nothing was, by its number; and the numbers in the process. 0: the claim has set no field.
        self._blanks: dict[int, dict[str, Any] | None] = {0: None}
        self._blank_numbers: dict[Any, int] = {}

    # In the process

    def take(self, number: int, lease: Status, queue: str, row: Candidate | None) -> int | None:
        """Note a claim under a number that is used once; return its place, if there is one.

        Args:
            row: the task; None: it can not be named here, see `can_name`.
        """
        try:
            place = self._free.popleft()
        except IndexError:
            return None
        start = 1 + place * _WIDTH
        which: tuple[int, ...] = (0, 0, 0, 0, 0)
        if row is not None:
            which = self._numbers[queue], row.pk, row.key, row.status, self._number_of(row.before) or 0
        self._cells[start + _LEASE : start + _WIDTH] = [lease, lease, *which]
        self._set(place, _NUMBER, number)  # at last, as from here on all of it counts
        return place

    def can_name(self, row: Candidate) -> bool:
        """Say whether a task can be named by integers, as it has to be named by the pipe else."""
        pk, key = row.pk, row.key
        if type(pk) is not int or type(key) is not int or self._number_of(row.before) is None:
            return False
        return _SMALLEST <= pk <= _LARGEST and _SMALLEST <= key <= _LARGEST

    def new_blank(self, row: Candidate) -> Blank | None:
        """Return what is to be told before this task, and those like it, can be named; None: nothing."""
        before = row.before
        if before is None or any(before.values()) or len(self._blank_numbers) >= _MOST_BLANKS:
            return None
        number, key = len(self._blank_numbers) + 1, tuple(before.items())
        try:
            known = self._blank_numbers.setdefault(key, number)
        except TypeError:  # an empty list, which has no hash
            return None
        return Blank(number, before) if known == number else None

    def _number_of(self, before: dict[str, Any] | None) -> int | None:
        if before is None:
            return 0
        try:
            return self._blank_numbers.get(tuple(before.items()))
        except TypeError:
            return None

    def begin(self, place: int) -> None:
        """Note that an action begins, before it does."""
        number = 1 + place * _WIDTH + _NUMBER
        self._cells[number] = -abs(self._cells[number])

    def renew(self, place: int, stored: Status, renewed: Status) -> None:
        """Note what stands in a row and what is about to: both are its lease until its answer is known."""
        self._set(place, _LEASE, stored)  # one of the two that are there, so at no time one is missing
        self._set(place, _RENEWED, renewed)

    def free(self, place: int) -> None:
        """Note that a task has ended, once that is committed."""
        self._set(place, _NUMBER, 0)
        self._free.append(place)

    def claim(self) -> _Claiming:
        """Note, around a claim until it is told, that there may be tasks of which nobody else knows."""
        return _Claiming(self._cells)

    # In the supervisor

    def learn(self, blank: Blank) -> None:
        self._blanks[blank.number] = blank.before

    @property
    def is_all_told(self) -> bool:
        """Say whether the process had told of all that it had claimed."""
        return not self._cells[0]

    def read(self, place: int) -> Note:
        start = 1 + place * _WIDTH
        number, lease, renewed, queue, pk, key, status, blank = self._cells[start : start + _WIDTH]
        is_known = queue and blank in self._blanks
        row = Candidate(pk, key, Status(status), self._blanks[blank]) if is_known else None
        leases = frozenset({Status(lease), Status(renewed)})
        return Note(abs(number), number < 0, leases, self._names[queue], row)

    def read_all(self) -> dict[int, Note]:
        """Return what stands at each place that is taken."""
        taken = range((len(self._cells) - 1) // _WIDTH)
        return {place: self.read(place) for place in taken if self._get(place, _NUMBER)}

    def _set(self, place: int, column: int, value: int) -> None:
        self._cells[1 + place * _WIDTH + column] = value

    def _get(self, place: int, column: int) -> int:
        value: int = self._cells[1 + place * _WIDTH + column]
        return value
