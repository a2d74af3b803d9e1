"""The portable engine: correct on every database that Django supports.

An engine moves rows of a `Source` from one status to the next, and promises for its writes:

* **compare-and-set**: a row is changed only while it holds the status that was read, in one
  statement, so of two that try it one wins. This alone is the proof of ownership;
* **nobody waits**: rows that somebody else has locked are passed over where the database can
  (SKIP LOCKED), so that one open transaction does not hold up a claim or a recovery;
* **all or nothing**: each call is one short transaction, in which "try again" errors of the database are
  retried (see `modelqueue.engines.sessions`).

A claim has four steps: *pick* candidates without a lock, *lock* those that are free, *load* the
instances, *compare and set* the lease. The order matters: loaded under the lock, an instance is as
new as its claim, and the caller's own filters are asked once more.

A vendor's module overrides what it knows better, under the same names.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from django.core.exceptions import EmptyResultSet
from django.db import models, transaction
from django.db.backends.utils import CursorWrapper
from django.db.models import F, Q, Value
from django.db.models.functions import Greatest
from django.db.utils import Error

from modelqueue import conf
from modelqueue.claim_values import Values, show
from modelqueue.clock import Clock
from modelqueue.engines.claims import Candidate, Change, Claim, Note, Overtaken, Renewal, Verdict, lease_at
from modelqueue.engines.sessions import RowLocked, Session
from modelqueue.engines.statements import (
    first_status,
    has_composite_key,
    is_one_of,
    is_same_each_time,
    params_of,
    placeholders,
    update_of_row,
)
from modelqueue.fields import set_loaded
from modelqueue.source import Question, Source
from modelqueue.status import Status, priority_to_datetime

__all__ = ["MOST_KEYS", "Engine", "WayToClaim"]

M = TypeVar("M", bound=models.Model)

logger = logging.getLogger("modelqueue")

_FIRST_PAGE = 20
_LONGEST_PAGE = 2000
#: Keys in one statement: some builds of SQLite take 999 parameters.
MOST_KEYS = 400
#: Different statuses that are written by a statement each.
_FEW = 4
#: Other rows of which one has to load before a row is held responsible for not loading.
_WITNESSES = 10


Execute = Callable[[CursorWrapper, str, Sequence[Any]], object]


def _execute_as_it_is(cursor: CursorWrapper, sql: str, params: Sequence[Any]) -> None:
    cursor.execute(sql, params)


WayToClaim = Callable[["Source[M]", Clock, int], "list[Claim[M]]"]


class Engine(Session):
    """What can be done with the rows of a source on one database, see the module."""

    @property
    def passes_over_locked_rows(self) -> bool:
        """Does this database know SKIP LOCKED? Else who meets a lock waits for its end."""
        return bool(self.connection.features.has_select_for_update_skip_locked)

    # Claim

    def claim(self, source: Source[M], clock: Clock, limit: int) -> list[Claim[M]]:
        """Take up to `limit` due tasks, those at the head of the queue first.

        After it each of them is working, under a lease that is stamped 1 ms after the time that the clock
        gave, and that nobody else holds. What the queryset itself raises is raised, and nothing is claimed.
        One row must not block the others: one that can not be loaded is claimed all the same, see
        `Claim.error`; one that a constraint of its table keeps from working is passed over.
        """
        at_once = None
        if conf.get("ENGINE") != "portable" and not any(map(_puts_sql_around_values, source.sets)):
            at_once = self._way_to_claim_at_once(source)
        if at_once is not None:
            try:
                return self.patiently(partial(at_once, source, clock, limit))
            except Exception as error:
                if self.is_of_the_database_itself(error):
                    raise
                logger.debug("%s is claimed step by step.", source.model._meta.label, exc_info=error)
            # A row, or the queryset. Step by step it shows.
        return self._claim_step_by_step(source, clock, limit)

    def _way_to_claim_at_once(self, source: Source[M]) -> WayToClaim[M] | None:
        """Return a faster way to claim from this source, where the database has one.

        It may raise because of a single row or queryset, as long as it has committed nothing: then the way
        of the portable engine is gone.
        """
        return None

    def _claim_step_by_step(self, source: Source[M], clock: Clock, limit: int) -> list[Claim[M]]:
        claims: list[Claim[M]] = []
        refused: dict[Any, Error] = {}
        try:
            for page in self._pages(source, partial(source.due, clock()), limit):
                # First as many as are wanted, since the head of the queue is what should run; where that
                # is taken, ever more at once, since somebody may hold very many rows.
                size = limit
                while page and len(claims) < limit:
                    chunk, page, size = page[:size], page[size:], size * 2
                    claims += self._claim_among(source, chunk, clock, limit - len(claims), refused)
                if len(claims) >= limit:
                    break
        except Exception as error:
            if not claims:
                raise
            # What is claimed already is committed, and nobody else would run it. An outage says all itself.
            exc_info = not self.is_of_the_database_itself(error)
            logger.warning("%s: fewer are claimed: %s", source.model._meta.label, error, exc_info=exc_info)
        self._tell_of_refused(source, refused)
        return claims

    def _claim_among(
        self,
        source: Source[M],
        candidates: list[Candidate],
        clock: Clock,
        limit: int,
        refused: dict[Any, Error],
    ) -> list[Claim[M]]:
        try:
            return self.patiently(partial(self._claim_together, source, candidates, clock, limit))
        except Exception as error:
            if self.is_of_the_database_itself(error):
                raise
            # A row, or the queryset: find out which.
            return self.patiently(partial(self._claim_one_by_one, source, candidates, clock, limit, refused))

    def _claim_together(
        self, source: Source[M], candidates: list[Candidate], clock: Clock, limit: int
    ) -> list[Claim[M]]:
        with self.transaction():
            free, claims = self._lock(source, candidates), list[Claim[M]]()
            while free and len(claims) < limit:  # again, as some may be the caller's no more
                rows, free = free[: limit - len(claims)], free[limit - len(claims) :]
                tasks = self._load(source, rows)
                # Those that were edited since they were picked are no longer the caller's.
                found = [(row, tasks[row.pk]) for row in rows if row.pk in tasks]
                if len(found) > 1 and _can_be_set_together(source):
                    claims += self._claim_rows(source, found, clock)
                else:
                    made = [self._claim_row(source, row, loaded, clock) for row, loaded in found]
                    claims += [claim for claim in made if claim is not None]
            return claims

    def _claim_rows(
        self, source: Source[M], found: Sequence[tuple[Candidate, M | Exception]], clock: Clock
    ) -> list[Claim[M]]:
        """Claim locked rows by one statement; raises `Overtaken` where a trigger leaves some as they are."""
        # Now, and later than any time before it, as for one row.
        since = [priority_to_datetime(row.status.priority) for row, _ in found]
        moment = max([clock(), *(one for one in since if one is not None)])
        rows = iter([row for row, _ in found])
        while part := list(islice(rows, MOST_KEYS)):
            self._set_leases(source, part, lease_at(moment))
        return [
            _claim_of(source, row, lease_at(moment, row.status.attempts), loaded) for row, loaded in found
        ]

    def _claim_one_by_one(
        self,
        source: Source[M],
        candidates: list[Candidate],
        clock: Clock,
        limit: int,
        refused: dict[Any, Error],
    ) -> list[Claim[M]]:
        claims: list[Claim[M]] = []
        with self.transaction():
            for row in self._lock(replace(source, sets={}), candidates):
                row = self._read_before(source, row)
                task = self._load_one(source, row)
                try:
                    with transaction.atomic(using=self.using):
                        claim = self._claim_row(source, row, task, clock)
                except Error as error:  # of a constraint or a trigger of its table
                    # Where the savepoint is gone, too, the claims before it are rolled back with it.
                    if self.is_of_the_database_itself(error) or self.is_aborted():
                        raise
                    refused[row.pk] = error
                    continue
                if claim is not None:
                    claims.append(claim)
                if len(claims) >= limit:
                    break
        return claims

    def _tell_of_refused(self, source: Source[Any], refused: dict[Any, Error]) -> None:
        """Log the rows that a claim could not take: the first aloud, as there may be thousands."""
        for place, (pk, error) in enumerate(refused.items()):
            more = f" (and so it is with {len(refused) - 1} more)" if not place and len(refused) > 1 else ""
            level = logging.DEBUG if place else logging.WARNING
            logger.log(level, "%s %s can not be claimed: %s%s", source.model._meta.label, pk, error, more)

    def _claim_row(
        self, source: Source[M], row: Candidate, loaded: M | Exception | None, clock: Clock
    ) -> Claim[M] | None:
        if loaded is None:  # edited since it was picked, and no longer the caller's
            return None
        # Now, not when it was picked: the time that was spent waiting is not the worker's. And later than
        # any time before it, also if the clock was set back.
        moment = clock()
        waiting_since = priority_to_datetime(row.status.priority)
        if waiting_since is not None and waiting_since > moment:
            moment = waiting_since
        lease = lease_at(moment, row.status.attempts)
        if not self.compare_and_set(source, row, [row.status], lease, others=source.sets):
            return None
        return _claim_of(source, row, lease, loaded)

    # Renewal

    def renew(
        self,
        source: Source[Any],
        leases: dict[Any, set[Status]],
        clock: Clock,
        note: Note = lambda key, stored, renewed: None,
    ) -> Renewal:
        """Stamp the leases of tasks with the time of now, all in one statement.

        Rows that somebody has locked are passed over, so that they cost the others nothing. No lease gets
        a time below the one it had.

        Args:
            leases: by the primary key in the owner's table what stands in a row as long as its task is
                ours: one status, or several after an answer of the database that was lost. After the
                call it is what stands there then; if the call raises, with what may.
            note: called for each before it is written, with its key, what stands there and what is to.
        """
        found = Renewal(set(), set(), set())
        keys = iter(list(leases))
        while part := list(islice(keys, MOST_KEYS)):
            renew = partial(self._renew_together, source, {key: leases[key] for key in part}, clock, note)
            for known, new in zip(found, self.patiently(renew, reconnect=True), strict=True):
                known |= new
        return found

    def _renew_together(
        self, source: Source[Any], leases: dict[Any, set[Status]], clock: Clock, note: Note
    ) -> Renewal:
        name, rows = source.field.name, source.owner_rows().filter(pk__in=list(leases))
        with self.transaction():
            stored = dict(self._locked(source, rows).values_list("pk", name))
            held = {key: Status(status) for key, status in stored.items() if status in leases[key]}
            stamp = Status.working(clock())
            renewed = {key: max(status, Status(stamp + status.attempts)) for key, status in held.items()}
            for key, status in renewed.items():
                leases[key].add(status)  # before it is written: whether it was may remain unknown
                note(key, held[key], status)
            ours = source.owner_rows().filter(pk__in=list(held), **{f"{name}__in": set(held.values())})
            self._stamp(ours, name, stamp)
            others = rows.exclude(pk__in=list(held)) if len(held) < len(leases) else rows.none()
            locked = {key for key, status in others.values_list("pk", name) if status in leases[key]}
        for key, status in renewed.items():
            leases[key].intersection_update({status})  # in one step, as others may read them meanwhile
        return Renewal(set(held), locked, leases.keys() - held.keys() - locked)

    def _stamp(self, rows: models.QuerySet[Any], name: str, stamp: Status) -> None:
        status = F(name)
        attempts = status % Value(10, models.BigIntegerField())
        renewed = Value(int(stamp), models.BigIntegerField()) + attempts
        rows.update(**{name: Greatest(status, renewed, output_field=models.BigIntegerField())})

    # Recovery

    def recover(
        self, source: Source[M], cutoff: dt.datetime, judge: Callable[[Candidate], Verdict | None]
    ) -> Iterator[list[tuple[Candidate, Status]]]:
        """Take back all tasks whose lease is from `cutoff` or before, a page at a time.

        Args:
            judge: gets an expired row, under its lock, and says what becomes of its task; None: nothing yet.

        Yields:
            For each page, once it is committed: the expired rows that were recovered, each with its
            new status. Rows that somebody has locked are left for the next time.
        """
        for page in self._pages(source, partial(source.expired, cutoff)):
            yield self._recover_among(source, page, judge)

    def _recover_among(
        self, source: Source[M], candidates: list[Candidate], judge: Callable[[Candidate], Verdict | None]
    ) -> list[tuple[Candidate, Status]]:
        try:
            return self.patiently(partial(self._recover_together, source, candidates, judge))
        except Exception as error:
            if self.is_of_the_database_itself(error):
                raise
            return self._recover_one_by_one(source, candidates, judge)

    def _recover_together(
        self, source: Source[M], candidates: list[Candidate], judge: Callable[[Candidate], Verdict | None]
    ) -> list[tuple[Candidate, Status]]:
        recovered = []
        with self.transaction():
            free = self._lock(source, candidates, with_error_field=True)
            if len(free) < len(candidates):
                logger.debug(
                    "%s: %d expired tasks are passed over. A transaction has locked them, perhaps that of an "
                    "action with atomic=True, or they have changed.",
                    source.model._meta.label,
                    len(candidates) - len(free),
                )
            for row in free:
                verdict = judge(row)
                if verdict is None:
                    continue
                if self.compare_and_set(source, row, [row.status], verdict.status, verdict.note):
                    recovered.append((row, verdict.status))
        return recovered

    def _recover_one_by_one(
        self, source: Source[M], candidates: list[Candidate], judge: Callable[[Candidate], Verdict | None]
    ) -> list[tuple[Candidate, Status]]:
        recovered: list[tuple[Candidate, Status]] = []
        for row in candidates:
            try:
                recovered += self.patiently(partial(self._recover_together, source, [row], judge))
            except Error as error:
                if not self.is_of_the_database_itself(error):  # of a constraint or a trigger of its table
                    logger.warning("%s %s can not be recovered: %s", source.model._meta.label, row.pk, error)
                    continue  # left for the next time
                if not recovered:
                    raise
                # What is recovered already is committed, and has to be told.
                logger.warning("%s: fewer are recovered: %s", source.model._meta.label, error)
                break
        return recovered

    # Single rows

    def compare_and_set(
        self,
        source: Source[M],
        row: Candidate,
        old: Collection[Status | None],
        new: Status | None,
        note: str | None = None,
        others: Values | None = None,
    ) -> bool:
        """Set the status of a row to `new` if it is one of `old`; return whether it was.

        Args:
            note: text for the source's error field, written together with the status; None to
                leave it as it is.
            others: values of further fields in the owner's table, set by the same statement.
        """
        values = {source.field: new, **(others or {})}
        error = None if note is None else source.error_field
        if error is None or source.has_error_field_elsewhere:
            with transaction.atomic(using=self.using) if error is not None else nullcontext():
                was_old = self._update(source, row, old, values)
                if was_old and error is not None:
                    source.rows().filter(pk=row.pk).update(**{error.name: note})
            return was_old
        return self._update(source, row, old, {**values, error: note})

    def _update(
        self,
        source: Source[Any],
        row: Candidate,
        old: Collection[Status | None],
        values: dict[models.Field[Any, Any], Any],
    ) -> bool:
        if any(map(_puts_sql_around_values, values)):
            rows = source.owner_rows().filter(is_one_of(source.field.name, old), pk=row.key)
            return rows.update(**{field.name: value for field, value in values.items()}) == 1
        with self.connection.cursor() as cursor:
            self._execute(cursor, *update_of_row(source, row, old, values))
            return bool(cursor.rowcount == 1)

    def set_statuses(self, source: Source[Any], changes: Sequence[Change]) -> set[Any]:
        """Write statuses, each where an old one of its stands, all in one transaction; return whose were.

        Rows that somebody has locked are passed over, so that they cost the others nothing. What is not
        written here is left as it is: to ask why takes a look at each row.
        """
        if has_composite_key(source.owner) or _puts_sql_around_values(source.field):
            return set()
        written, left = set[Any](), iter(changes)
        while part := list(islice(left, MOST_KEYS)):
            written |= self.patiently(partial(self._set_statuses_together, source, part), reconnect=True)
        return written

    def _set_statuses_together(self, source: Source[Any], changes: Sequence[Change]) -> set[Any]:
        rows = source.owner_rows().filter(pk__in=[change.key for change in changes])
        with self.transaction():
            stored = dict(self._locked(source, rows).values_list("pk", source.field.name))
            ours = [change for change in changes if stored.get(change.key) in change.old]
            if ours:
                self._set_each_status(source, ours)
        return {change.key for change in ours}

    def _set_each_status(self, source: Source[Any], changes: Sequence[Change]) -> None:
        quote, meta = self.connection.ops.quote_name, source.owner._meta
        table, key, status = map(quote, (meta.db_table, str(meta.pk.column), str(source.field.column)))
        keys = params_of([(meta.pk, change.key) for change in changes], self.connection)
        by_new = defaultdict[int, list[Any]](list)
        for key_value, change in zip(keys, changes, strict=True):
            by_new[int(change.new)].append(key_value)
        with self.connection.cursor() as cursor:
            if len(by_new) <= _FEW:  # nearly always: successes of one moment are alike
                for new, some in by_new.items():
                    sql = f"UPDATE {table} SET {status} = %s WHERE {key} IN ({placeholders(some)})"  # noqa: S608
                    cursor.execute(sql, (new, *some))
                return
            # Of each row the cases are tried one after the other.
            cases = " ".join(["WHEN %s THEN %s"] * len(changes))
            sql = (
                f"UPDATE {table} SET {status} = CASE {key} {cases} END "  # noqa: S608
                f"WHERE {key} IN ({placeholders(keys)})"
            )
            pairs = [value for new, some in by_new.items() for one in some for value in (one, new)]
            cursor.execute(sql, (*pairs, *keys))

    def _set_leases(self, source: Source[Any], rows: Collection[Candidate], lease: Status) -> None:
        """Compare and set locked rows at once, or none, with what the claim sets besides."""
        quote, meta = self.connection.ops.quote_name, source.owner._meta
        table, key, status = map(quote, (meta.db_table, str(meta.pk.column), str(source.field.column)))
        statuses = {row.status for row in rows}
        others = "".join([f", {quote(str(field.column))} = %s" for field in source.sets])
        # By their keys: `+ 0` hides the status from its index, where others hold rows with the same one.
        sql = (
            f"UPDATE {table} SET {status} = %s + {status} %% 10{others} "  # noqa: S608
            f"WHERE {key} IN ({placeholders(rows)}) AND {status} + 0 IN ({placeholders(statuses)})"
        )
        keys = params_of([(meta.pk, row.key) for row in rows], self.connection)
        values = params_of(source.sets.items(), self.connection)
        with self.connection.cursor() as cursor:
            cursor.execute(sql, (int(lease), *values, *keys, *map(int, statuses)))
            if cursor.rowcount != len(rows):
                raise Overtaken

    def _execute(self, cursor: CursorWrapper, sql: str, params: Sequence[Any]) -> None:
        """Send a statement that is ours from its first word to its last."""
        cursor.execute(sql, params)

    def hold(self, source: Source[Any], row: Candidate, leases: Collection[Status]) -> bool:
        """Lock a row, within an open transaction, if it is under one of the leases; return whether it is."""
        features = self.connection.features
        if not features.has_select_for_update:
            return any(self.compare_and_set(source, row, [lease], lease) for lease in leases)
        rows = source.owner_rows().filter(is_one_of(source.field.name, leases), pk=row.key)
        no_key = features.has_select_for_no_key_update
        return bool(rows.select_for_update(no_key=no_key).values_list("pk")[:1])

    def read(self, source: Source[M], row: Candidate) -> tuple[bool, Status | None]:
        """Return whether a row exists, and its status."""
        for status in source.owner_rows().filter(pk=row.key).values_list(source.field.name, flat=True):
            return True, None if status is None else Status(status)
        return False, None

    # The steps of a claim and of a recovery

    def _pages(
        self, source: Source[M], rows_from: Callable[[int | None], models.QuerySet[M]], wanted: int = 1
    ) -> Iterator[list[Candidate]]:
        """Pick: read candidates in their order, without a lock, a few first and then more at a time.

        Args:
            rows_from: gives the rows from a status on. (The bound is replaced from page to page, not
                added to: SQLite seeks to the first of two, and would read each page from the head.)
            wanted: as many are on the first page at least, if one can have as many.
        """
        name = source.field.name
        size = min(max(_FIRST_PAGE, wanted), _LONGEST_PAGE)
        page = self.patiently(partial(self._read_page, source, rows_from(None), size))
        while page:
            yield list(dict.fromkeys(page))  # a join repeats rows
            if len(page) < size:
                return
            last = page[-1]
            size = min(size * 5, _LONGEST_PAGE)
            rows = rows_from(last.status).filter(Q(**{f"{name}__gt": last.status}) | Q(pk__gt=last.pk))
            page = self.patiently(partial(self._read_page, source, rows, size))

    def _read_page(self, source: Source[M], rows: models.QuerySet[M], size: int) -> list[Candidate]:
        columns = ["pk", source.field.name]
        if source.owner_key != "pk":
            columns.append(source.owner_key)
        return [
            Candidate(pk, key[0] if key else pk, Status(status))
            for pk, status, *key in rows.values_list(*columns)[:size]
        ]

    def _lock(
        self, source: Source[M], candidates: list[Candidate], with_error_field: bool = False
    ) -> list[Candidate]:
        """Lock, in the owner's table alone, and return the candidates that are free and unchanged.

        Args:
            with_error_field: lock the row of the error field too, where it is in another table.
        """
        keys = [row.key for row in candidates]
        rows = self._locked(source, source.owner_rows().filter(pk__in=keys))
        names = source.names_set
        held = {key: found for key, *found in rows.values_list("pk", source.field.name, *names)}
        free = [row for row in candidates if row.key in held and held[row.key][0] == row.status]
        if names:
            free = [row.as_set(names, held[row.key][1:]) for row in free]
        return self._lock_errors(source, free) if with_error_field else free

    def _read_before(self, source: Source[M], row: Candidate) -> Candidate:
        """Return a locked row with what it holds in the fields that the claim sets, if that can be read."""
        names = source.names_set
        if not names:
            return row
        try:
            with transaction.atomic(using=self.using):
                (values,) = source.owner_rows().filter(pk=row.key).values_list(*names)
        except Exception as error:
            if self.is_of_the_database_itself(error):
                raise
            return row
        return row.as_set(names, values)

    def _lock_errors(self, source: Source[M], candidates: list[Candidate]) -> list[Candidate]:
        """Lock the rows of the error field where they are in another table; return the free candidates."""
        if not source.has_error_field_elsewhere or not self.passes_over_locked_rows:
            return candidates
        keys = source.keys_of_errors([row.pk for row in candidates])
        rows = source.error_rows().filter(pk__in=keys.values())
        writable = set(self._skipping_locked(rows).values_list("pk", flat=True))
        return [row for row in candidates if keys.get(row.pk) in writable]

    def _locked(self, source: Source[Any], rows: models.QuerySet[Any]) -> models.QuerySet[Any]:
        """Return the rows of the owner's table that nobody else has locked; reading them locks them."""
        if self.passes_over_locked_rows:
            return self._skipping_locked(rows)
        self._lock_by_writing(source, rows)
        return rows

    def _skipping_locked(self, rows: models.QuerySet[Any]) -> models.QuerySet[Any]:
        # NO KEY where there is such a thing (PostgreSQL): inserts of child rows, whose foreign keys point
        # to a task, are then neither blocked nor do they hide it.
        no_key = self.connection.features.has_select_for_no_key_update
        return rows.select_for_update(skip_locked=True, no_key=no_key)

    def _lock_by_writing(self, source: Source[M], rows: models.QuerySet[Any]) -> None:
        """Lock rows where SKIP LOCKED is unknown. Waits for whoever holds one, as the database does."""
        rows.update(**{source.field.name: F(source.field.name)})

    def unlocked(self, rows: models.QuerySet[Any]) -> Iterator[models.QuerySet[Any]]:
        """Lock those rows of one table that nobody else has locked, and yield them, in parts.

        Where SKIP LOCKED is unknown all are yielded, unlocked.
        """
        if not self.passes_over_locked_rows:
            yield rows
            return
        free = iter([pk for (pk,) in self._skipping_locked(rows).values_list("pk")])
        while part := list(islice(free, _LONGEST_PAGE)):
            yield rows.filter(pk__in=part)

    def deletable(self, rows: models.QuerySet[Any]) -> set[Any]:
        """Lock those rows of one table that nobody else has locked, to delete them; return their keys."""
        if self.passes_over_locked_rows:
            # Not NO KEY: to delete a row waits also for the inserts of rows that refer to it.
            rows = rows.select_for_update(skip_locked=True)
        return {pk for (pk,) in rows.order_by().values_list("pk")}

    def probe(self, questions: Sequence[Question], is_usual: bool = False) -> list[int | None]:
        """Answer these questions, each by a status or by None, all in one statement.

        Args:
            is_usual: the same are asked again and again, so that it is worth to plan them once.
        """
        selects, params = [], list[Any]()
        for question in questions:
            sql, more = first_status(question)
            selects.append(sql)
            params += more
        is_same = is_usual and all(is_same_each_time(question.source) for question in questions)
        return list(self._select(selects, params, self._execute if is_same else _execute_as_it_is))

    #: Whether the database can tell a session that listens of new tasks, see `modelqueue.engines.notify`.
    can_notify = False

    def create_notify_trigger(self, table: str, column: str) -> list[str]:
        """Return the statements that have the database tell of due tasks; none where it can not."""
        return []

    def drop_notify_trigger(self, table: str, column: str) -> list[str]:
        """Return the statements that undo those of `create_notify_trigger`."""
        return []

    def scalars(self, querysets: Sequence[models.QuerySet[Any]]) -> list[Any]:
        """Return the one value of each of these querysets, or None, all in one statement."""
        selects, params = [], list[Any]()
        for rows in querysets:
            try:
                sql, more = rows.query.get_compiler(self.using).as_sql()
            except EmptyResultSet:
                selects.append("NULL")
            else:
                selects.append(f"({sql})")
                params += more
        return list(self._select(selects, params))

    def _select(
        self, selects: list[str], params: list[Any], execute: Execute = _execute_as_it_is
    ) -> tuple[Any, ...]:
        with self.connection.cursor() as cursor:
            execute(
                cursor, f"SELECT {', '.join(selects)}{self.connection.features.bare_select_suffix}", params
            )
            found: tuple[Any, ...] = cursor.fetchone()
        return found

    def clock_offset(self) -> dt.timedelta | None:
        """Return by how much the database's clock is ahead of this machine's; zero where it is the same.

        None: the answer took too long to tell.
        """
        return dt.timedelta()

    def longest_wait(self) -> dt.timedelta:
        """Return how long a short write may wait for others before it fails; zero where none waits."""
        return dt.timedelta()

    def deepest_json(self) -> int | None:
        """Return how many levels of lists and dictionaries a JSON field takes; None: many, or not known."""
        return None

    def take_write_lock(self, field: models.Field[Any, Any]) -> None:
        """Begin a transaction that reads before it writes; of use where there is one writer at a time."""

    def lock_or_refuse(self, rows: models.QuerySet[Any]) -> None:
        """Lock a row, which may be gone, within an open transaction, without waiting for anybody.

        Raises:
            RowLocked: somebody else has locked it. (Where SKIP LOCKED is unknown a write will wait.)
        """
        if self.passes_over_locked_rows:
            rows = rows.order_by()
            if not self._skipping_locked(rows).values_list("pk")[:1] and rows.exists():
                raise RowLocked(f"somebody has locked its row in {rows.model._meta.db_table}")

    def lock_other_tables(self, source: Source[M], task: M, waits: bool) -> None:
        """Lock the rows of an inherited model in its other tables, lest somebody edits what is saved next.

        Raises:
            RowLocked: somebody else has locked one, and this does not wait.
        """
        for model in {field.model for field in task._meta.concrete_fields} - {source.owner}:
            rows: models.QuerySet[Any] = models.QuerySet(model, using=self.using)
            rows = rows.filter(pk=getattr(task, str(model._meta.pk.attname)))
            if not waits:
                self.lock_or_refuse(rows)
            elif self.connection.features.has_select_for_update:
                list(rows.order_by().select_for_update().values_list("pk"))

    def _load(self, source: Source[M], rows: list[Candidate]) -> dict[Any, M]:
        """Load instances by primary key, through the caller's own queryset."""
        if not rows:
            return {}
        found = source.queryset.filter(pk__in=[row.pk for row in rows])
        return {task.pk: task for task in found}

    def _load_one(self, source: Source[M], row: Candidate) -> M | Exception | None:
        """Load one instance, or return why that can not be done if it is the fault of this row."""
        task = self._try_to_load(source, row.pk)
        if not isinstance(task, Exception):
            return task
        # What fails also where it finds nothing is no fault of a row: a column of the code is missing.
        nothing = source.queryset.filter(**{f"{source.field.name}__lt": 0, f"{source.field.name}__gt": 0})
        if isinstance(self._try_to_load(source, row.pk, nothing), Exception):
            raise task
        # Another one that loads proves that it is not the queryset, its prefetch_related() for example.
        others = list(source.queryset.exclude(pk=row.pk).order_by().values_list("pk")[:_WITNESSES])
        if any(isinstance(self._try_to_load(source, pk), source.model) for (pk,) in others):
            return task
        if isinstance(self._try_to_load(source, row.pk, source.rows()), Exception):
            return task
        raise task

    def _try_to_load(
        self, source: Source[M], pk: Any, rows: models.QuerySet[M] | None = None
    ) -> M | Exception | None:
        queryset = source.queryset if rows is None else rows
        try:
            with transaction.atomic(using=self.using):
                return next(iter(queryset.filter(pk=pk)), None)
        except Exception as error:
            if self.is_of_the_database_itself(error):
                raise
            return error


def _puts_sql_around_values(field: models.Field[Any, Any]) -> bool:
    """Say whether a field does, to encrypt them for example; from Django 6.1 under another name."""
    return hasattr(field, "get_placeholder") or hasattr(field, "get_placeholder_sql")


def _can_be_set_together(source: Source[Any]) -> bool:
    """Say whether the statuses, and what a claim sets, are written as they are, of rows with one key each."""
    is_plain = not any(map(_puts_sql_around_values, [source.field, *source.sets]))
    return is_plain and not has_composite_key(source.owner)


def _claim_of(source: Source[M], row: Candidate, lease: Status, loaded: M | Exception) -> Claim[M]:
    if isinstance(loaded, Exception):
        return Claim(row, lease, None, loaded)
    set_loaded(loaded, source.field, lease)
    show(loaded, source.sets)
    return Claim(row, lease, loaded)
