"""The laboratory finds what it is made for: each fault planted here, by the invariant that it breaks."""

from __future__ import annotations

import threading

import pytest
from django.db import connection
from hypothesis import Phase
from hypothesis import strategies as st

from modelqueue import attempts
from modelqueue.attempts import Attempt
from modelqueue.engines import Engine, Renewal, base, postgresql, sqlite
from modelqueue.outcomes import Policy
from modelqueue.status import Status
from tests.faults import laboratory
from tests.faults.laboratory import search
from tests.faults.operations import IS_HELD_UP

pytestmark = pytest.mark.django_db(transaction=True)

MOST_EXAMPLES = 400


def by_key_alone(engine, source, row, old, values):
    """An UPDATE that does not compare the status."""
    rows = source.owner_rows().filter(pk=row.key)
    return rows.update(**{field.name: value for field, value in values.items()}) == 1


def unfenced(patch, owner, name):
    """Let a method, in the thread that calls it, write without comparing the status, and lock without."""
    here = threading.local()
    call, lock, update = getattr(owner, name), Engine._lock, Engine._update

    def calling(*arguments):
        before, here.is_inside = getattr(here, "is_inside", False), True
        try:
            return call(*arguments)
        finally:
            here.is_inside = before

    def locking(*arguments, **named):
        return (all_that_are_free if getattr(here, "is_inside", False) else lock)(*arguments, **named)

    def updating(*arguments):
        return (by_key_alone if getattr(here, "is_inside", False) else update)(*arguments)

    patch.setattr(owner, name, calling)
    patch.setattr(Engine, "_lock", locking)
    patch.setattr(Engine, "_update", updating)


def all_that_are_free(engine, source, candidates, with_error_field=False):
    """Lock candidates, and do not look whether they have changed since they were picked."""
    rows = engine._locked(source, source.owner_rows().filter(pk__in=[row.key for row in candidates]))
    free = {key for (key,) in rows.values_list("pk")}
    return [row for row in candidates if row.key in free]


def outcome_without_fence(patch):
    unfenced(patch, Attempt, "write")


def claim_stamped_with_the_time_of_now(patch):
    """A task that goes back and is claimed again within one millisecond gets the same lease."""

    def lease_at(moment, attempts=0):
        return Status.working(moment, attempts)

    for module in (base, postgresql, sqlite):
        patch.setattr(module, "lease_at", lease_at)


def task_given_back_before_the_time_of_its_lease(patch):
    patch.setattr(Attempt, "keep_leases_unique", lambda attempt, outcome: outcome)


def renewal_by_key_alone(patch):
    def renew(engine, source, leases, clock, note):
        with engine.transaction():
            rows = engine._locked(source, source.owner_rows().filter(pk__in=list(leases)))
            keys = [key for (key,) in rows.values_list("pk")]
            engine._stamp(source.owner_rows().filter(pk__in=keys), source.field.name, Status.working(clock()))
            stored = dict(source.owner_rows().filter(pk__in=keys).values_list("pk", source.field.name))
        for key, status in stored.items():
            leases[key] = {Status(status)}
        return Renewal(set(keys), set(), set())

    patch.setattr(Engine, "_renew_together", renew)


def recovery_too_early(patch):
    patch.setattr(Policy, "cutoff", lambda policy, moment: moment - policy.timeout / 4)


def recovery_of_what_was_renewed_meanwhile(patch):
    unfenced(patch, Engine, "_recover_together")


def outcome_by_saving_the_whole_row(patch):
    patch.setattr(attempts, "save_merged", lambda task, changed, status, using: task.save(using=using))


def claim_that_trusts_its_candidates(patch):
    """As where SKIP LOCKED gives one row to two, and nobody compares."""
    unfenced(patch, Engine, "_claim_together")


def claim_that_locks_as_a_delete_does(patch):
    """FOR UPDATE, which the foreign key of a child row waits for; FOR NO KEY UPDATE lets it pass."""
    patch.setattr(type(connection.features), "has_select_for_no_key_update", False)
    patch.setattr(postgresql, "_CLAIM", postgresql._CLAIM.replace("FOR NO KEY UPDATE", "FOR UPDATE"))


#: Claims and outcomes within a millisecond.
AT_ONCE = {"claim": 12, "end": 16, "time_passes": 1}

#: Operations that have picked their rows, and find them changed when they go on.
HELD_UP = {"faults": [("before the statement", IS_HELD_UP, 1), None], "time_passes": 9, "resume": 9}

#: Each fault, the invariants that it can break, and what to try more often than otherwise.
PLANTED = [
    (outcome_without_fence, [laboratory.NOT_LATE], {}),
    (claim_stamped_with_the_time_of_now, [laboratory.UNIQUE], AT_ONCE),
    (task_given_back_before_the_time_of_its_lease, [laboratory.UNIQUE], AT_ONCE),
    (renewal_by_key_alone, [laboratory.NOT_RENEWED], {"renew": 16}),
    (recovery_too_early, [laboratory.LIVE], {}),
    (
        recovery_of_what_was_renewed_meanwhile,
        # Where a later lease has expired by then, too, its attempts or its time are undone.
        [laboratory.LIVE, laboratory.RIGHT, laboratory.FORWARD],
        {**HELD_UP, "recover": 9, "renew": 9},
    ),
    (outcome_by_saving_the_whole_row, [laboratory.EDITS], {"claim": 9, "edit": 12, "end": 12}),
    (
        claim_that_trusts_its_candidates,
        # Where the row is waiting again by then, its attempts are undone, or a lease is repeated.
        [laboratory.ONE_OWNER, laboratory.RIGHT, laboratory.UNIQUE],
        {"claim": 12, "portable": st.just(True)},
    ),
]


# Faults of our code, not of a database: where each step takes longest the search takes ten times as long.
@pytest.mark.vendor("sqlite")
@pytest.mark.parametrize(("plant", "invariants", "options"), PLANTED)
def test_planted_fault_is_found(plant, invariants, options, monkeypatch):
    find(plant, invariants, options, monkeypatch)


@pytest.mark.db_feature("has_select_for_no_key_update")
def test_claim_that_locks_as_a_delete_does_is_found(monkeypatch):
    find(claim_that_locks_as_a_delete_does, [laboratory.NO_WAIT], {"attach": 9}, monkeypatch)


def find(plant, invariants, options, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(laboratory.Violation) as found:
        search(MOST_EXAMPLES, phases=[Phase.generate], **options)
    assert found.value.invariant in invariants
