"""Declared queues: which tasks, which action, and how they are to be run, said once.

A queue is declared where its action is, by a decorator in the module ``queues`` of an app, which is found by
itself::

    @modelqueue.queue(Photo, "status", retry=5, timeout=timedelta(minutes=5))
    def make_thumbnail(photo): ...

The result is a `Queue`. ``manage.py modelqueue worker`` runs all of them.
"""

from __future__ import annotations

import datetime as dt
import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar, Union, cast

from django.apps import apps
from django.db import models, transaction
from django.utils.module_loading import autodiscover_modules

from modelqueue import verbs
from modelqueue.attempts import AsyncAttempt, AtomicAttempt, Attempt
from modelqueue.backoff import Delay
from modelqueue.claim_values import ClaimValues, Given, show
from modelqueue.clock import now
from modelqueue.engines import Candidate, Claim, Engine, engine_for
from modelqueue.execution import Work, arun_next, begin_next, is_async, refuse_atomic_async, run_next
from modelqueue.fields import StatusField, declared_on, set_loaded
from modelqueue.outcomes import Policy
from modelqueue.per_task import PerTask, TaskOptions, Terms, checked_bool, checked_classes, retry_field
from modelqueue.source import Source, Tasks, write_alias
from modelqueue.status import ONE_HOUR, ZERO_SECS, State, StateLike, Status

__all__ = [
    "DEFAULT_LEASE",
    "DEFAULT_RETRY",
    "Queue",
    "checked_lease",
    "declared_queues",
    "discover",
    "queue",
    "undeclare",
]

M = TypeVar("M", bound=models.Model)
Origin = Union["type[M]", "models.Manager[M]", "models.QuerySet[M]", "Callable[[], models.QuerySet[M]]"]

logger = logging.getLogger("modelqueue")

DEFAULT_RETRY = 3
DEFAULT_LEASE = dt.timedelta(seconds=30)
SHORTEST_LEASE = dt.timedelta(seconds=3)

#: Under the instance's __dict__: the claim that `Queue.release` gives back.
_CLAIM = "_modelqueue_claim"

#: What a verb of a queue changes where nothing is named; not None, which first() returns if it finds none.
ALL: Any = type("All", (), {"__repr__": lambda self: "all"})()

_declared: dict[str, Queue[Any]] = {}


