"""What a process may claim next: turns of its queues, shared threads, limits. No database, no threads."""

import time
from types import SimpleNamespace

import pytest

from modelqueue.worker.slots import Lane, Slots


def lane(name, slots=None, is_async=False, threads=4):
    return Lane(SimpleNamespace(name=name, slots=slots, is_async=is_async), threads)


def turns(slots, count, claimed=None):
    """Take turns; each claims as many as it may, or `claimed`. Return pairs of name and limit."""
    seen = []
    for _ in range(count):
        turn = slots.next()
        seen.append((turn.lane.queue.name, turn.limit))
        slots.claimed(turn, turn.limit if claimed is None else claimed)
    return seen


def test_queue_alone_gets_all_threads():
    slots = Slots([lane("a")], 4)
    assert turns(slots, 1) == [("a", 4)]
    assert slots.running == 4


def test_queues_that_want_tasks_share_the_threads():
    slots = Slots([lane("a"), lane("b")], 4)
    assert turns(slots, 2) == [("a", 2), ("b", 2)]


def test_each_keeps_its_share():
    a, b = lane("a"), lane("b")
    slots = Slots([a, b], 2)
    assert turns(slots, 2) == [("a", 1), ("b", 1)]
    for ended, expected in [(b, "b"), (a, "a"), (b, "b")]:
        slots.freed(ended)
        assert turns(slots, 1) == [(expected, 1)]


def test_queue_that_has_more_than_its_share_leaves_the_next_thread_to_the_other():
    a, b = lane("a"), lane("b")
    slots = Slots([a, b], 4)
    slots.claimed(slots.next(), 2)
    slots.claimed(slots.next(), 0)
    assert turns(slots, 1) == [("a", 2)]
    for _ in range(2):
        slots.freed(a)
        slots.want(["b"])
        assert turns(slots, 1) == [("b", 1)]
    slots.freed(a)
    assert turns(slots, 1) == [("a", 1)]


def test_queue_takes_no_more_than_its_slots():
    slots = Slots([lane("a", slots=1), lane("b")], 4)
    assert turns(slots, 2) == [("a", 1), ("b", 3)]


def test_slots_beyond_the_threads_are_of_no_use_to_synchronous_actions():
    assert lane("a", slots=10).free == 4
    assert lane("a", slots=200, is_async=True).free == 200
    assert lane("a", is_async=True).free == 100


def test_async_queue_needs_no_thread():
    slots = Slots([lane("a"), lane("b", is_async=True)], 4)
    assert turns(slots, 3) == [("a", 4), ("b", 50), ("b", 50)]


def is_waiting(slots):
    """Say whether there is no turn now."""
    return slots.next(0.0) is None


def test_queue_whose_claim_was_not_used_up_waits_until_it_is_wanted():
    slots = Slots([lane("a")], 4)
    assert turns(slots, 1, claimed=0) == [("a", 4)]
    assert slots.running == 0
    slots.want(["a"])
    assert turns(slots, 1, claimed=1) == [("a", 4)]
    assert is_waiting(slots)


def test_wish_that_comes_during_a_claim_is_not_lost():
    slots = Slots([lane("a")], 4)
    turn = slots.next()
    slots.want(["a"])
    slots.claimed(turn, 0)
    assert turns(slots, 1) == [("a", 4)]


def test_there_is_no_turn_without_a_free_thread():
    slots = Slots([lane("a"), lane("b")], 2)
    turns(slots, 2)
    assert is_waiting(slots)


def test_recovery_comes_first_and_needs_no_slot():
    slots = Slots([lane("a"), lane("b")], 1)
    turns(slots, 1)
    slots.recover(["b"])
    turn = slots.next()
    assert (turn.lane.queue.name, turn.limit) == ("b", 0)
    assert is_waiting(slots)


@pytest.mark.parametrize("unused", [0, 1])
def test_no_more_tasks_are_claimed_than_the_process_may_run(unused):
    one = lane("a")
    slots = Slots([one], 4, most_tasks=6)
    turn = slots.next()
    slots.claimed(turn, 4 - unused)
    for _ in range(4 - unused):
        slots.freed(one)
    slots.want(["a"])
    assert turns(slots, 1) == [("a", 2 + unused)]
    slots.want(["a"])
    assert is_waiting(slots)


def test_what_a_claim_may_take_is_used_up_only_once_it_is_taken():
    """Else a process that has nothing to do, or no connection yet, would be replaced without end."""
    slots = Slots([lane("a")], 4, most_tasks=4)
    turn = slots.next()
    assert turn.limit == 4
    assert not slots.is_used_up
    slots.claimed(turn, 0)
    assert not slots.is_used_up
    slots.want(["a"])
    assert turns(slots, 1) == [("a", 4)]
    assert slots.is_used_up


def test_stop_ends_the_turns_at_once():
    slots = Slots([lane("a")], 4)
    slots.stop()
    assert slots.next() is None


def test_who_waits_for_a_turn_may_look_after_other_things_now_and_then():
    slots = Slots([lane("a")], 4)
    turns(slots, 1)
    began = time.monotonic()
    assert slots.next(0.1) is None
    assert 0.1 <= time.monotonic() - began < 5


def test_queue_that_failed_has_its_next_turn_after_its_pause_and_others_have_theirs_meanwhile():
    a, b = lane("a"), lane("b")
    slots = Slots([a, b], 4)
    failed_at = time.monotonic()
    slots.failed(slots.next(), 0.5)
    assert slots.running == 0
    for _ in range(3):
        assert turns(slots, 1)[0][0] == "b"
        for _ in range(b.running):
            slots.freed(b)
    turns(slots, 1, claimed=0)
    assert is_waiting(slots)
    assert turns(slots, 1) == [("a", 4)]  # though nobody has said that it has something due
    assert time.monotonic() - failed_at >= 0.5


def test_wish_does_not_shorten_the_pause_of_a_queue_that_failed():
    slots = Slots([lane("a")], 4)
    slots.failed(slots.next(), 60.0)
    slots.want(["a"])
    slots.recover(["a"])
    assert is_waiting(slots)


def test_claim_that_failed_uses_up_nothing_of_what_a_process_may_run():
    slots = Slots([lane("a")], 4, most_tasks=4)
    slots.failed(slots.next(), 0.0)
    assert not slots.is_used_up
    assert turns(slots, 1) == [("a", 4)]


def test_recovery_that_failed_is_done_when_the_supervisor_says_so_again():
    """Who, after an outage longer than the lease, waits until those who live have renewed theirs."""
    slots = Slots([lane("a")], 4)
    turns(slots, 1, claimed=0)
    slots.recover(["a"])
    slots.failed(slots.next(), 0.1)
    time.sleep(0.2)
    assert is_waiting(slots)
    slots.recover(["a"])
    assert slots.next().is_recovery
    assert slots.running == 0


def test_recovery_and_claims_take_turns():
    """There may be very many to recover, and very many due."""
    slots, seen = Slots([lane("a")], 4), []
    for _ in range(6):
        slots.recover(["a"])
        turn = slots.next()
        seen.append(turn.is_recovery)
        if not turn.is_recovery:
            slots.failed(turn, 0.0)  # it is wanted still
    assert seen == [True, False] * 3


def test_recovery_goes_on_where_nothing_can_be_claimed():
    slots, seen = Slots([lane("a")], 4), []
    turns(slots, 1)
    for _ in range(3):
        slots.recover(["a"])
        seen.append(slots.next().is_recovery)
    assert seen == [True] * 3
