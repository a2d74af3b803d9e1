"""What can be done with the rows of a queue, without running anything: claim, renew, recover, enqueue, ...

(`modelqueue.Status.tally` counts them.)
"""

from __future__ import annotations

import datetime as dt
import functools
import logging
import operator
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from django.db import models, router
from django.db.models import F, Q, Value
from django.db.models.deletion import ProtectedError, RestrictedError
from django.db.utils import Error

from modelqueue import outcomes, signals
from modelqueue.clock import now
from modelqueue.engines import Candidate, Claim, Engine, Note, Renewal, Verdict, engine_for
from modelqueue.fields import set_loaded
from modelqueue.outcomes import NextPriority, Policy
from modelqueue.source import (
    Source,
    Tasks,
    on_write_database,
    owner_key,
    owner_of,
    owner_rows,
    status_field,
)
from modelqueue.status import State, StateLike, Status, datetime_to_int, priority_to_datetime, shifted

__all__ = [
    "Pruned",
    "cancel",
    "claim",
    "enqueue",
    "prune",
    "recover",
    "release",
    "renew",
    "retry",
    "take_back",
]

M = TypeVar("M", bound=models.Model)

logger = logging.getLogger("modelqueue")


def claim(source: Source[M], limit: int = 1, engine: Engine | None = None) -> list[Claim[M]]:
    """Take up to `limit` due tasks for this worker, see `Engine.claim`.

    Args:
        engine: that of this thread, if it is at hand.
    """
    return (engine or engine_for(source.using)).claim(source.for_a_claim(), now, limit)


def renew(
    source: Source[Any],
    leases: dict[Any, set[Status]],
    note: Note = lambda key, stored, renewed: None,
) -> Renewal:
    """Tell the database that these tasks are still being worked on, see `Engine.renew`.

    Not for long if that does not succeed: who has an outcome to write waits for it.
    """
    engine = engine_for(source.using)
    engine.patience = 1.0
    found = engine.renew(source, leases, now, note)
    if found.lost and engine.catch_up():  # their claims may not have come to this node of a cluster yet
        again = engine.renew(source, {key: leases[key] for key in found.lost}, now, note)
        found = Renewal(found.renewed | again.renewed, found.locked | again.locked, again.lost)
    return found


def recover(
    source: Source[Any],
    policy: Policy,
    seconds: float = 1.0,
    is_certain: Callable[[Candidate], bool] = lambda row: True,
    policy_of: Callable[[Candidate], Policy] | None = None,
) -> int:
    """Take back the tasks whose workers did not report within the timeout.

    Args:
        policy: its timeout says how long a lease holds; retry and delay what happens then.
        seconds: after how long to stop, as a caller who wants to run a task waits meanwhile. What
            is left then is recovered by the next call.
        is_certain: asked of each row that is expired and free; if it is not, the row is left alone.
        policy_of: asked for retry and delay of each; None: those of `policy`.

    Returns:
        How many tasks were recovered.
    """
    moment = now()
    cutoff = policy.cutoff(moment)
    if cutoff is None:
        return 0

    def judge(row: Candidate) -> Verdict | None:
        if not is_certain(row):
            return None
        own = policy if policy_of is None else replace(policy_of(row), lease=policy.lease)
        status, note, wrong_delay = outcomes.recovered(row.status, own, moment)
        _log_wrong_delay(wrong_delay)
        return Verdict(status, note)

    count = 0
    deadline = time.monotonic() + seconds
    for page in engine_for(source.using).recover(source, cutoff, judge):
        count += len(page)
        for row, status in page:
            _tell_recovered(source, row.pk, row.status, status)
        if time.monotonic() > deadline:
            break
    return count


def _log_wrong_delay(error: Exception | None) -> None:
    if error is not None:
        logger.error("The delay of a recovered task can not be computed, it is zero.", exc_info=error)


def _tell_recovered(
    source: Source[Any], pk: Any, lease: Status, status: Status, why: BaseException | None = None
) -> None:
    signals.send(
        signals.task_recovered,
        source.model,
        field=source.field.name,
        using=source.using,
        queue=source.queue_name,
        pk=pk,
        lease=lease,
        status=status,
        error=why,
    )