class Queue(Generic[M]):
    """A declared queue: tasks, the action that is run on each, and its options. Made by `queue`.

    Calling it calls the action. Wherever a method takes `tasks`, it is a queryset of the model or one
    instance, and without it all tasks of the queue are meant.
    """

    name: str
    """By which commands and logs call it."""
    model: type[M]
    """The model of its tasks."""
    field: models.Field[Any, Any]
    """The status field."""
    lease: dt.timedelta
    """After how long without a sign of life from its worker a task is taken back."""
    slots: int | None
    """How many of its tasks a process runs at a time, or None."""

    def __init__(
        self, origin: Origin[M], field: str, action: Callable[[M], object], *, where: str, **options: Any
    ) -> None:
        # Not its __dict__: what somebody has hung on it would hide methods and options of the queue.
        functools.update_wrapper(self, action, updated=())
        self.origin = origin
        #: What `source` and `shared` have made, by the database, if it is the same each time.
        self._sources: dict[str, Source[M]] = {}
        self._shared: dict[str, Source[M]] = {}
        self.action = action
        self.where = where
        self.lease = checked_lease(options["lease"])
        #: The name of the field that holds how often a task is retried, if it is not the same for all.
        self.retry_field: str | None = options["retry"] if isinstance(options["retry"], str) else None
        retry = DEFAULT_RETRY if self.retry_field else options["retry"]
        policy = Policy.of(retry, options["timeout"], options["delay"])
        self.policy = replace(
            policy,
            lease=self.lease,
            cancel_on=checked_classes(options["cancel_on"]),
            next_priority=_checked_hook("next_priority", options["next_priority"], "a task", "a time"),
        )
        self.atomic: bool = checked_bool("atomic", options["atomic"])
        self.slots = _checked_slots(options["slots"])
        self.error_field: str | None = options["error_field"]
        #: Queues on one field whose groups differ have no row in common, now or later.
        self.group: object = None
        #: Gives the keys of its tasks by other ids, if they have such; those of none are left out.
        self.keys_of_ids: Callable[[Iterable[str]], dict[str, Any]] | None = None
        #: Gives findings of ``manage.py modelqueue doctor`` that are of such queues alone, by the database,
        #: within about so many seconds.
        self.examine: Callable[[str, float], Iterator[Any]] | None = None
        source = Source.of(self.rows(), field, self.error_field)
        if not isinstance(source.field, StatusField):
            raise TypeError(
                f"{source.field} is a {type(source.field).__name__}, which save() would set back to an older "
                "lease. A declared queue needs a modelqueue.StatusField; that is no new migration."
            )
        self.field = source.field
        self.model = source.model
        self.upkeep: Callable[[], object] | None = _checked_hook("upkeep", options["upkeep"])
        claim_values: Given | None = options["claim_values"]
        if callable(claim_values):
            _checked_hook("claim_values", claim_values)
        self.claim_values = (
            None if claim_values is None else ClaimValues(claim_values, self.model, self.field)
        )
        self.is_async = is_async(action)
        _check_call(f"The action {action!r}", action, "a task alone")
        refuse_atomic_async(action, self.atomic)
        self._terms = Terms(self.policy, self.atomic)
        self._per_task = PerTask(
            self._terms,
            retry_field(self.model, self.retry_field, self.field) if self.retry_field else None,
            _checked_hook("task_options", options["task_options"], "a task"),
            self.is_async,
        )
        self.name = _checked_name(options["name"]) or _default_name(action, self.model)

    def __call__(self, task: M) -> object:
        """Call the action, nothing else."""
        return self.action(task)

    def __repr__(self) -> str:
        return f"<Queue {self.name}>"

    # The tasks

    def rows(self) -> models.QuerySet[M]:
        """Return the queryset of all tasks, made anew."""
        origin: Any = self.origin
        if isinstance(origin, type) and issubclass(origin, models.Model):
            origin = origin._default_manager
        if isinstance(origin, (models.Manager, models.QuerySet)):
            return origin.all()
        if not callable(origin):
            raise TypeError(
                "A queue is declared over a model, a manager, a queryset, or a callable that returns a "
                f"queryset, not over {origin!r}."
            )
        rows: models.QuerySet[M] = origin()
        return rows

    def source(self) -> Source[M]:
        if self._fixed is None:
            return self._source_of(self.rows())
        using = write_alias(self._fixed)  # which the router may change
        if using not in self._sources:
            source = self._source_of(self._fixed.using(using))
            self._sources[using] = replace(source, fixed=source.queryset)
        return self._sources[using]

    def _source_of(self, rows: models.QuerySet[M]) -> Source[M]:
        return Source.of(rows, self.field.name, self.error_field, self.claim_values, self.name)

    @functools.cached_property
    def _fixed(self) -> Any:
        """The manager or queryset of its rows, if these are the same each time; else None."""
        origin: Any = self.origin
        if isinstance(origin, type):
            origin = cast("Any", origin)._default_manager
        is_plain = isinstance(origin, models.Manager) and (
            type(origin).get_queryset is models.Manager.get_queryset
        )
        return origin if is_plain or isinstance(origin, models.QuerySet) else None

    def shared(self, source: Source[M] | None = None) -> Source[M]:
        """Return those tasks that a worker runs beside others: all but those on their last attempt.

        A process that dies charges what it runs. So a task whose next attempt is its last runs alone: it is
        never canceled because of another in its process, nor another because of it. So does one that has had
        more attempts than that, since `retry` was lowered.

        Args:
            source: its own, if that is at hand: to ask for it may call code of the user.
        """
        source = source or self.source()
        if not self.has_last_attempts:
            return source
        retry = self.retry_field or self.policy.retry
        if source is not self._sources.get(source.using):
            return replace(source, below=retry)
        if source.using not in self._shared:
            self._shared[source.using] = replace(source, below=retry)
        return self._shared[source.using]

    def alone(self) -> Source[M]:
        """Return the first of those tasks that a worker runs alone, where it `has_last_attempts`."""
        source = self.source()
        engine = engine_for(source.using)
        (head,) = engine.patiently(lambda: engine.scalars([source.head(now())]), reconnect=True)
        return self.alone_in(source, head)

    def alone_in(self, source: Source[M], head: int | None) -> Source[M]:
        """Return the same of its source, of which the head is known."""
        return source.had(self.retry_field or self.policy.retry or 0, head)

    @property
    def has_last_attempts(self) -> bool:
        """Whether it has attempts that are the last one, but not the first."""
        return self.retry_field is not None or bool(self.policy.retry)

    @property
    def using(self) -> str:
        """The alias of the database that its tasks are in."""
        return self.source().using

    def recovery(self) -> Policy:
        """Return by which policy abandoned tasks are taken back.

        Of several queues on one field the longest lease counts, see `longest_lease`. On a database of one
        writer it holds for as long as a renewal may have to wait for the others, too.
        """
        wait = engine_for(self.using).longest_wait()
        return replace(self.policy, lease=min(self.longest_lease, dt.timedelta.max - wait) + wait)

    @property
    def longest_lease(self) -> dt.timedelta:
        """The longest lease of those queues whose tasks may be its own, too."""
        queues: list[Queue[Any]] = [self, *declared_on(self.field)]
        return max(one.lease for one in queues if one.group == self.group)

    def terms(self, claim: Claim[M]) -> Terms:
        """Return on which terms the attempt on a claimed task is made; where they are wrong it fails."""
        if claim.task is None or not self._per_task.differs:
            return self._terms
        try:
            return self._per_task.of(claim.task)
        except Exception as error:
            terms = self._per_task.without_options(claim.task)
            claim.task, claim.error = None, error
            return terms

    def policy_of(self, row: Candidate) -> Policy:
        """Return by which policy a task is charged whose worker is dead: that of the row as it stands.

        Raises:
            django.db.Error: the database did not answer.
        """
        if not self._per_task.differs:
            return self.policy
        source, task = self.source(), None
        try:
            # An error of what the hook asks is to leave the transaction of the recovery usable.
            with transaction.atomic(using=source.using):
                task = source.rows().get(pk=row.pk)
                return self._per_task.of(task).policy
        except Exception as error:
            if engine_for(source.using).is_of_the_database_itself(error):
                raise
            # It is to be taken back all the same, and holds up no other.
            logger.error("%s %s: its options can not be told: %s", self.name, row.pk, error)
            return (self._terms if task is None else self._per_task.without_options(task)).policy

    @property
    def asks_for_policy(self) -> Callable[[Candidate], Policy] | None:
        """`policy_of`, where that differs from task to task."""
        return self.policy_of if self._per_task.differs else None

    def work(self) -> Work[M]:
        return Work(
            self.source(), self.policy, self.action, self.atomic, self, self.recovery(), self.asks_for_policy
        )

    def attempt(self, claim: Claim[M], source: Source[M], engine: Engine | None = None) -> Attempt[M]:
        """Return the attempt that is to be made on a claimed task."""
        policy, is_atomic = self.terms(claim)
        kind = AsyncAttempt if self.is_async else AtomicAttempt if is_atomic else Attempt
        attempt = kind(source, policy, claim, engine)
        attempt.queue = self
        return attempt

    def keep_up(self) -> None:
        """Do the upkeep of the queue, as a worker does each second; raises what it raises."""
        if self.upkeep is not None:
            self.upkeep()

    # The verbs

    def enqueue(
        self, tasks: Tasks[M] | M = ALL, at: dt.datetime | None = None, priority: int | None = None
    ) -> int:
        """Make tasks waiting, see `modelqueue.enqueue`; return how many.

        The priority of a single instance, given without `at` and `priority`, is chosen by `next_priority`,
        if the queue has that.

        Raises:
            TypeError, ValueError: `tasks` are none of this queue's model, or see `modelqueue.enqueue`.
        """
        self._check_tasks("enqueue", tasks)
        choose = self.policy.next_priority
        if choose is not None and isinstance(tasks, models.Model) and at is None and priority is None:
            return verbs.enqueue_placed(tasks, self.field.name, choose)
        return verbs.enqueue(self.rows() if tasks is ALL else tasks, self.field.name, at, priority)

    def run(self) -> M | None:
        """Run the next due task in this thread, see `modelqueue.run`. Its lease is renewed meanwhile.

        Raises:
            TypeError: the action is async: use `arun`.
            BaseException: as `modelqueue.run`.
        """
        if self.is_async:
            raise TypeError(f"{self.name} has an async action. Use arun().")
        return run_next(self.work())

    async def arun(self) -> M | None:
        """Run the next due task from asynchronous code, see `modelqueue.arun`."""
        return await arun_next(self.work())

    def drain(self) -> int:
        """Run tasks in this thread until none is due; return how many there were.

        What actions raise is recorded and logged, not raised.

        Raises:
            TypeError: the action is async.
            django.db.Error: the database did not answer.
        """
        if self.is_async:
            raise TypeError(f"{self.name} has an async action. Await arun() until it returns None.")
        count = 0
        while attempt := begin_next(self.work()):
            outcome = attempt.process(self.action)
            attempt.let_its_time_come(outcome)
            if outcome.raised is not None and not isinstance(outcome.raised, Exception):
                raise outcome.raised  # Ctrl-C
            count += 1
        return count

    def claim(self, limit: int = 1) -> list[M]:
        """Take up to `limit` due tasks without running them; they are this caller's for one lease.

        Give each back with `release`, or set its status by `QuerySet.update`, filtered by the claimed one.

        Raises:
            TypeError, ValueError: `limit` is no int, or less than 1.
        """
        source, tasks = self.source(), list[M]()
        for claim in verbs.claim(source, _checked_limit(limit)):
            if claim.task is None:
                self._settle_broken(source, claim)
                continue
            claim.task.__dict__[_CLAIM] = claim
            tasks.append(claim.task)
        return tasks

    def _settle_broken(self, source: Source[M], claim: Claim[M]) -> None:
        """Record the failure of a row that can not be made into an instance."""
        try:
            Attempt(source, self.policy, claim).settle(claim.error)
        except Exception:  # the others are the caller's already; this one is left to its recovery
            logger.exception("%s: the failure of %s can not be recorded.", self.name, claim.row.pk)

    def release(self, task: M) -> bool:
        """Give a task of `claim` back uncharged; return whether it was still ours.

        Raises:
            ValueError: the instance does not come from `claim`.
        """
        claim: Claim[M] | None = task.__dict__.get(_CLAIM)
        if claim is None:
            raise ValueError(f"{task!r} was not claimed by Queue.claim(), or is given back already.")
        source = self.source()
        was_ours = verbs.release(source, claim.row, {claim.lease})
        del task.__dict__[_CLAIM]
        if was_ours:
            set_loaded(task, self.field, claim.row.status)
            show(task, source.by_field(claim.row.before))
        return was_ours

    def tally(self) -> dict[str, int]:
        """Count the tasks by state, see `Status.tally`."""
        return Status.tally(self.source().queryset, self.field.name)

    def retry(self, tasks: Tasks[M] | M = ALL) -> int:
        """Make canceled tasks waiting again, with no attempts made yet; return how many.

        Raises:
            TypeError, ValueError: `tasks` are none of this queue's model, or not saved.
        """
        return verbs.retry(self._queryset("retry", tasks), self.field.name)

    def cancel(self, tasks: Tasks[M] | M = ALL) -> int:
        """Cancel created, waiting and working tasks; return how many. Locked ones are left alone.

        Raises:
            TypeError, ValueError: `tasks` are none of this queue's model, or not saved.
        """
        return verbs.cancel(self._queryset("cancel", tasks), self.field.name)

    def _queryset(self, verb: str, tasks: Tasks[M] | M) -> Tasks[M]:
        if tasks is ALL:
            return self.rows()
        self._check_tasks(verb, tasks)
        return verbs.rows_of(verb, tasks) if isinstance(tasks, models.Model) else tasks

    def _check_tasks(self, verb: str, tasks: Any) -> None:
        """Raise if these are no tasks of the model; None for example, where first() has found none."""
        if tasks is ALL:
            return
        if not isinstance(tasks, (models.QuerySet, models.Manager, models.Model)):
            raise TypeError(
                f"{verb}() takes a QuerySet, a Manager or an instance of {self.model.__name__}, not "
                f"{tasks!r}. Call {verb}() without it for all tasks of the queue."
            )
        model = type(tasks) if isinstance(tasks, models.Model) else tasks.model
        if not issubclass(model, self.model._meta.concrete_model or self.model):
            raise TypeError(
                f"{verb}() of the queue {self.name} takes tasks of {self.model.__name__}, not of "
                f"{model.__name__}."
            )

    def prune(self, older_than: dt.timedelta, state: StateLike = State.finished) -> int:
        """Delete tasks that ended longer ago than that; return how many. Locked ones are left alone.

        So is a row that is still open (created, waiting or working) in another status field of the model, as
        a later stage of a pipeline is, or of a child with a table of its own. So is one that a foreign key
        protects (``PROTECT`` or ``RESTRICT``), or that the database refuses to delete: how many is logged.

        Raises:
            TypeError, ValueError: see `modelqueue.verbs.prune`.
        """
        pruned = sum(verbs.prune(self.prunable(), self.field.name, older_than, state), verbs.Pruned())
        if pruned.protected:
            logger.warning(
                "%s: %s old tasks are not deleted, as %s.", self.name, pruned.protected, pruned.why
            )
        return pruned.deleted

    def prunable(self) -> models.QuerySet[M]:
        """Return the tasks that no other stage has still before it, whatever their state here."""
        rows = self.rows()
        for name in self._other_stages():
            for state in (State.created, State.waiting, State.working):
                rows = rows.exclude(**Status.filter(name, state))
        return rows

    def _other_stages(self) -> Iterator[str]:
        """Yield the other status fields that a row has, declared or not, by their names in a query."""
        meta = self.model._meta
        for field in meta.concrete_fields:
            if field is not self.field and _is_stage(field):
                yield field.name
        for link in meta.related_objects:  # what inherits from the model, and goes with its row
            if link.one_to_one and link.parent_link:
                child = link.related_model._meta
                yield from (
                    f"{link.name}__{one.name}" for one in child.local_concrete_fields if _is_stage(one)
                )


