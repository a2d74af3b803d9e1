"""One task from its claim to its recorded outcome.

An attempt is a pipeline: act, decide, record, tell. What is decided is in `modelqueue.outcomes`, how rows
are moved in `modelqueue.engines`, what is written besides the status in `modelqueue.changes`. This module
puts them in order, and makes two promises:

* whatever the action does, the outcome is recorded under its lease or not at all;
* whatever goes wrong with a row, the row does not stay working because of it, at least not when its lease
  has run out.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from django.db import DatabaseError, models, transaction
from django.db.transaction import TransactionManagementError
from django.db.utils import Error
from django.dispatch import Signal

from modelqueue import signals
from modelqueue.changes import Snapshot, is_plainly_saved, save_merged
from modelqueue.claim_values import Values, show
from modelqueue.clock import now
from modelqueue.engines import Change, Claim, Engine, Place, end_queries_of, engine_for
from modelqueue.fields import is_saved, set_loaded
from modelqueue.outcomes import GIVEN_BACK, Outcome, Policy, Successes, assigned, decide, failed
from modelqueue.source import Source
from modelqueue.status import ZERO_SECS, State, Status, priority_to_datetime
from modelqueue.threads import (
    Kept,
    NotCalled,
    await_with_own_thread,
    call_apart,
    call_in_own_thread,
    in_thread,
)

__all__ = ["SHORT_PATIENCE", "AsyncAttempt", "AtomicAttempt", "Attempt", "Renewable", "running"]

M = TypeVar("M", bound=models.Model)
T = TypeVar("T")

logger = logging.getLogger("modelqueue")

#: How far ahead a time is that an attempt waits for, having written it itself, and how often it looks at
#: the clock meanwhile, as that may stand still. (Not for how long: a busy machine may take its time.)
_SOON = dt.timedelta(milliseconds=5)
_LOOKS = 50
#: Seconds for which an outcome is tried at a time if others wait for it.
SHORT_PATIENCE = 1.0

_LEFT_OPEN = (
    "The action returned in the middle of a transaction, which was rolled back. "
    "Leave every transaction that an action begins, with atomic() or COMMIT."
)
_WENT_ON = (
    "The action went on after an error of the database, or called set_rollback(True), so what it "
    "wrote had to be rolled back. Put what may fail into an atomic() of its own."
)


#: The attempt whose action is being run, for `modelqueue.current`.
running: ContextVar[Attempt[Any]] = ContextVar("modelqueue_running")


class Renewable(Protocol):
    """A lease that somebody renews while the action runs, see `modelqueue.leases`."""

    def renew(self) -> bool:
        """Renew it now; return whether it is still held."""

    def end(self, seconds: float = -1) -> None:
        """Renew it no more, as the outcome is to be written under it; wait for a renewal at most so long."""

    def resume(self) -> None:
        """Renew it again, as the outcome could not be written yet."""

    def watch(self) -> None:
        """Renew it again, but only if the lock that our transaction has on the row is gone."""


class Attempt(Generic[M]):
    """A claimed task and what becomes of it: the steps in the order in which they are taken."""

    def __init__(
        self, source: Source[M], policy: Policy, claim: Claim[M], engine: Engine | None = None
    ) -> None:
        self.source = source
        self.policy = policy
        self.claim = claim
        self.task = claim.task
        #: That of this thread, for who makes many: to ask for it takes long, see `engine_for`.
        self.engine = engine or engine_for(source.using)
        #: Is it inside a transaction of the caller?
        self.is_outer = self.engine.is_inside_transaction()
        self.snapshot: Snapshot | None = None
        #: What may stand in the row while the task is ours; a renewal changes it, see `Engine.renew`.
        self.leases: set[Status] = {claim.lease}
        #: What renews the lease, if anything does.
        self.renewal: Renewable | None = None
        #: Is the task still ours, as far as its renewals know?
        self.is_held = True
        #: Does it wait for a row that somebody has locked, and for long while the database says "try again"?
        #: If others wait for it meanwhile it does not, and is settled once more later.
        self.waits = True
        #: What was decided when it was settled for the first time, and the instance as it was then.
        self.decided: Outcome | None = None
        #: What an atomic action has ended with, once it is rolled back.
        self.failure: BaseException | None = None
        self.as_left: dict[str, Any] | None = None
        #: The declared queue that the task was claimed from.
        self.queue: Any = None
        #: When its action has begun, for `modelqueue.current`.
        self.began: dt.datetime

    @property
    def lease(self) -> Status:
        """The lease as it was renewed last."""
        return max(self.leases)

    @property
    def held(self) -> set[Status | None]:
        """What stands in the row as long as the task is ours, a status that the action saved included."""
        if self.snapshot is None or not self.snapshot.has_saved:
            return {self.claim.lease, *self.leases}
        return self.snapshot.held | self.leases

    @property
    def has_saved_its_outcome(self) -> bool:
        """Whether the action has saved a status of its own, with which the lease has ended."""
        return self.snapshot is not None and self.snapshot.written not in {*self.leases, self.claim.lease}

    def run(self, action: Callable[[M], object]) -> M | None:
        """Take all steps; return the task, or raise what its attempt ended with."""
        outcome = self.process(action)
        self.let_its_time_come(outcome)
        if outcome.raised is not None:
            raise outcome.raised
        return self.task

    def process(self, action: Callable[[M], object]) -> Outcome:
        """Act, decide, record and tell; return the outcome, whatever it is."""
        try:
            error = self.claim.error if self.task is None else self.act(action, self.task)
            return self.record(self.decide(error))
        finally:
            self.end_renewal()

    # Act

    def begin(self, task: M) -> Snapshot:
        """Watch the task from here on, and tell that it is claimed."""
        self.snapshot = snapshot = Snapshot(task, self.source, self.claim.lease)
        self.tell(signals.task_claimed, status=self.claim.lease, before=self.claim.row.before)
        snapshot.begin()
        return snapshot

    def act(self, action: Callable[[M], object], task: M) -> BaseException | None:
        """Call the action; return what it raised, or None."""
        try:
            self.begin(task)
            return self.call(action, task)
        except BaseException as error:  # Ctrl-C between the steps, for example
            return error
        finally:
            self.close()

    def call(self, action: Callable[[M], object], task: M) -> BaseException | None:
        """Call the action, and leave its connection fit for use; return what it raised, or None."""
        if self.is_outer:
            return self.call_in_savepoint(action, task)
        return self.restore_connection(self.call_it(action, task))

    def call_it(self, action: Callable[[M], object], task: M) -> BaseException | None:
        """Call the action, in which `running` is this attempt; return what it raised, or None."""
        self.began = now()
        token = running.set(self)
        try:
            return _call(action, task)
        finally:
            running.reset(token)

    def may_be_of_status_alone(self, error: BaseException | None, engine: Engine) -> bool:
        """Say whether perhaps nothing but a status is to be written, and no hook has to be asked for that.

        Then `prepare` comes next, else `settle`: the lease is still renewed, as it may have to wait for many
        that take long.

        Args:
            engine: that of this thread; it does not wait for long.
        """
        self.engine = engine
        if self.as_left is not None:
            self.forget_earlier_tries()
        asks_or_tells = self.source.error_field is not None or self.policy.next_priority is not None
        return (
            not (error is not None and asks_or_tells)
            and not (self.task is not None and self.task.pk is None)
            and is_plainly_saved(self.source.model)
            and not (self.snapshot is not None and self.snapshot.changed())
        )

    def prepare(self, error: BaseException | None, successes: Successes) -> tuple[Outcome, Change] | None:
        """Take the steps after the action up to the write; return that if it is of the status alone.

        Then it can be written together with those of others, and `conclude_prepared` comes next. Else, or if
        that does not succeed, `settle` comes next: it goes on with what is decided here.

        Args:
            successes: what those end with that have returned.
        """
        self.end_renewal()
        if is_new := self.decided is None:
            self.decided = self.decide(error, successes)
        outcome, held = self.decided, self.held
        status = outcome.status
        if status is None or None in held or self.to_put_back(outcome, self.snapshot):
            return None
        is_success = is_new and outcome.ending == "finish"  # which is never stamped below its lease
        if not is_success and status.priority < self.lease.priority:
            return None
        column = self.source.error_field
        if column is not None and self.new_note(column, outcome) is not None:
            return None
        return outcome, Change(self.claim.row.key, frozenset(held), status)  # type: ignore[arg-type]  # no None

    def conclude_prepared(self, outcome: Outcome) -> None:
        """Take the steps after the write of what `prepare` has returned."""
        if self.task is not None:
            set_loaded(self.task, self.source.field, outcome.status)
        # Asked before anything is put together.
        if signals.is_heard(signals.task_finished, self.source.model, outcome.ending):
            ended = {"outcome": outcome.ending, "error": outcome.error}
            self.tell_heard(signals.task_finished, status=outcome.status, **ended)

    def settle(self, error: BaseException | None) -> Outcome:
        """Take the steps after the action, in whatever thread this is; return the outcome.

        If the outcome can not be written this raises, and may be called again later: what was decided
        stands, so that a write whose answer was lost is known again.
        """
        self.engine = engine_for(self.source.using)
        if not self.waits:
            self.engine.patience = SHORT_PATIENCE
        self.end_renewal()  # before anything can fail, and before the lease is read
        self.forget_earlier_tries()
        if self.decided is None:
            self.decided = self.decide(error)
        return self.record(self.decided.not_before(self.lease))

    def end_renewal(self) -> None:
        """Renew the lease no more, as what stands in the row is to stay what we know."""
        if self.renewal is not None:
            self.renewal.end()

    def resume_renewal(self) -> None:
        """Keep the lease alive again, as the outcome could not be written yet."""
        if self.renewal is not None:
            self.renewal.resume()

    def forget_earlier_tries(self) -> None:
        """Take away what a save() that was rolled back has left on the instance."""
        if self.task is None:
            return
        if self.as_left is None:  # there was none
            self.as_left = dict(self.task.__dict__)
            return
        self.task.__dict__.clear()
        self.task.__dict__.update(self.as_left)

    def close(self) -> None:
        """Do not watch the task any more."""
        if self.snapshot is not None:
            self.snapshot.close()

    def restore_connection(self, error: BaseException | None) -> BaseException | None:
        """Mend what the action did to its connection; return the error of the attempt, if there is one."""
        return self.error_of_left_open(error) if self.engine.restore_connection() else error

    def call_in_savepoint(self, action: Callable[[M], object], task: M) -> BaseException | None:
        """Call the action so that an error of the database leaves the caller's transaction usable.

        The savepoint is rolled back only if it must be. Otherwise what the action wrote stays, as it
        does without an outer transaction.
        """
        error: BaseException | None = None
        is_broken = False
        try:
            with transaction.atomic(using=self.source.using):
                place = self.engine.place()
                error = self.call_it(action, task)
                if self.engine.return_to(place):
                    error = self.error_of_left_open(error)
                is_broken = self.engine.connection.needs_rollback
        except DatabaseError as aborted:  # PostgreSQL, after an error that the action has swallowed
            error = error or aborted
        if is_broken and error is None:
            error = TransactionManagementError(_WENT_ON)
        return error

    def error_of_left_open(self, error: BaseException | None) -> BaseException:
        """Return the error of an attempt of which a transaction was left open, and is rolled back."""
        if self.snapshot is not None:
            self.snapshot.forget_saves()
        return error or TransactionManagementError(_LEFT_OPEN)

    # Decide

    def decide(self, error: BaseException | None, successes: Successes | None = None) -> Outcome:
        if isinstance(error, GIVEN_BACK) and self.has_saved_its_outcome:
            error = None  # it stands, though the action wanted to go on
        if error is None and self.snapshot is not None:
            try:
                if self.snapshot.assigned != self.claim.lease:
                    return assigned(self.snapshot.assigned, self.source.field.null)
            except (TypeError, ValueError) as wrong_status:
                error = wrong_status
        if error is None and successes is not None:
            return successes.of(self.lease)
        return self.placed(decide(self.lease, self.claim.row.status, error, self.policy, now()))

    def placed(self, outcome: Outcome) -> Outcome:
        """Let the queue choose the priority of a task that is to wait for another attempt.

        If it can not, the attempt has failed, and the task waits under the time of the next one.
        """
        choose, task, status = self.policy.next_priority, self.task, outcome.next_attempt
        if choose is None or task is None or status is None:
            return outcome
        _wait_until(status.priority)  # what may run at once is due when the queue is asked

        def ask() -> int | dt.datetime:
            with transaction.atomic(using=self.source.using) if self.is_outer else nullcontext():
                return choose(task, priority_to_datetime(status.priority) or now())

        try:
            priority = self.engine.patiently(ask, reconnect=True)
            chosen = Status.combine(State.waiting, priority, status.attempts)
        except BaseException as wrong_priority:  # SystemExit too: the row must not stay working
            if isinstance(wrong_priority, Error) and self.engine.is_of_the_database_itself(wrong_priority):
                raise  # no fault of the hook; nor could an outcome be written now
            wrong_priority.__cause__ = outcome.error
            return failed(self.lease, wrong_priority, self.policy, now())
        return replace(outcome, status=chosen, is_placed=True)

    # Record

    def record(self, outcome: Outcome) -> Outcome:
        """Write the outcome under the lease, and what the action changed; return what was written."""
        self.end_renewal()
        outcome, is_written = self.write_or_fail(outcome)
        self.conclude(outcome, is_written)
        return outcome

    def write_or_fail(self, outcome: Outcome) -> tuple[Outcome, bool]:
        """Write an outcome; return it, and whether the task was still ours.

        If the changes can not be saved, the attempt has failed, and that is written without them. An
        error that comes up after the commit, such as Ctrl-C, changes nothing any more.
        """
        outcome = self.keep_leases_unique(outcome)
        try:
            return outcome, self.write(outcome, self.snapshot)
        except BaseException as error:
            # The connection, or a lock that somebody has held for too long, is no fault of the changes: the
            # attempt did not fail.
            is_elsewhere = isinstance(error, Exception) and self.engine.is_of_the_database_itself(error)
            if self.snapshot is None or is_elsewhere:
                raise
            failure = self.without_changes(outcome, error)
            is_written = self.write(failure, None)
            if is_written or not self.is_recorded_despite(error, outcome):
                return failure, is_written
            if not isinstance(error, Exception):
                self.conclude(outcome, is_written=True)
                raise
            return outcome, True

    def is_recorded_despite(self, error: BaseException, outcome: Outcome) -> bool:
        """Say, and log, whether an outcome was recorded although its writing ended with an error."""
        if self.read() != (True, outcome.status):
            return False
        self.log_recorded(error)
        return True

    def log_recorded(self, error: BaseException | None) -> None:
        logger.error(
            "%s %s: its outcome is recorded, but its commit ended with an error.",
            self.source.model._meta.label,
            self.claim.row.pk,
            exc_info=error,
        )

    def without_changes(self, outcome: Outcome, error: BaseException) -> Outcome:
        """Return what to record when the changes of the action can not be saved.

        The attempt has failed, except where it was to end with an error of the action or to be given
        back: that is what the caller has to see, a Ctrl-C above all, and the other error is logged.
        """
        if outcome.raised is None or not isinstance(error, Exception):
            return self.placed(failed(self.lease, error, self.policy, now()))
        logger.error(
            "%s %s: what the action changed can not be saved.",
            self.source.model._meta.label,
            self.claim.row.pk,
            exc_info=error,
        )
        return outcome

    def write(self, outcome: Outcome, snapshot: Snapshot | None) -> bool:
        """Write an outcome if the task is still ours; return whether it was.

        Can be repeated: once written, it finds that the task is not ours any more.
        """
        # Once more where its claim may not have come to this node of a cluster yet.
        return self.write_once(outcome, snapshot) or (
            self.engine.patiently(self.engine.catch_up, reconnect=True) and self.write_once(outcome, snapshot)
        )

    def write_once(self, outcome: Outcome, snapshot: Snapshot | None) -> bool:
        task = self.task
        if self.is_deleted_by_action():
            return False
        changed = [] if snapshot is None else snapshot.changed()
        before = self.to_put_back(outcome, snapshot)
        if task is None or snapshot is None or (not changed and is_plainly_saved(self.source.model)):
            write_status = self.write_status if self.waits else self.write_status_if_free
            return self.engine.patiently(functools.partial(write_status, outcome, before), reconnect=True)
        # A save() that is rolled back leaves its traces on the instance; each try begins without them.
        as_left = dict(task.__dict__)
        write = functools.partial(self.write_task, outcome, before, task, as_left, changed)
        return self.engine.patiently(write, reconnect=True)

    def to_put_back(self, outcome: Outcome, snapshot: Snapshot | None) -> Values:
        """Return the values from before the claim that giving the task back restores.

        Of the fields that the claim has set those that the action has not changed: its changes are saved.
        """
        if outcome.ending != "release" or not self.claim.row.before:
            return {}
        before = self.source.by_field(self.claim.row.before)
        if snapshot is None:
            return before
        return {field: value for field, value in before.items() if snapshot.is_as_claimed(field)}

    def write_status_if_free(self, outcome: Outcome, before: Values) -> bool:
        with self.engine.transaction():
            self.refuse_to_wait()
            return self.write_status(outcome, before)

    def refuse_to_wait(self) -> None:
        """Lock the row within the open transaction; raise if somebody else has locked it."""
        self.engine.lock_or_refuse(self.source.owner_rows().filter(pk=self.claim.row.key))

    def write_status(self, outcome: Outcome, before: Values) -> bool:
        column = self.source.error_field
        note = None if column is None else self.new_note(column, outcome)
        held = self.held
        if self.task is not None:
            set_loaded(self.task, self.source.field, outcome.status)
        return self.engine.compare_and_set(self.source, self.claim.row, held, outcome.status, note, before)

    def new_note(self, column: models.Field[Any, Any], outcome: Outcome) -> str | None:
        """Return the text for the error field; None: it stays as it is."""
        note = outcome.note
        is_known = self.snapshot is not None and note == self.snapshot.known(column)
        return None if is_known else note

    def write_task(
        self,
        outcome: Outcome,
        before: Values,
        task: M,
        as_left: dict[str, Any],
        changed: list[models.Field[Any, Any]],
    ) -> bool:
        source, column = self.source, self.source.error_field
        held = self.held
        is_saved_in_full = False
        try:
            with self.engine.transaction():
                if not self.waits:
                    self.refuse_to_wait()
                if not self.engine.compare_and_set(
                    source, self.claim.row, held, outcome.status, others=before
                ):
                    return False
                task.__dict__.clear()
                task.__dict__.update(as_left)
                set_loaded(task, source.field, outcome.status)
                if column is not None and outcome.note is not None:
                    setattr(task, column.attname, outcome.note)
                    changed = [*changed, column]
                self.engine.lock_other_tables(source, task, self.waits)
                save_merged(task, changed, source.field, source.using)
                if self.engine.is_aborted():  # Django would roll back without a word
                    raise TransactionManagementError(_WENT_ON)
                is_saved_in_full = True
        except Exception as error:
            # A hook that the save() has left for the commit fails after it; the answer to it can get lost.
            is_ended = is_saved_in_full and not self.engine.is_inside_transaction()
            if not is_ended or not self.is_recorded_despite(error, outcome):
                raise
        return True

    def conclude(self, outcome: Outcome, is_written: bool) -> None:
        """Make the instance show what the row holds, and tell who listens."""
        task, exists, stored = self.task, True, outcome.status
        if not is_written:
            exists, stored = self.read()
            is_written = (
                (exists and stored == outcome.status)  # the answer to our write was lost
                or self.is_saved_by_action(outcome)
                or self.is_deleted_by_action()
            )
        elif task is not None and is_saved(task, self.source.field):
            # Assigned by a save() or a pre_save of the user.
            stored = task.__dict__[self.source.field.attname]
        if task is not None and (exists or not is_written):
            set_loaded(task, self.source.field, stored if exists else self.lease)
        if task is not None and is_written:
            show(task, self.to_put_back(outcome, self.snapshot))
        column = self.source.error_field
        if task is not None and column is not None and is_written and outcome.note is not None:
            setattr(task, column.attname, outcome.note)
        ended = {"outcome": outcome.ending, "error": outcome.error}
        if is_written:
            self.tell(signals.task_finished, status=stored if exists else outcome.status, **ended)
        else:
            self.tell(signals.lease_lost, lease=self.lease, status=stored, **ended)

    def read(self) -> tuple[bool, Status | None]:
        """Return whether the row of the task exists, and its status."""
        return self.engine.patiently(lambda: self.engine.read(self.source, self.claim.row), reconnect=True)

    def is_saved_by_action(self, outcome: Outcome) -> bool:
        # Whatever somebody has made of the row after that.
        if outcome.ending != "assign" or self.snapshot is None:
            return False
        return outcome.status in self.snapshot.held and not self.snapshot.changed()

    def is_deleted_by_action(self) -> bool:
        # Model.delete() leaves an instance without its key.
        return self.task is not None and self.task.pk is None and not self.read()[0]

    # End

    def keep_leases_unique(self, outcome: Outcome) -> Outcome:
        """Wait, a millisecond at most, before a task goes back with an older time than its lease.

        Its next claim stamps the time of then, so that it can not come out as the same lease. If that time is
        far, as the clock was set back, the task waits for it, whatever priority its queue has chosen.
        """
        if outcome.status is not None and outcome.status.priority < self.lease.priority:
            has_come = _wait_until(self.lease.priority)
            if outcome.is_placed and not has_come:
                return replace(outcome, is_placed=False).not_before(self.lease)
        return outcome

    def let_its_time_come(self, outcome: Outcome) -> None:
        """Wait, a millisecond at most, for the time just written, so that the next call finds it due."""
        if outcome.status is not None and outcome.status.state == State.waiting:
            _wait_until(outcome.status.priority)
        if not self.is_outer:
            self.engine.give_way()

    def tell(self, signal: Signal, **arguments: Any) -> None:
        if signals.is_heard(signal, self.source.model, arguments.get("outcome")):
            self.tell_heard(signal, **arguments)

    def tell_heard(self, signal: Signal, **arguments: Any) -> None:
        """Tell, as somebody listens, see `signals.is_heard`."""
        signals.send(
            signal,
            self.source.model,
            pk=self.claim.row.pk,
            field=self.source.field.name,
            using=self.source.using,
            queue=self.source.queue_name,
            task=self.task,
            **arguments,
        )


class AsyncAttempt(Attempt[M]):
    """An attempt from asynchronous code: an event loop leads, and the steps are done in threads.

    The thread of the caller's connections claims and records, and makes this object; it has little to do for
    each task. The action goes on apart from it, so that no action waits for another. Inside a transaction of
    the caller it stays there: in any other thread it could see nothing of that.
    """

    def __init__(
        self, source: Source[M], policy: Policy, claim: Claim[M], engine: Engine | None = None
    ) -> None:
        super().__init__(source, policy, claim, engine)
        self.is_started = False
        #: Why the action is not to be called.
        self.error: BaseException | None = claim.error

    def start(self) -> AsyncAttempt[M]:
        """Take the step before the action; return the attempt."""
        self.is_started = True
        if self.task is not None:
            try:
                self.begin(self.task)
            except BaseException as error:
                self.error = error
        return self

    async def arun(
        self, action: Callable[[M], object], is_async: bool, canceled: asyncio.CancelledError | None
    ) -> M | None:
        """Take the other steps; return the task, or raise what its attempt ended with."""
        try:
            return await self._arun(action, is_async, canceled)
        finally:
            self.end_renewal()

    async def _arun(
        self, action: Callable[[M], object], is_async: bool, canceled: asyncio.CancelledError | None
    ) -> M | None:
        error = canceled or self.error
        if error is None and self.task is not None:
            act = self.await_action if is_async else self.call_action
            try:
                error, canceled = await act(action, self.task)
            except NotCalled as no_thread:
                return await self.give_back(no_thread)
        outcome, late = await in_thread(self.settle, error)
        return self.stop(outcome, canceled or late)

    async def give_back(self, error: NotCalled) -> M | None:
        """End an attempt whose action could not be called."""
        return self.stop(*await in_thread(self.settle, error, False))

    def stop(self, outcome: Outcome, canceled: asyncio.CancelledError | None) -> M | None:
        """Return the task, or raise what its attempt ended with. A cancellation goes before any error."""
        if canceled is not None and (outcome.raised is None or isinstance(outcome.raised, Exception)):
            raise canceled from outcome.raised
        if outcome.raised is not None:
            raise outcome.raised
        return self.task

    async def await_action(self, action: Callable[[M], Any], task: M) -> Kept[BaseException | None]:
        """Await an async action; return what it raised, or None."""

        async def act() -> BaseException | None:
            self.began = now()
            token = running.set(self)
            try:
                await action(task)
            except GeneratorExit:  # nobody will resume this coroutine: nobody could record an outcome
                raise
            except BaseException as error:
                return error
            finally:
                with suppress(ValueError):  # closed from another context
                    running.reset(token)
            return None

        if self.is_outer:
            return await act(), None
        return await await_with_own_thread(act(), self.restore_this_connection)

    async def call_action(self, action: Callable[[M], object], task: M) -> Kept[BaseException | None]:
        """Call a synchronous action; return what it raised, or None."""

        def act() -> BaseException | None:
            self.engine = engine_for(self.source.using)  # that of this thread
            error = self.call(action, task)
            if error is not None and self.engine.locks_by_reading:  # for another thread, which is to write
                end_queries_of(error)
            return error

        return await self.in_thread_of_action(act)

    async def in_thread_of_action(self, function: Callable[[], T]) -> Kept[T]:
        return await (in_thread if self.is_outer else call_in_own_thread)(function)

    def restore_this_connection(self, error: BaseException | None) -> BaseException | None:
        """Do so in the thread of the action. In that of the caller it could be a transaction of others."""
        self.engine = engine_for(self.source.using)
        return self.restore_connection(error)

    def may_be_of_status_alone(self, error: BaseException | None, engine: Engine) -> bool:
        if not self.is_started:
            return False
        self.close()
        return super().may_be_of_status_alone(error, engine)

    def settle(self, error: BaseException | None, is_called: bool = True) -> Outcome:
        """Take the steps after the action, or give the task back if that was not called."""
        if not self.is_started:
            self.start()
        self.close()
        if not is_called:
            self.decided = Outcome("release", self.claim.row.status, error)
        outcome = super().settle(error)
        self.let_its_time_come(outcome)
        return outcome


class AtomicAttempt(Attempt[M]):
    """An attempt in one transaction, which begins with a lock on the row and ends with the outcome.

    What the action does to the database of the task is committed together with its success, or not at
    all. While the transaction is open its lock is the lease: whoever would recover the task passes over it.

    In a cluster the other nodes do not see a lock. There the lease is renewed while the transaction is open,
    and the outcome at its end, under the lease, is what locks the row. Of two nodes that have changed one
    row the cluster lets one commit. The other one's transaction is rolled back, where a single server would
    have let it wait; so it is begun once more, for a while, and that is no failure.
    """

    def __init__(
        self, source: Source[M], policy: Policy, claim: Claim[M], engine: Engine | None = None
    ) -> None:
        super().__init__(source, policy, claim, engine)
        #: Has the database said so? It may have committed without our hearing of it.
        self.is_committed = False
        #: Is the row locked while the action runs, and nobody can change it?
        self.is_locked = True
        #: What the action has made of the row by other ways than its instance.
        self.made: set[Status | None] = set()
        #: What is to be committed, or was, once the action has returned.
        self.success: _Success | None = None

    @property
    def held(self) -> set[Status | None]:
        return super().held | self.made

    def process(self, action: Callable[[M], object]) -> Outcome:
        if self.task is None:
            return super().process(action)
        return self.act_and_record(action, self.task)

    def may_be_of_status_alone(self, error: BaseException | None, engine: Engine) -> bool:
        return False  # what was committed, or not, is to be found out first

    def act_and_record(self, action: Callable[[M], object], task: M) -> Outcome:
        try:
            ended = self.act_patiently(action, task, self.begin(task))
            if isinstance(ended, Outcome):
                return ended
            if not self.is_outer and self.engine.is_inside_transaction():
                raise TransactionManagementError(
                    "A hook of the commit returned in the middle of a transaction, which was rolled back. "
                    "Leave every transaction that a hook begins."
                )
        except BaseException as error:
            if self.decided is not None:  # before the action was called, but not written
                raise
            return self.fail(error)
        finally:
            self.close()
            self.end_renewal()
        self.conclude(ended.outcome, is_written=True)
        return ended.outcome

    def act_patiently(self, action: Callable[[M], object], task: M, snapshot: Snapshot) -> _Success | Outcome:
        """Act and commit, again while another node is faster; return the outcome if the task is not ours."""
        deadline = time.monotonic() + self.engine.patience
        while True:
            try:
                opened = self.engine.patiently(self.hold, reconnect=True)
            except Error as unavailable:
                self.decided = Outcome("release", self.claim.row.status, unavailable)
                return self.record(self.decided)
            if opened is None:
                return self.lose(Outcome("release", self.claim.row.status))
            transaction_of_ours, place = opened
            try:
                with transaction_of_ours:
                    self.success = self.succeed(action, task, snapshot, place)
                return self.success
            except _Taken as taken:
                return self.lose(taken.outcome)
            except Error as conflict:
                if not self.is_overruled(conflict) or time.monotonic() > deadline:
                    raise
                self.log_conflict(conflict)
            self.restore_own_connection()
            self.undo()
            self.success = None
            self.resume_renewal()

    def is_overruled(self, error: Error) -> bool:
        """Say whether the transaction was rolled back for that of another node, and can be begun again."""
        return not self.is_outer and not self.is_committed and self.engine.is_overruled(error)

    def log_conflict(self, conflict: Error) -> None:
        logger.debug(
            "%s %s: its action is begun once more, as another node of the cluster was faster: %s",
            self.source.model._meta.label,
            self.claim.row.pk,
            conflict,
        )

    def hold(self) -> tuple[ExitStack, Place] | None:
        """Open the transaction, with the row locked under our lease; None if that is not ours any more."""
        engine = self.engine
        self.is_locked = self.is_outer or not (engine.passes_over_locked_rows and engine.is_of_cluster())
        if not self.is_locked and not self.is_seen_as_ours():
            return None
        if self.is_locked:
            # From here on the lock is the lease; where a renewal waits for it, both wait for each other.
            self.end_renewal()
        try:
            with ExitStack() as stack:
                stack.enter_context(transaction.atomic(using=self.source.using))
                if not self.is_locked or self.engine.hold(self.source, self.claim.row, self.leases):
                    if not self.is_outer:
                        # Before any hook of the action, as none is called after one that fails.
                        transaction.on_commit(self.note_commit, using=self.source.using, robust=True)
                    place = self.engine.mark()
                    self.watch_lock()
                    return stack.pop_all(), place
        except Error:  # it is tried again
            self.resume_renewal()
            raise
        return None

    def watch_lock(self) -> None:
        """Have the lease renewed once the lock is gone: the server may end our session behind our back."""
        if self.is_locked and self.renewal is not None and self.engine.passes_over_locked_rows:
            self.renewal.watch()

    def is_seen_as_ours(self) -> bool:
        """Say whether the row is under our lease, which may be renewed just now."""
        before = set(self.leases)
        is_ours = self.engine.read(self.source, self.claim.row)[1] in before | self.leases
        return is_ours or (self.engine.catch_up() and self.read()[1] in before | self.leases)

    def is_seen_as_ours_by_others(self) -> bool:
        """Say whether that is so without what is not committed yet; our lease is not renewed any more."""

        def read() -> tuple[bool, Status | None]:
            return engine_for(self.source.using).read(self.source, self.claim.row)

        return call_apart(read)[1] in self.leases

    def note_commit(self) -> None:
        self.is_committed = True

    def succeed(self, action: Callable[[M], object], task: M, snapshot: Snapshot, place: Place) -> _Success:
        """Act, and write the success; raise whatever is none, so that all is rolled back."""
        with self.same_transaction(place):
            error = self.call_it(action, task)
            if error is not None:
                raise error
        self.end_renewal()  # else it could find the success, which nobody knows of yet
        outcome = self.decide(None)
        if outcome.error is not None:
            raise outcome.error
        exists = True
        if not self.write_success(outcome, snapshot):
            if not self.is_locked and not self.is_seen_as_ours_by_others():
                raise _Taken(outcome)
            # The row is ours, so this was the action, by other ways than its instance: it has deleted what
            # the task belongs to, or used QuerySet.update(). As everything it wrote, that is to stand.
            exists, made = self.read()
            if exists:
                outcome = assigned(made, self.source.field.null)
                self.made = {made}
                self.write_success(outcome, snapshot)
        status = outcome.status
        if is_saved(task, self.source.field):  # by a save() or a pre_save of the user, instead
            status = task.__dict__[self.source.field.attname]
        snapshot.prepare_commit()
        return _Success(outcome, (True, status) if exists else (False, None), snapshot)

    def write_success(self, outcome: Outcome, snapshot: Snapshot) -> bool:
        self.keep_leases_unique(outcome)
        with self.same_transaction(self.engine.mark()):  # a save() of the model's own may misuse it, too
            return self.write(outcome, snapshot)

    @contextmanager
    def same_transaction(self, place: Place) -> Iterator[None]:
        """Let code of others do its work in our transaction, and raise if it does not leave it as it was."""
        try:
            yield
        finally:
            was_left_open = self.engine.return_to(place)
        if not self.engine.is_at(place):
            raise TransactionManagementError(
                "The action closed its connection, or left the transaction that it ran in, so nobody knows "
                "what it wrote. With atomic=True leave both alone."
            )
        if was_left_open:
            raise TransactionManagementError(_LEFT_OPEN)
        if self.engine.is_aborted():
            raise TransactionManagementError(_WENT_ON)

    def fail(self, error: BaseException) -> Outcome:
        """Record an attempt that was rolled back, unless it was committed despite its error."""
        self.end_renewal()
        self.restore_own_connection()
        if self.success is not None and self.is_committed:  # one of its hooks has failed
            outcome = self.confirm(self.success, error)
        else:
            self.undo()
            self.failure = error
            self.decided = self.decide(error)
            outcome = self.record(self.decided)
        if outcome.error is None and not isinstance(error, Exception):  # Ctrl-C after the commit
            raise error
        return outcome

    def record(self, outcome: Outcome) -> Outcome:
        """Write the outcome in a transaction of its own, or find that the success was committed after all.

        The row tells, whenever that can be asked: it does not hold the lease any more, so that nothing is
        written. To ask before is not enough, as the server may be about to commit.
        """
        self.end_renewal()
        outcome, is_written = self.write_or_fail(outcome)
        if not is_written and self.success is not None and self.read() == self.success.stored:
            return self.confirm(self.success, self.failure)
        self.conclude(outcome, is_written)
        return outcome

    def confirm(self, success: _Success, error: BaseException | None) -> Outcome:
        """Tell of a success that was committed, although its commit ended with an error."""
        success.snapshot.confirm_commit()
        self.log_recorded(error)
        self.conclude(success.outcome, is_written=True)
        return success.outcome

    def lose(self, dropped: Outcome) -> Outcome:
        """Tell that somebody has taken the task away before the action could begin."""
        self.restore_own_connection()
        self.undo()
        self.conclude(dropped, is_written=False)
        return dropped

    def restore_own_connection(self) -> None:
        """Leave no transaction open, unless it is the caller's."""
        if not self.is_outer:
            self.engine.restore_connection()

    def undo(self) -> None:
        """Make the instance what it was before the action, and hold nothing that was made of the row."""
        self.made = set()
        if self.snapshot is not None:
            self.snapshot.undo()


class _Taken(Exception):  # noqa: N818
    """Somebody has taken the task away while its action ran, so that this outcome is dropped."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


class _Success(NamedTuple):
    """What has come to pass if the transaction is committed."""

    outcome: Outcome
    stored: tuple[bool, Status | None]
    """What `read` finds then."""
    snapshot: Snapshot


def _call(action: Callable[[M], object], task: M) -> BaseException | None:
    try:
        result = action(task)
    except BaseException as error:
        return error
    if result is None:
        return None
    if inspect.iscoroutine(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        if not inspect.isasyncgen(result):
            result.close()
        kind = type(result).__name__.replace("_", " ")
        cure = " Give arun() the async function itself." if kind == "coroutine" else ""
        return TypeError(f"The action {action!r} returned a {kind}, which nobody runs.{cure}")
    return None


def _wait_until(priority: int) -> bool:
    """Wait for the time that a priority spells if it is about to come; return whether it has come."""
    moment = priority_to_datetime(priority)
    for _ in range(_LOOKS):
        if moment is None or not ZERO_SECS < moment - now() < _SOON:
            break
        time.sleep(0.0001)
    return moment is None or moment <= now()