def release(source: Source[Any], row: Candidate, leases: AbstractSet[Status], waits: bool = True) -> bool:
    """Give a claimed task back uncharged: it waits as it did before the claim, and what that set is undone.

    Args:
        row: as it was before the claim.
        leases: what may stand in the row as long as it is ours.
        waits: whether to wait for somebody who has locked the row.

    Returns:
        Whether it was still ours. (Not, if the clock was set back: then it is left to its recovery.)

    Raises:
        RowLocked: somebody has locked it, and this does not wait.
    """
    if row.status.priority < max(leases).priority and not _has_come(max(leases)):
        return False
    engine, before = engine_for(source.using), source.by_field(row.before)

    def give_back() -> bool:
        if waits:
            return engine.compare_and_set(source, row, {*leases}, row.status, others=before)
        with engine.transaction():
            engine.lock_or_refuse(source.owner_rows().filter(pk=row.key))
            return engine.compare_and_set(source, row, {*leases}, row.status, others=before)

    return engine.patiently(give_back, reconnect=True)


def take_back(
    source: Source[Any], policy: Policy, row: Candidate, leases: AbstractSet[Status], why: BaseException
) -> bool:
    """Take back a task whose worker is dead for sure, without waiting for its lease to run out.

    Args:
        row: as it was before the claim.
        leases: what may stand in the row as long as it is that worker's.
        why: what has become of it, for the error field.

    Returns:
        Whether it was still that worker's. Then the attempt is charged, as by `recover`.

    Raises:
        RowLocked: somebody has locked it.
    """
    lease = max(leases)
    if not _has_come(lease):
        return False
    engine = engine_for(source.using)
    status, note, wrong_delay = outcomes.recovered(lease, policy, now(), why)
    _log_wrong_delay(wrong_delay)

    def charge() -> bool:
        with engine.transaction():
            engine.lock_or_refuse(source.owner_rows().filter(pk=row.key))
            if source.has_error_field_elsewhere:
                keys = source.keys_of_errors([row.pk])
                engine.lock_or_refuse(source.error_rows().filter(pk__in=list(keys.values())))
            return engine.compare_and_set(source, row, {*leases}, status, note)

    was_its = engine.patiently(charge, reconnect=True)
    if was_its:
        _tell_recovered(source, row.pk, lease, status, why)
    return was_its


def _has_come(lease: Status) -> bool:
    """Wait until the time of a lease has come, so that the next claim gets another; return whether it has."""
    latest = priority_to_datetime(lease.priority)
    deadline = time.monotonic() + 1.0
    while latest is not None and now() < latest:
        if time.monotonic() > deadline:  # the clock was set back
            return False
        time.sleep(0.0005)
    return True


def cancel(queryset: Tasks[Any], field: str) -> int:
    """Cancel tasks that are created, waiting or working, whatever their attempts.

    A working one is taken from its worker, whose outcome is then dropped. Tasks that a transaction has
    locked, that of an action with ``atomic=True`` for example, are left alone.

    Returns:
        How many were canceled.
    """
    return _change(queryset, field, cancelable(field), State.canceled)


def retry(queryset: Tasks[Any], field: str) -> int:
    """Make canceled tasks waiting, with no attempts made yet; all others are left alone.

    Returns:
        How many were made waiting.
    """
    return _change(queryset, field, retryable(field), State.waiting)


def enqueue_unlocked(queryset: Tasks[Any], field: str) -> int:
    """Make tasks waiting from now on, as `enqueue` does, but leave those alone that somebody has locked.

    Returns:
        How many were made waiting or moved.
    """
    return _change(queryset, field, enqueueable(field, now()), State.waiting)


def cancelable(field: str) -> Q:
    """Return the condition that `cancel` can change a task."""
    return _in_states(field, State.created, State.waiting, State.working)