def queue(
    source: Origin[M],
    field: str,
    *,
    name: str | None = None,
    retry: int | str | None = DEFAULT_RETRY,
    timeout: dt.timedelta = ONE_HOUR,
    lease: dt.timedelta = DEFAULT_LEASE,
    delay: Delay = ZERO_SECS,
    atomic: bool = False,
    error_field: str | None = None,
    cancel_on: type[BaseException] | tuple[type[BaseException], ...] = (),
    slots: int | None = None,
    claim_values: Given | None = None,
    next_priority: Callable[[M, dt.datetime], int | dt.datetime] | None = None,
    upkeep: Callable[[], object] | None = None,
    task_options: Callable[[M], TaskOptions] | None = None,
) -> Callable[[Callable[[M], object]], Queue[M]]:
    """Declare a queue: the decorated function, ``def`` or ``async def``, is its action.

    Args:
        source: its tasks: a model, a manager, a queryset, or a callable that returns a queryset, which is
            called for each claim.
        field: the name of the `StatusField`.
        name: by which commands and logs call it; ``app_label.function`` by default.
        retry: how many attempts are allowed after the first that failed, 0 to 8; None for no limit. Or the
            name of an IntegerField of the model that holds it for each task, NULL for no limit.
        timeout: how long an action may take; `Current.deadline` tells it. The worker ends one that takes
            longer, which is a failed attempt; `run`, `arun` and `drain` do not.
        lease: after how long without a sign of life from its worker a task is taken back, 3 s or more. A
            worker renews it every third of that. Of several queues on one field the longest counts.
        delay: how long a task waits after a failed attempt: a timedelta, or a callable
            (attempts) -> timedelta, see `modelqueue.backoff`.
        atomic: whether the action and its outcome are one transaction, see `modelqueue.run`.
        error_field: the name of an `ErrorField` that takes the text of a failure.
        cancel_on: an exception, or a tuple of them, after which there is no further attempt.
        slots: how many of its tasks a worker process runs at a time, 1 or more. None: as many as it has
            threads, or 100 of an ``async def``.
        claim_values: further fields that a claim sets, in the statement that sets the status: a dict of
            values by field name, or a callable without arguments that returns one, called once for each
            claim. A task that is given back uncharged gets back what it had before.
        next_priority: a callable (task, time) -> int or datetime that chooses the priority under which a task
            waits for its next attempt, instead of the time from which that may be made. Also called by
            `Queue.enqueue` of an instance. A number below all times is due at once.
        upkeep: a callable without arguments that each worker calls when it starts, and every second as long
            as it serves the queue.
        task_options: a callable (task) -> dict that is asked when a task is claimed or recovered, for those
            of `timeout`, `delay`, `atomic` and `cancel_on` that are others for this task.

    Raises:
        TypeError, ValueError: what can not be declared, and what to do about it.
    """
    where = _place_of_call()

    def declare(action: Callable[[M], object]) -> Queue[M]:
        declared = Queue(
            source,
            field,
            action,
            where=where,
            name=name,
            retry=retry,
            timeout=timeout,
            lease=lease,
            delay=delay,
            atomic=atomic,
            error_field=error_field,
            cancel_on=cancel_on,
            slots=slots,
            claim_values=claim_values,
            next_priority=next_priority,
            upkeep=upkeep,
            task_options=task_options,
        )
        _register(declared)
        return declared

    return declare


