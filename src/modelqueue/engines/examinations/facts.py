"""What an examination finds out: facts, without a judgment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How the database would look for due tasks."""

    seeks_status: bool
    """Whether it reads the range of an index that the status gives, and not a whole table or index."""
    text: str
    """The plan in the words of the database, on one line."""


@dataclass(frozen=True)
class Access:
    """How rows are found by their status."""

    size: int
    """How many rows the table has, counted no further than a cap."""
    is_large: bool
    """Whether it has as many as that cap, or more."""
    indexes: frozenset[str]
    """The names of the indexes that have the status field in them."""
    invalid: frozenset[str]
    """The names, quoted, of such indexes that the database does not use, as they are not complete."""
    plan: Plan | None
    """None also for a queue of nothing."""
    create: str
    """The statement that makes an index of the status; where that can be, while others write."""
    analyze: str
    """The statement that counts the rows, for better plans."""

    @property
    def is_quick(self) -> bool:
        """Whether a look for a state costs the same in a table of any size, or the table is small."""
        return not self.is_large or (bool(self.indexes) if self.plan is None else self.plan.seeks_status)


@dataclass(frozen=True)
class Refusal:
    """That no task of a table can be written."""

    table: str
    """Its name, quoted."""
    why: str
    cure: str
    """What to do, with the statement for it."""


@dataclass(frozen=True)
class Isolation:
    """How transactions are kept apart."""

    level: str
    """In small letters: "repeatable read"."""
    locks_gaps: bool
    """Whether from "repeatable read" on the gaps between rows are locked, in which others insert."""


@dataclass(frozen=True)
class OneWriter:
    """How those who write take turns, where only one can write at a time."""

    journal_mode: str
    synchronous: int
    """0: off, 1: normal, 2: full, 3: extra."""
    timeout: float
    """Seconds for which a connection waits for its turn."""
    transaction_mode: str | None
    """How a transaction begins; None: this Django can not be told."""


@dataclass(frozen=True)
class Vacuum:
    """When the dead rows of a table are removed."""

    table: str
    """Its name, quoted."""
    off: str | None
    """The setting that keeps them from being removed without being asked, of the server or of the table."""
    comes_at: int
    """How many dead rows it takes."""
    dead: int
    """How many there are now."""


@dataclass(frozen=True)
class Pin:
    """Who may still need to see old rows, so that the database has to keep them."""

    kind: str
    """What it is: "transaction", "prepared transaction", "replication slot"."""
    name: str
    """By which its owner is found: a pid, a name."""
    who: str
    """Who that is, as far as known: an application, a user."""
    seconds: float | None
    """For how long; None: that is not told to this user, or to nobody."""
    transactions: int | None
    """How many transactions have begun since; None: not known."""
    query: str | None
    """The last statement, if this user may see it."""
    cure: str
    """What to do, with the statement for it."""


@dataclass(frozen=True)
class Silence:
    """A server over the network, which may fall silent without a word."""

    host: str
    not_set: tuple[str, ...]
    """The options that would end a connection then."""


@dataclass(frozen=True)
class Pooler:
    """Somebody between this process and the database, who hands out sessions."""

    told: int
    """The number of the session, as told to whom connected."""
    found: tuple[int, ...]
    """As the database knows it: in a few transactions, one after the other."""