def retryable(field: str) -> Q:
    """Return the condition that `retry` can change a task."""
    return _in_states(field, State.canceled)


def enqueueable(field: str, moment: dt.datetime) -> Q:
    """Return the condition that `enqueue` without a time can change a task."""
    scheduled = {
        f"{field}__gt": Status.waiting(moment, Status.max_attempts),
        f"{field}__lte": Status.maximum(State.waiting),
    }
    return _not_waiting(field) | Q(**scheduled)


def _not_waiting(field: str) -> Q:
    ended = _in_states(field, State.created, State.finished, State.canceled)
    return Q(**{f"{field}__isnull": True}) | ended


def _in_states(field: str, *states: State) -> Q:
    return functools.reduce(operator.or_, [Q(**Status.filter(field, state)) for state in states])


def _change(queryset: Tasks[Any], field: str, condition: Q, state: State) -> int:
    rows = on_write_database(queryset)
    column = status_field(rows.model, field)
    moment = datetime_to_int(now())
    status = F(column.name)
    if state == State.canceled:  # when it was, and how often it had been tried
        value: Any = Value(int(Status.combine(state, moment, 0)), models.BigIntegerField()) + status % 10
    else:
        value = Status.combine(state, moment, 0)
    engine = engine_for(rows.db)

    def change() -> int:
        with engine.transaction():
            engine.take_write_lock(column)
            parts = (part.filter(condition) for part in owner_rows(rows, column))
            return sum(
                free.update(**{column.name: value}) for part in parts for free in engine.unlocked(part)
            )

    return engine.patiently(change)


@dataclass(frozen=True)
class Pruned:
    """What has become of old tasks."""

    deleted: int = 0
    protected: int = 0
    """How many are kept, as a foreign key that refers to them, or a trigger, forbids to delete them."""
    protectors: frozenset[str] = frozenset()
    """The labels of the models that these foreign keys are in, where Django knows them."""

    @property
    def why(self) -> str:
        if not self.protectors:
            return "the database refuses it"
        return f"foreign keys of {', '.join(sorted(self.protectors))} protect them"

    def __add__(self, other: Pruned) -> Pruned:
        return Pruned(
            self.deleted + other.deleted,
            self.protected + other.protected,
            self.protectors | other.protectors,
        )


def prune(
    queryset: Tasks[Any],
    field: str,
    older_than: dt.timedelta,
    state: StateLike = State.finished,
    batch: int = 500,
) -> Iterator[Pruned]:
    """Delete tasks that ended long ago, oldest first, in batches of a transaction each.

    As by `QuerySet.delete`: what refers to them goes with them or keeps them, as its ``on_delete`` says.
    Tasks that somebody has locked are passed over, and so are those that a foreign key protects
    (``PROTECT`` and ``RESTRICT``) and those that the database refuses to delete, each with a warning.

    Args:
        older_than: how long ago they ended, zero or more.
        state: finished or canceled.
        batch: how many to delete in one transaction.

    Yields:
        After each batch, what has become of it.

    Raises:
        TypeError, ValueError: `older_than` or `state` is none that tasks end with.
    """
    rows = on_write_database(queryset)
    column = status_field(rows.model, field)
    first, last = _ended_before(older_than, state)
    key = owner_key(rows.model, column)
    columns = ["pk", column.name, *([] if key == "pk" else [key])]
    engine = engine_for(rows.db)
    is_old = _between(column.name, first, last)

    def read(start: int, behind: Q) -> list[Any]:
        old = rows.filter(behind, _between(column.name, start, last)).order_by(column.name, "pk")
        return list(old.values_list(*columns)[:batch])

    page = engine.patiently(functools.partial(read, first, Q()))
    while page:
        keys, began = {pk: owner[0] if owner else pk for pk, _, *owner in page}, time.monotonic()
        pruned = _delete(rows.filter(is_old), column, keys)
        engine.rest(time.monotonic() - began)
        if pruned.deleted or pruned.protected:
            yield pruned
        # On from the last one, as those that were passed over are still there, however many they are. (Its
        # status replaces the bound: of two, SQLite would seek to the first.)
        pk, status = page[-1][:2]
        behind = Q(**{f"{column.name}__gt": status}) | Q(pk__gt=pk)
        page = engine.patiently(functools.partial(read, status, behind))