def declared_queues() -> list[Queue[Any]]:
    """Return all declared queues, by name. Looks for them in the apps' modules ``queues`` first."""
    discover()
    return [_declared[name] for name in sorted(_declared)]


def discover() -> None:
    """Import the module ``queues`` of each installed app that has one."""
    apps.check_apps_ready()
    autodiscover_modules("queues")


def _register(declared: Queue[Any]) -> None:
    known = _declared.get(declared.name)
    if known is not None and not _is_imported_again(known, declared):
        raise ValueError(
            f"There are two queues of the name {declared.name!r}: at {known.where} and at {declared.where}. "
            "Give one of them another with name=..."
        )
    queues = declared_on(declared.field)
    queues[:] = [one for one in queues if one is not known] + [declared]
    _declared[declared.name] = declared


def undeclare(declared: Queue[Any]) -> None:
    """Forget a declared queue, whose setting has changed for example."""
    if _declared.get(declared.name) is declared:
        del _declared[declared.name]
    queues = declared_on(declared.field)
    queues[:] = [one for one in queues if one is not declared]


def _is_imported_again(known: Queue[Any], declared: Queue[Any]) -> bool:
    """Say whether a queue is that of the same place, declared anew by its module.

    A module that is imported again makes its functions of new code. Of the same code are those that one
    function makes, called several times, perhaps for other tasks.
    """
    if known.where != declared.where or known.field is not declared.field:
        return False
    old, new = (_code_declared_with(one) for one in (known, declared))
    return new is None or new is not old or known.origin is declared.origin


