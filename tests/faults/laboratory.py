"""The laboratory: workers, humans and mishaps in any order, on a real database, against what must hold.

Hypothesis makes up the order. Several workers claim, renew, end and recover tasks; meanwhile humans edit,
enqueue, delete; time passes; an operation is held up at a fault point while others go on, or loses its
connection there, or dies with its worker. After each step all rows are read, and each change has to be one
that the operation which was running may make: the methods `explain_...` are the model. At the end everybody
is dead, and what is left has to be recovered and worked off.

What is assumed, as no queue on this number can do without it:

* a person takes more than a millisecond: who sets a status by hand does so at a later time than that of any
  lease of the row;
* while a claim is on its way from the client to the server, no task that was claimed goes back to waiting
  under a number below its lease (by hand, or given back), see `Laboratory.is_a_claim_on_its_way`;
* a clock that is set back finds no such task either.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import itertools
import logging
from contextlib import contextmanager
from typing import NamedTuple

from django.db import InterfaceError, OperationalError, connection
from django.test import override_settings
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

import modelqueue
from modelqueue import Abort, Cancel, Retry, State, Status, clock, conf, execution, verbs
from modelqueue.attempts import AtomicAttempt, Attempt
from modelqueue.fields import set_loaded
from modelqueue.outcomes import Policy
from modelqueue.source import Source
from modelqueue.status import ZERO_SECS, datetime_to_int, priority_to_datetime
from tests.actions import MILLISECOND, SECOND, Clock
from tests.faults.operations import DIES, GOES_ON, IS_HELD_UP, LOSES_CONNECTION, Crew, Operation, Stuck
from tests.faults.points import MOMENTS, STEPS
from tests.testapp.models import Attachment, Paper

# The invariants
ONE_OWNER = "a task that is claimed was waiting, and has one owner"
UNIQUE = "no lease is used twice"
FORWARD = "the time of a lease never goes back"
NOT_LATE = "no outcome of a lost lease is stored"
NOT_RENEWED = "a renewal changes what is held and nothing else"
LIVE = "only what has expired is recovered"
RIGHT = "an outcome is what the action ended with, and its attempts are counted right"
EDITS = "what others have edited stands"
STAYS = "a row stays, and one that was deleted stays away"
TRUE = "a worker is told what is so"
NO_WAIT = "nobody waits for a lock"
WORKED_OFF = "nothing is lost: all is worked off in the end"
STILL = "nothing changes by itself"

TIMEOUT = 10 * SECOND
POLICY = Policy.of(retry=2, timeout=TIMEOUT, delay=ZERO_SECS)
MOST_ROWS = 3
WORKERS = 3
LOCK_TIMEOUT = 2  # seconds, of the humans


class Violation(AssertionError):  # noqa: N818
    """An invariant does not hold."""

    def __init__(self, invariant, detail):
        super().__init__(f"{invariant}: {detail}")
        self.invariant = invariant


class Failure(Exception):  # noqa: N818
    """What an action raises that fails."""


class Row(NamedTuple):
    status: Status
    title: str  # edited by humans
    pages: int  # written by actions
    error: str


class Held:
    """What a worker knows of a task that it has claimed."""

    def __init__(self, worker, pk, lease):
        self.worker = worker
        self.pk = pk
        self.leases = {lease}
        self.claim = None

    def __repr__(self):
        return f"claim of {self.pk} by {self.worker}"


class RenewedAttempt(Attempt):
    """That of a worker which has two leases of a task, as it does not know whether its renewal was stored."""

    leases: set[Status]

    @property
    def held(self):
        return super().held | self.leases


class TickingClock(Clock):
    """Stands still, but each look at it takes a tenth of a millisecond, lest who waits for it waits on."""

    tick = MILLISECOND / 10

    def __call__(self):
        moment = self.moment
        self.moment += self.tick
        return moment


ENDINGS = ["returns", "retries", "aborts", "cancels", "fails", "is canceled", "assigns"]
RAISED = {
    "retries": Retry,
    "aborts": Abort,
    "cancels": Cancel,
    "fails": Failure,
    "is canceled": asyncio.CancelledError,
}
ASSIGNED = Status.waiting(0)
#: They put a task back under a number that may be below its lease.
BACKWARD = {"is canceled", "assigns"}


class Event(NamedTuple):
    """What happens next: a method of the laboratory and its arguments."""

    name: str
    arguments: dict

    def __repr__(self):
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.name}({arguments})"


# Few draws for each event: they cost as much as all the rest.
_number = st.integers(0, 5)  # of a worker, a row ...: the remainder counts
_fates = [IS_HELD_UP, IS_HELD_UP, IS_HELD_UP, LOSES_CONNECTION, DIES]
_points = list(itertools.product(MOMENTS, _fates, [1, 1, 1, 2]))
_fault = st.sampled_from([None] * (len(_points) // 2) + _points)
_action = st.sampled_from(list(itertools.product(ENDINGS, [False, True], [False, True])))
_state = st.sampled_from(["created", "waiting", "waiting", "finished", "canceled"])

#: How often each event is tried, and its arguments.
EVENTS = {
    "claim": (4, {"worker": _number, "limit": st.integers(1, 2), "fault": _fault}),
    "renew": (4, {"worker": _number, "fault": _fault}),
    "recover": (4, {"worker": _number, "fault": _fault}),
    "end": (6, {"worker": _number, "action": _action, "in_hold": st.booleans(), "fault": _fault}),
    "run": (2, {"worker": _number, "action": _action, "step": st.sampled_from(STEPS), "fault": _fault}),
    "resume": (5, {"worker": _number, "fate": st.sampled_from([GOES_ON, GOES_ON, LOSES_CONNECTION, DIES])}),
    "die": (1, {"worker": _number}),
    "time_passes": (5, {"by": st.sampled_from([MILLISECOND, 4 * SECOND, *[TIMEOUT + SECOND] * 2])}),
    "clock_is_set_back": (1, {"by": st.integers(1, 3)}),
    "add": (1, {"is_first": st.booleans()}),
    "edit": (3, {"row": _number}),
    "set_status": (3, {"row": _number, "state": _state, "is_first": st.booleans()}),
    "enqueue": (2, {"row": _number, "is_first": st.booleans()}),
    "delete": (1, {"row": _number}),
    "attach": (2, {"row": _number}),
    "load": (1, {"row": _number}),
    "save": (1, {"row": _number}),
}


def events(weights, faults):
    """What can happen next, each as often as it says above or in `weights`, with those faults if it can."""
    made = []
    for name, (weight, arguments) in EVENTS.items():
        if "fault" in arguments and faults is not None:
            arguments = {**arguments, "fault": st.sampled_from(faults)}
        event = st.builds(Event, st.just(name), st.fixed_dictionaries(arguments))
        made += [event] * weights.get(name, weight)
    return st.sampled_from(made).flatmap(lambda event: event)


class Laboratory(RuleBasedStateMachine):
    """Made by `search`, which adds the two rules: `begin`, and one step for all events.

    One rule, as Hypothesis takes about half of the rules out of each example, and a search that never claims
    finds nothing.
    """

    crew: Crew

    # Set up and tear down

    def __init__(self):
        super().__init__()
        Attachment.objects.all()._raw_delete("default")
        Paper.objects.all()._raw_delete("default")
        self.now = TickingClock()
        self.used_clock = clock.use(self.now)
        self.used_clock.__enter__()
        self.engine = None
        self.workers = self.crew.workers
        self.violation = None
        self.source = Source.of(Paper.objects, "status", "error")
        self.rows = {}
        self.owners = {}  # by row: who got which lease, ever
        self.children = {}
        self.loaded = {}
        self.edits = 0
        self.operation = None

    def begin(self, is_portable, count):
        self.engine = override_settings(
            MODELQUEUE={"ENGINE": "portable" if is_portable else conf.get("ENGINE")}
        )
        self.engine.enable()
        for _ in range(count):
            self.add(is_first=False)

    def teardown(self):
        try:
            if self.violation is None and self.engine is not None:
                self.work_off()
        finally:
            self.let_all_die()
            if self.engine is not None:
                self.engine.disable()
            self.used_clock.__exit__(None, None, None)

    def let_all_die(self):
        """Those that are held up first: others may wait for their locks."""
        operations = [worker.operation for worker in self.held_up()]
        for operation in sorted(operations, key=lambda operation: not operation.is_held_up):
            operation.leave()
        for worker in self.workers:
            worker.operation = None
            worker.claims.clear()

    def happen(self, event):
        if "fault" in event.arguments and self.who_locks_neighbours():
            event = Event("resume", {"worker": 0, "fate": GOES_ON})
        getattr(self, event.name)(**event.arguments)

    # Time

    def time_passes(self, by):
        self.now.move(by)

    def clock_is_set_back(self, by):
        if not self.held_up() and not self.is_any_below_its_lease():
            self.now.move(-by * MILLISECOND)

    def is_any_below_its_lease(self):
        return any(
            row.status.priority < max(self.owners[pk]).priority
            for pk, row in self.rows.items()
            if self.owners[pk]
        )

    def let_a_moment_pass(self):
        """Be later than all leases."""
        latest = max([lease.priority for owners in self.owners.values() for lease in owners], default=0)
        if latest >= datetime_to_int(self.now.moment):
            self.now.moment = priority_to_datetime(latest) + MILLISECOND

    def is_a_claim_on_its_way(self):
        """Say whether a claim has looked at the clock, and its statement has perhaps not arrived yet.

        It stamps a time that is past by then. A task which was claimed meanwhile, and has gone back to
        waiting under a lower number, would get a lease below its last one.
        """
        return any(worker.operation.step in ("claim", "run") for worker in self.held_up())

    # Workers

    def claim(self, worker, limit, fault):
        if not self.idle():
            self.resume(worker, GOES_ON)
            return

        def work(operation):
            return verbs.claim(self.source, limit)

        self.start(worker, "claim", work, fault)

    def renew(self, worker, fault):
        owners = [worker for worker in self.idle() if worker.claims]
        if not owners:
            self.claim(worker, 1, fault)
            return
        worker = self.one_of(owners, worker)

        def work(operation):
            return verbs.renew(self.source, {pk: held.leases for pk, held in worker.claims.items()})

        self.start(worker, "renewal", work, fault)

    def recover(self, worker, fault):
        if self.idle():
            self.start(worker, "recovery", lambda operation: verbs.recover(self.source, POLICY), fault)

    def end(self, worker, action, in_hold, fault):
        ending, changes, atomic = action
        locked = self.locked()
        able = [worker for worker in self.idle() if worker.claims.keys() - locked]
        if not able:
            self.claim(worker, 1, None)
            return
        worker = self.one_of(able, worker)
        held = worker.claims[min(worker.claims.keys() - locked)]
        leases = set(held.leases)
        if atomic and len(leases) > 1:
            self.renew(worker.number, None)
            return

        def work(operation):
            # As if the renewals had happened while the action was running.
            claim = dataclasses.replace(held.claim, lease=max(leases))
            set_loaded(claim.task, self.source.field, claim.lease)
            attempt = (AtomicAttempt if atomic else RenewedAttempt)(self.source, POLICY, claim)
            attempt.leases = leases
            operation.held = held
            return attempt.run(lambda task: self.act(operation, task))

        options = {"ending": ending, "changes": changes, "atomic": atomic}
        self.start(worker, "outcome", work, fault, "hold" if atomic and in_hold else "outcome", **options)

    def run(self, worker, action, step, fault):
        ending, changes, atomic = action

        def recovered():
            operation.is_recovering = True
            self.observe(operation)
            operation.is_recovering = False

        def act(task):
            self.observe(operation)  # all that comes next is an outcome
            operation.step = "outcome"
            operation.held = operation.taken.get(task.pk)
            self.act(operation, task)

        def work(operation):
            execution._last_recovery.clear()  # each recovers first
            rows, limits = Paper.objects, {"retry": POLICY.retry, "timeout": TIMEOUT}
            return modelqueue.run(rows, "status", act, **limits, error_field="error", atomic=atomic)

        if not self.idle():
            return
        options = {"ending": ending, "changes": changes, "atomic": atomic}
        operation = self.new("run", work, fault, step, **options)
        operation.recovered = recovered
        self.launch(self.one_of(self.idle(), worker), operation)

    def act(self, operation, task):
        """The action."""
        if operation.ending in BACKWARD and self.is_a_claim_on_its_way():
            operation.ending = "returns"
        if operation.changes:
            task.pages += 1
        operation.pages = task.pages
        if operation.ending == "assigns":
            task.status = ASSIGNED
        if operation.ending in RAISED:
            raise RAISED[operation.ending]

    def resume(self, worker, fate):
        free = [worker for worker in self.held_up() if self.can_go_on(worker.operation)]
        if free:
            worker = self.one_of(free, worker)
            self.operation = worker.operation
            with self.watching():
                has_no_other = connection.vendor == "sqlite" and fate == LOSES_CONNECTION
                worker.operation.resume(GOES_ON if has_no_other else fate)
            self.look_after(worker)

    def die(self, worker):
        """A worker is killed between two operations; another takes its place."""
        owners = [worker for worker in self.idle() if worker.claims]
        if owners:
            self.one_of(owners, worker).claims.clear()

    def idle(self):
        return [worker for worker in self.workers if worker.operation is None]

    def held_up(self):
        return [worker for worker in self.workers if worker.operation is not None]

    def one_of(self, things, number):
        return things[number % len(things)]

    def start(self, worker, step, work, fault, point=None, **options):
        if isinstance(worker, int):
            worker = self.one_of(self.idle(), worker)
        self.launch(worker, self.new(step, work, fault, point or step, **options))

    def new(self, step, work, fault, point, **options):
        moment, fate, nth = fault or (None, GOES_ON, 1)
        if (
            connection.vendor == "sqlite"
        ):  # it has no connection to lose, and who is held up must hold no lock
            fate = IS_HELD_UP if fate == LOSES_CONNECTION else fate
            if (moment, fate) == ("before the commit", IS_HELD_UP):
                moment = "before the statement"
        operation = Operation(step, work, (point, moment) if fault else None, fate, nth)
        operation.taken = {}
        operation.held = None
        operation.stored = False
        operation.locks = set()
        vars(operation).update(options)
        return operation

    def launch(self, worker, operation):
        operation.worker = worker
        self.operation = operation
        with self.watching():
            worker.start(operation)
        self.look_after(worker)

    def watching(self):
        return _Watching(self)

    def look_after(self, worker):
        """See what an operation has done so far; if it is done, whether it knows."""
        operation = worker.operation
        self.observe(operation)
        self.raise_violation()
        if not operation.is_done:
            operation.locks = self.locks_of(operation)
            return
        worker.operation = None
        if operation.is_dead:
            worker.claims.clear()
            return
        self.check_error(operation)
        if operation.step == "claim" and operation.error is None:
            self.check_claims(worker, operation)
        elif operation.step == "renewal" and operation.error is None:
            self.check_renewal(worker, operation)
        elif operation.step == "outcome":
            self.check_told(operation)
            if worker.claims.get(operation.held.pk) is operation.held:
                del worker.claims[operation.held.pk]
        self.check_owners()

    def check_error(self, operation):
        error = operation.error
        if isinstance(error, Violation):
            raise error
        expected = tuple(kind for kind in (RAISED.get(getattr(operation, "ending", None)),) if kind)
        if operation.arrived and operation.fate == LOSES_CONNECTION:
            expected += (OperationalError, InterfaceError)
        if error is not None and not isinstance(error, expected):
            raise error

    def check_claims(self, worker, operation):
        claimed = {claim.row.key: claim for claim in operation.result}
        # Two that claim in one millisecond stamp the same number, which so changes nothing.
        others = claimed.keys() - operation.taken.keys()
        self.require(not others, ONE_OWNER, f"{worker} has got {others}, but not claimed them")
        missing = operation.taken.keys() - claimed.keys()
        self.require(not missing, TRUE, f"{worker} has claimed {missing}, but not got them")
        for pk, claim in claimed.items():
            held = operation.taken[pk]
            self.require(held.leases == {claim.lease}, TRUE, f"{claim} is not {held.leases}")
            held.claim = claim
            worker.claims[pk] = held

    def check_renewal(self, worker, operation):
        for pk in operation.result.renewed:
            held = worker.claims[pk]
            known = [self.owners[pk].get(lease) for lease in held.leases]
            self.require(known == [held], TRUE, f"{held} was renewed to {held.leases}, which is {known}")
        for pk in [] if operation.was_held_up else operation.result.lost:
            held = worker.claims[pk]
            row = self.rows.get(pk)
            self.require(row is None or row.status not in held.leases, TRUE, f"{held} is not lost")

    def check_told(self, operation):
        """See whether the worker knows if its outcome is stored: what it is told is what can be read."""
        if operation.was_held_up:
            return
        held, row = operation.held, self.rows.get(operation.held.pk)
        told = [name for name, _ in operation.told]
        if operation.stored:
            self.require(told == ["finished"], TRUE, f"{held} has ended, but {operation.told}")
        elif told == ["finished"]:
            # Somebody else's can be the same: a recovery in the same millisecond, or a decision by hand.
            is_so = row and row.status == operation.told[0][1]
            self.require(is_so, TRUE, f"an outcome of {held} is not stored, but {operation.told}: {row}")

    def check_owners(self):
        for pk, row in self.rows.items():
            holders = [
                worker
                for worker in self.workers
                if pk in worker.claims and row.status in worker.claims[pk].leases
            ]
            self.require(len(holders) < 2, ONE_OWNER, f"{holders} hold {pk}")

    # Locks: what would wait for a worker that is held up, and may, is not tried

    def locks_of(self, operation):
        step, moment = operation.point
        has_hold = step == "outcome" and operation.atomic
        is_at_first_statement = moment == "before the statement" and operation.nth == 1 and not has_hold
        if not operation.is_inside_transaction or is_at_first_statement:
            return set()
        if operation.step == "outcome":
            return {operation.held.pk}
        if connection.vendor == "mysql":
            return set(self.rows)  # see `who_locks_neighbours`
        if operation.step == "renewal":
            return set(operation.worker.claims)
        states = {"claim": [State.waiting], "recovery": [State.working]}
        wanted = states.get(operation.step, [State.waiting, State.working])
        return {pk for pk, row in self.rows.items() if row.status.state in wanted}

    def locked(self, besides=None):
        return {
            pk
            for worker in self.held_up()
            if worker.operation is not besides
            for pk in worker.operation.locks
        }

    def can_go_on(self, operation):
        if self.who_locks_neighbours():
            return operation.worker in self.who_locks_neighbours()
        return operation.held is None or operation.held.pk not in self.locked(besides=operation)

    def who_locks_neighbours(self):
        """The workers that are held up while they may lock rows that are not their business.

        On MySQL and MariaDB a locking read of a range of an index locks the entry after its end, too. SKIP
        LOCKED by primary key does not see that, and the UPDATE of its status waits.
        """
        if connection.vendor != "mysql":
            return []
        return [w for w in self.held_up() if w.operation.locks and w.operation.step != "outcome"]

    # Humans. The clock stands still for them, so that it is known what they write

    def new_title(self):
        self.edits += 1
        return f"edit {self.edits}"

    def free_row(self, number):
        """The primary key of a row that nobody has locked, or None."""
        free = sorted(self.rows.keys() - self.locked())
        return self.one_of(free, number) if free else None

    def priority(self, is_first):
        """That of a row which is to be the first, or None: the time of now."""
        return 0 if is_first and not self.is_a_claim_on_its_way() else None

    def add(self, is_first):
        if len(self.rows) < MOST_ROWS:
            with self.by_hand():
                status = Status.waiting(self.priority(is_first))
                paper = Paper.objects.create(status=status)
            self.rows[paper.pk] = Row(status, "", 0, "")
            self.owners[paper.pk] = {}
            self.children[paper.pk] = 0
            self.observe()

    def edit(self, row):
        if (pk := self.free_row(row)) is None:
            return
        with self.by_hand():
            title = self.new_title()
            Paper.objects.filter(pk=pk).update(title=title)
        self.expect(pk, title=title)

    def set_status(self, row, state, is_first):
        if (pk := self.free_row(row)) is None:
            return
        self.let_a_moment_pass()
        with self.by_hand():
            paper = Paper.objects.get(pk=pk)
            priority = self.priority(is_first)
            paper.status = status = Status.combine(state, self.now() if priority is None else priority, 0)
            paper.save()
        self.expect(pk, status=status)

    def enqueue(self, row, is_first):
        if (pk := self.free_row(row)) is None:
            return
        self.let_a_moment_pass()
        before = self.rows[pk].status
        with self.by_hand():
            is_due = before.state == State.waiting and before <= Status.waiting(self.now(), 9)
            priority = self.priority(is_first)
            new = Status.waiting(priority)
            modelqueue.enqueue(Paper.objects.filter(pk=pk), "status", priority=priority)
        is_left = before.state == State.working or (is_due and priority is None)
        self.expect(pk, status=before if is_left else new)

    def delete(self, row):
        if len(self.rows) > 1 and (pk := self.free_row(row)) is not None:
            with self.by_hand():
                Paper.objects.filter(pk=pk).delete()
            del self.rows[pk], self.children[pk]
            self.observe()

    def attach(self, row):
        """Insert a child row. Its foreign key needs the task to stay: on PostgreSQL it waits for no claim."""
        is_free = connection.vendor == "postgresql"
        pk = self.one_of(sorted(self.rows), row) if is_free and self.rows else self.free_row(row)
        if pk is None:
            return
        with self.by_hand():
            Attachment.objects.create(paper_id=pk)
        self.children[pk] += 1
        self.observe()

    def load(self, row):
        """A view shows a form ..."""
        if self.rows:
            pk = self.one_of(sorted(self.rows), row)
            self.loaded[pk] = Paper.objects.get(pk=pk)

    def save(self, row):
        """... and saves it later: all its fields, the status excepted."""
        free = sorted(self.loaded.keys() & self.rows.keys() - self.locked())
        if free:
            paper = self.loaded[self.one_of(free, row)]
            paper.title = title = self.new_title()
            with self.by_hand():
                paper.save()
            self.expect(paper.pk, title=title, pages=paper.pages, error=paper.error)

    def by_hand(self):
        return _Human(self)

    def expect(self, pk, **values):
        self.rows[pk] = self.rows[pk]._replace(**values)
        self.observe()

    # What holds

    def require(self, condition, invariant, detail):
        if not condition:
            self.violation = self.violation or Violation(invariant, detail)
            self.raise_violation()

    def raise_violation(self):
        # What is found in the thread of a worker gets lost in its action.
        if self.violation is not None:
            raise self.violation

    def observe(self, operation=None):
        """Read all rows; ask the operation that was running to explain what is different."""
        stored = {
            pk: Row(Status(status), *values)
            for pk, status, *values in Paper.objects.values_list("pk", "status", "title", "pages", "error")
        }
        before, self.rows = self.rows, stored
        for pk in before.keys() | stored.keys():
            old, new = before.get(pk), stored.get(pk)
            if old != new:
                self.require(old and new, STAYS, f"{pk} was {old}, is {new} after {operation}")
                self.require(operation is not None, STILL, f"{pk} is {new} instead of {old}")
                getattr(self, f"explain_{operation.step}")(operation, pk, old, new)

    def explain_claim(self, operation, pk, old, new):
        detail = f"{operation.worker} has claimed {pk}, which was {old}, and is {new}"
        self.require(old.status.state == State.waiting, ONE_OWNER, detail)
        self.require(old.status <= Status.waiting(self.now(), Status.max_attempts), ONE_OWNER, detail)
        self.require(new.status.state == State.working, RIGHT, detail)
        self.require(new.status.attempts == old.status.attempts, RIGHT, detail)
        self.require(new[1:] == old[1:], EDITS, detail)
        self.require(new.status not in self.owners[pk], UNIQUE, f"{detail}: {self.owners[pk]}")
        latest = max(self.owners[pk], key=lambda lease: lease.priority, default=None)
        self.require(latest is None or new.status.priority >= latest.priority, FORWARD, f"{detail}: {latest}")
        held = Held(operation.worker, pk, new.status)
        self.owners[pk][new.status] = operation.taken[pk] = held

    def explain_renewal(self, operation, pk, old, new):
        detail = f"{operation.worker} has renewed {pk}, which was {old}, and is {new}"
        held = operation.worker.claims.get(pk)
        self.require(held and self.owners[pk].get(old.status) is held, NOT_RENEWED, detail)
        self.require(new.status.state == State.working, NOT_RENEWED, detail)
        self.require(new.status.attempts == old.status.attempts, RIGHT, detail)
        self.require(new[1:] == old[1:], EDITS, detail)
        self.require(new.status.priority >= old.status.priority, FORWARD, detail)
        self.require(self.owners[pk].get(new.status, held) is held, UNIQUE, detail)
        self.owners[pk][new.status] = held

    def explain_recovery(self, operation, pk, old, new):
        detail = f"{operation.worker} has recovered {pk}, which was {old}, and is {new}"
        self.require(old.status.state == State.working, LIVE, detail)
        expired = Status.working(self.now() - TIMEOUT, Status.max_attempts)
        self.require(old.status <= expired, LIVE, detail)
        self.require(new.status.state == self.state_after_failure(old.status), RIGHT, detail)
        self.require(new.status.attempts == old.status.attempts + 1, RIGHT, detail)
        self.require(new.status.priority >= old.status.priority, FORWARD, detail)
        self.require(new[1:3] == old[1:3] and "LeaseExpired" in new.error, EDITS, detail)

    def explain_run(self, operation, pk, old, new):
        """Before the action: a recovery, whose end a signal tells, and then a claim."""
        is_at_its_point = operation.arrived and (operation.is_held_up or operation.is_done)
        is_recovery = operation.is_recovering or (is_at_its_point and operation.point[0] == "recovery")
        explain = self.explain_recovery if is_recovery else self.explain_claim
        explain(operation, pk, old, new)

    def explain_outcome(self, operation, pk, old, new):
        held = operation.held
        detail = f"{held}, which {operation.ending}, has ended {pk}, which was {old}, and is {new}"
        self.require(held and held.pk == pk and self.owners[pk].get(old.status) is held, NOT_LATE, detail)
        is_cut_off = operation.arrived and operation.fate == LOSES_CONNECTION
        endings = [operation.ending] + ["fails"] * is_cut_off
        endings = [
            ending for ending in endings if self.is_as_after(ending, operation, old.status, new.status)
        ]
        self.require(endings, RIGHT, detail)
        pages = {operation.pages}
        if (operation.atomic and operation.ending not in ("returns", "assigns")) or not operation.changes:
            pages = {old.pages}
        if is_cut_off and "fails" in endings:
            pages.add(old.pages)
        self.require(new.title == old.title and new.pages in pages, EDITS, f"{detail}, not {pages}")
        operation.stored = True

    def is_as_after(self, ending, operation, lease, new):
        """Say whether an action that ended so leaves this status."""
        if ending == "assigns":
            return new == ASSIGNED
        if ending == "is canceled":
            row = operation.held.claim.row if operation.held.claim else None
            return (
                (new == row.status) if row else (new.state, new.attempts) == (State.waiting, lease.attempts)
            )
        state, attempts = {
            "returns": (State.finished, 1),
            "retries": (State.waiting, 0),
            "cancels": (State.canceled, 1),
        }.get(ending, (self.state_after_failure(lease), 1))
        is_later = new.priority >= lease.priority
        return (new.state, new.attempts) == (state, lease.attempts + attempts) and is_later

    def state_after_failure(self, lease):
        return State.canceled if POLICY.is_last(lease.attempts + 1) else State.waiting

    # The end

    def work_off(self):
        """All workers die; what they leave behind is recovered and worked off by one that is well."""
        while self.held_up():
            free = [worker for worker in self.held_up() if self.can_go_on(worker.operation)]
            self.operation = free[0].operation
            with self.watching():
                self.operation.resume(GOES_ON)
            self.look_after(free[0])
        for worker in self.workers:
            worker.claims.clear()
        self.now.move(TIMEOUT + SECOND)
        self.let_a_moment_pass()
        self.recover(0, None)
        with self.by_hand():
            created = Paper.objects.filter(**Status.filter("status", State.created))
            count = modelqueue.enqueue(created, "status")
            if count:
                now = Status.waiting()
                for pk, row in self.rows.items():
                    if row.status.state == State.created:
                        self.rows[pk] = row._replace(status=now)
        self.observe()
        self.now.move(SECOND)
        self.claim(0, MOST_ROWS + 1, None)
        worker = self.workers[0]
        while worker.claims:
            self.end(0, ("returns", False, False), False, None)
        left = {
            pk: row
            for pk, row in self.rows.items()
            if row.status.state not in (State.finished, State.canceled)
        }
        self.require(not left, WORKED_OFF, f"{left} are left")
        children = dict.fromkeys(self.rows, 0)
        for pk in Attachment.objects.values_list("paper_id", flat=True):
            children[pk] += 1
        self.require(children == self.children, STAYS, f"{children}, not {self.children}")


def search(
    examples,
    steps=30,
    phases=(Phase.generate, Phase.shrink),
    derandomize=True,
    portable=st.booleans(),  # noqa: B008  (a strategy has no state)
    faults=None,
    **weights,
):
    """Search that many orders for one in which an invariant does not hold; raise `Violation` if there is one.

    Args:
        derandomize: it is the same search each time.
        portable: a strategy that says whether it is the portable engine that is tried.
        faults, weights: see `events`.
    """

    def step(laboratory, event):
        laboratory.happen(event)

    limits = settings(
        max_examples=examples,
        stateful_step_count=steps,
        phases=phases,
        derandomize=derandomize,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with Crew(WORKERS) as crew, _quick_locks(), _silence():
        attributes = {
            "crew": crew,
            "begin": initialize(is_portable=portable, count=st.integers(1, 2))(Laboratory.begin),
            "step": rule(event=events(weights, faults))(step),
        }
        run_state_machine_as_test(type("Laboratory", (Laboratory,), attributes), settings=limits)


@contextmanager
def _quick_locks():
    statements = {
        "postgresql": f"SET lock_timeout = '{LOCK_TIMEOUT}s'",
        "mysql": f"SET innodb_lock_wait_timeout = {LOCK_TIMEOUT}",
    }
    with connection.cursor() as cursor:
        if connection.vendor in statements:
            cursor.execute(statements[connection.vendor])
    try:
        yield
    finally:
        connection.close()


@contextmanager
def _silence():
    """Thousands of lost leases are logged, and all are intended."""
    logger = logging.getLogger("modelqueue")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Watching:
    """Whoever waits while a worker does something for it, waits for a lock."""

    def __init__(self, laboratory):
        self.laboratory = laboratory

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Stuck):
            operation = self.laboratory.operation
            self.laboratory.require(False, NO_WAIT, f"{operation.worker} is stuck in its {operation.step}")


class _Human:
    """The clock stands still, and a lock that should not be there is an error soon."""

    def __init__(self, laboratory):
        self.laboratory = laboratory

    def __enter__(self):
        self.laboratory.now.tick = dt.timedelta(0)

    def __exit__(self, kind, error, traceback):
        self.laboratory.now.tick = TickingClock.tick
        if isinstance(error, OperationalError):
            self.laboratory.require(False, NO_WAIT, f"a human: {error}")