def _delete(rows: models.QuerySet[Any], column: models.Field[Any, Any], keys: dict[Any, Any]) -> Pruned:
    """Delete rows that are free: all at once or, where one can not be deleted, one by one.

    Args:
        keys: by their primary key that in the table with the status column.
    """
    engine = engine_for(rows.db)
    try:
        return engine.patiently(functools.partial(_delete_together, rows, column, keys))
    except Error as error:
        if engine.is_of_the_database_itself(error):
            raise
        if len(keys) > 1:
            return sum((_delete(rows, column, {pk: key}) for pk, key in keys.items()), Pruned())
        if isinstance(error, ProtectedError):
            return Pruned(
                protected=1, protectors=frozenset(one._meta.label for one in error.protected_objects)
            )
        if isinstance(error, RestrictedError):
            return Pruned(
                protected=1, protectors=frozenset(one._meta.label for one in error.restricted_objects)
            )
        # A foreign key that Django leaves to the database, or a trigger.
        logger.warning("%s %s can not be deleted: %s", rows.model._meta.label, next(iter(keys)), error)
        return Pruned(protected=1)


def _delete_together(
    rows: models.QuerySet[Any], column: models.Field[Any, Any], keys: dict[Any, Any]
) -> Pruned:
    engine = engine_for(rows.db)
    with engine.transaction():
        engine.take_write_lock(column)
        table: models.QuerySet[Any] = models.QuerySet(owner_of(column), using=rows.db)
        free = engine.deletable(table.filter(pk__in=list(keys.values())))
        ours = {pk for pk, key in keys.items() if key in free}
        ours -= _locked_in_children(rows.model, rows.db, ours)
        # Asked once more under the lock: a task that somebody has enqueued meanwhile, here or in another
        # stage, is kept.
        still = {pk for (pk,) in rows.filter(pk__in=list(ours)).order_by().values_list("pk")}
        tasks: models.QuerySet[Any] = models.QuerySet(rows.model, using=rows.db)
        tasks.filter(pk__in=list(still)).delete()
    return Pruned(len(still))


def _locked_in_children(model: type[models.Model], using: str, keys: set[Any]) -> set[Any]:
    """Lock the rows that go with these, as they may be stages, too; return the keys of those in use."""
    taken = set[Any]()
    for link in model._meta.related_objects:
        if link.one_to_one and link.parent_link:  # of a model that inherits
            children: models.QuerySet[Any] = models.QuerySet(link.related_model, using=using)
            children = children.filter(**{f"{link.field.name}__in": list(keys)}).order_by()
            free = engine_for(using).deletable(children)
            taken |= {key for pk, key in children.values_list("pk", link.field.attname) if pk not in free}
    return taken


def ended_before(
    queryset: Tasks[Any], field: str, older_than: dt.timedelta, state: StateLike = State.finished
) -> models.QuerySet[Any]:
    """Return the tasks that `prune` would delete now; arguments and errors are its own."""
    return on_write_database(queryset).filter(_between(field, *_ended_before(older_than, state)))


def _ended_before(older_than: dt.timedelta, state: StateLike) -> tuple[int, int]:
    """Return the first and the last status of tasks that ended so long ago."""
    ended = State.of(state)
    if ended not in (State.finished, State.canceled):
        raise ValueError(f"prune() deletes what has ended, finished or canceled, not {ended}.")
    if not isinstance(older_than, dt.timedelta):
        raise TypeError(f"older_than is a datetime.timedelta, not {older_than!r}.")
    return Status.minimum(ended), Status.combine(ended, shifted(now(), -older_than), Status.max_attempts)


def _between(field: str, first: int, last: int) -> Q:
    return Q(**{f"{field}__gte": first, f"{field}__lte": last})