def _code_declared_with(queue: Queue[Any]) -> object:
    """Return the code of an action that is in the file where its queue is declared; else None."""
    code = getattr(inspect.unwrap(queue.action), "__code__", None)
    is_there = code is not None and str(Path(code.co_filename)) == queue.where.rpartition(":")[0]
    return code if is_there else None


def _is_stage(field: models.Field[Any, Any]) -> bool:
    return isinstance(field, StatusField) or bool(declared_on(field))


def _place_of_call() -> str:
    frame = sys._getframe(2)
    return f"{Path(frame.f_code.co_filename)}:{frame.f_lineno}"


def _default_name(action: Callable[..., object], model: type[models.Model]) -> str:
    app = apps.get_containing_app_config(action.__module__) if apps.apps_ready else None
    label = model._meta.app_label if app is None else app.label
    name: str | None = getattr(action, "__name__", None)
    if name is None or not name.isidentifier():
        raise ValueError(f"The action {action!r} has no name to call its queue by. Give name=...")
    return f"{label}.{name}"


def _checked_name(name: object) -> str | None:
    if name is None:
        return None
    if not isinstance(name, str) or not re.fullmatch(r"[\w.:-]+", name):
        raise ValueError(
            f"name={name!r}: a queue is called by letters, digits and the signs . : _ - alone, as the "
            "command line takes them."
        )
    return name


