"""What a process may claim next: turns of its queues, shared threads, limits. No database, no threads."""

import threading
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
    found = []
    thread = threading.Thread(target=lambda: found.append(slots.next()), daemon=True)
    thread.start()
    thread.join(0.05)
    if thread.is_alive():
        slots.stop()
        thread.join()
    return found == [None]


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


def test_stop_ends_the_turns_at_once():
    slots = Slots([lane("a")], 4)
    slots.stop()
    assert slots.next() is None