def enqueue(
    queryset_or_instance: models.QuerySet[Any] | models.Manager[Any] | models.Model,
    field: str,
    at: dt.datetime | None = None,
    priority: int | None = None,
) -> int:
    """Make tasks waiting, with no attempts made yet.

    A created, finished or canceled task, and one that was not in the queue (NULL), becomes waiting.
    A working one is left alone: its worker decides. One that is waiting already is moved to the new
    time or priority; without either it is left alone if it is due, so that enqueueing a task twice
    does not send it to the end of the queue. One UPDATE, in your transaction if there is one; nothing
    else of the row is touched.

    Args:
        queryset_or_instance: the tasks, or one saved instance, whose status is then set, too.
        field: the name of the status field.
        at: not before this time; naive times are UTC.
        priority: instead of `at`, an int from 0 to 10**17 - 1; lower runs first. Below 10**16 or so
            it is due at once and ahead of all times.

    Returns:
        How many tasks this made waiting or moved.

    Raises:
        TypeError, ValueError: both `at` and `priority`, one of a wrong kind, an unsaved instance, or
            no status field of that name.
    """
    if at is not None and priority is not None:
        raise ValueError(
            f"enqueue() takes at={at!r} or priority={priority!r}, not both. A time is a priority."
        )
    if at is not None and not isinstance(at, dt.datetime):
        raise TypeError(f"enqueue(): at is a datetime.datetime, not {at!r}. For a number use priority.")
    if isinstance(priority, dt.datetime):
        raise TypeError(f"enqueue(): priority is an int, not {priority!r}. For a time use at.")
    moment = now()
    status = Status.waiting(at if at is not None else priority if priority is not None else moment)
    if at is None and priority is None:
        movable = enqueueable(field, moment)
    else:
        movable = _not_waiting(field) | _in_states(field, State.waiting)
    rows = _rows_to_enqueue(queryset_or_instance)
    return _make_waiting(rows, queryset_or_instance, field, status, movable)


def enqueue_placed(instance: models.Model, field: str, choose: NextPriority) -> int:
    """Make a task waiting from now on, as `enqueue` does, under the priority that its queue chooses.

    Returns:
        1, or 0 if the task was left alone.

    Raises:
        TypeError, ValueError: no priority was chosen, or as `enqueue`.
        Exception: what `choose` raised.
    """
    rows, moment = _rows_to_enqueue(instance), now()
    status = Status.combine(State.waiting, choose(instance, moment), 0)
    return _make_waiting(rows, instance, field, status, enqueueable(field, moment))


def _make_waiting(rows: models.QuerySet[Any], given: object, field: str, status: Status, movable: Q) -> int:
    column = status_field(rows.model, field)
    engine = engine_for(rows.db)

    def move() -> int:
        with engine.transaction():
            engine.take_write_lock(column)
            # The condition is asked by the UPDATE itself: a task that is claimed meanwhile is left alone.
            parts = owner_rows(rows, column)
            return sum(part.filter(movable).update(**{column.name: status}) for part in parts)

    count = engine.patiently(move)
    if count and isinstance(given, models.Model):
        set_loaded(given, column, status)
    return count


def rows_of(verb: str, instance: models.Model) -> models.QuerySet[Any]:
    """Return the row of an instance, as a queryset on the database to write it to."""
    if instance._state.adding or instance.pk is None:
        raise ValueError(f"{verb}(): {instance!r} is not saved, so there is no row to {verb}. Save it first.")
    using = router.db_for_write(type(instance), instance=instance)
    rows: models.QuerySet[Any] = models.QuerySet(type(instance), using=using)
    return rows.filter(pk=instance.pk)


def _rows_to_enqueue(
    given: models.QuerySet[Any] | models.Manager[Any] | models.Model,
) -> models.QuerySet[Any]:
    if isinstance(given, models.Model):
        return rows_of("enqueue", given)
    if not isinstance(given, (models.QuerySet, models.Manager)):
        raise TypeError(f"enqueue() takes a QuerySet, a Manager or an instance, not {given!r}.")
    return on_write_database(given)