def checked_lease(lease: object) -> dt.timedelta:
    """Return a lease.

    Raises:
        TypeError, ValueError: what is wrong with it, and what to give.
    """
    if not isinstance(lease, dt.timedelta):
        raise TypeError(
            f"lease is a datetime.timedelta, not {lease!r}. Give for example timedelta(seconds=30)."
        )
    if lease < SHORTEST_LEASE:
        raise ValueError(
            f"lease={lease} is shorter than {SHORTEST_LEASE.seconds} s, so one slow renewal lets a running "
            "task be claimed again. Give 3 s or more; the default is 30 s."
        )
    return lease


def _checked_slots(slots: object) -> int | None:
    if slots is None:
        return None
    if isinstance(slots, bool) or not isinstance(slots, int):
        raise TypeError(f"slots is an int, 1 or more, or None, not {slots!r}.")
    if slots < 1:
        raise ValueError(f"slots={slots} would never run a task. Give 1 or more, or None.")
    return slots


def _checked_limit(limit: object) -> int:
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"claim() takes an int, how many tasks at most, not {limit!r}.")
    if limit < 1:
        raise ValueError(f"claim({limit}) would take no task. Give 1 or more.")
    return limit


def _checked_hook(name: str, hook: Any, *arguments: str) -> Any:
    """Return a hook, or None; raise if it can not be called with these."""
    if hook is None:
        return None
    if not callable(hook):
        raise TypeError(f"{name} is a callable that gets {_in_words(arguments)}, not {hook!r}.")
    if inspect.iscoroutinefunction(hook):
        raise TypeError(f"{name}={hook!r} is an async function, which nobody awaits. Use def.")
    _check_call(f"{name}={hook!r}", hook, *arguments)
    return hook


def _check_call(what: str, function: Callable[..., object], *arguments: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some builtins nobody knows it
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{what} can not be called with {_in_words(arguments)}: {error}.") from None


def _in_words(arguments: tuple[str, ...]) -> str:
    return " and ".join(arguments) or "no arguments"
