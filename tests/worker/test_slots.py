"""What a process may claim next: turns of its queues, shared threads, limits. No database, no threads."""

import time
from types import SimpleNamespace

import pytest

from modelqueue.worker import slots as slots_module
from modelqueue.worker.slots import Lane, Slots, most_at_a_time
from tests.pace import within


def lane(name, slots=None, is_async=False, threads=4, retry=3, alone=False):
    policy = SimpleNamespace(retry=retry)
    queue = SimpleNamespace(name=name, slots=slots, is_async=is_async, shared=None, alone=None, policy=policy)
    return Lane(queue, threads, alone)


def measured(name, task, claim, **options):
    """A queue whose tasks and claims have taken so many seconds."""
    one = lane(name, **options)
    one.note_task(task)
    one.note_claim(claim)
    return one


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
        slots.freed([(ended, None, False)])
        assert turns(slots, 1) == [(expected, 1)]


def test_queue_that_has_more_than_its_share_leaves_the_next_thread_to_the_other():
    a, b = lane("a"), lane("b")
    slots = Slots([a, b], 4)
    slots.claimed(slots.next(), 2)
    slots.claimed(slots.next(), 0)
    assert turns(slots, 1) == [("a", 2)]
    for _ in range(2):
        slots.freed([(a, None, False)])
        slots.want(["b"])
        assert turns(slots, 1) == [("b", 1)]
    slots.freed([(a, None, False)])
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
    assert turns(slots, 3) == [("a", 4), ("b", 48), ("b", 48)]


def test_stop_that_comes_when_the_next_turn_was_just_asked_for_is_not_missed():
    slots = Slots([lane("a")], 4)
    slots._lock = StoppedBefore(slots, slots._lock)
    assert slots.next(60.0) is None


class StoppedBefore:
    """A lock which the other one, who stops, gets first."""

    def __init__(self, slots, lock):
        self._slots, self._own = slots, lock

    def __enter__(self):
        self._slots._is_stopped = True
        return self._own.__enter__()

    def __exit__(self, *error):
        return self._own.__exit__(*error)


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


@pytest.mark.parametrize("unused", [0, 1])
def test_no_more_tasks_are_claimed_than_the_process_may_run(unused):
    one = lane("a")
    slots = Slots([one], 4, most_tasks=6)
    turn = slots.next()
    slots.claimed(turn, 4 - unused)
    for _ in range(4 - unused):
        slots.freed([(one, None, False)])
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
    assert 0.1 <= time.monotonic() - began < within(5)


def test_queue_that_failed_has_its_next_turn_after_its_pause_and_others_have_theirs_meanwhile():
    a, b = lane("a"), lane("b")
    slots = Slots([a, b], 4)
    failed_at = time.monotonic()
    slots.failed(slots.next(), 0.5)
    assert slots.running == 0
    for _ in range(3):
        assert turns(slots, 1)[0][0] == "b"
        for _ in range(b.running):
            slots.freed([(b, None, False)])
    turns(slots, 1, claimed=0)
    assert is_waiting(slots)
    assert turns(slots, 1) == [("a", 4)]  # though nobody has said that it has something due
    assert time.monotonic() - failed_at >= 0.5


def test_wish_does_not_shorten_the_pause_of_a_queue_that_failed():
    slots = Slots([lane("a")], 4)
    slots.failed(slots.next(), 60.0)
    slots.want(["a"])
    assert is_waiting(slots)


def test_claim_that_failed_uses_up_nothing_of_what_a_process_may_run():
    slots = Slots([lane("a")], 4, most_tasks=4)
    slots.failed(slots.next(), 0.0)
    assert not slots.is_used_up
    assert turns(slots, 1) == [("a", 4)]


def test_process_for_last_attempts_has_one_task_at_a_time_whatever_its_queue():
    a, b = lane("a"), lane("b", is_async=True)
    slots = Slots([a, b], 1, alone=True)
    assert turns(slots, 1) == [("a", 1)]
    assert is_waiting(slots)
    slots.freed([(a, None, False)])
    assert turns(slots, 1) == [("b", 1)]
    assert is_waiting(slots)
    slots.freed([(b, None, False)])
    assert turns(slots, 1) == [("a", 1)]


# Claimed ahead


@pytest.mark.parametrize(
    ("task", "claim", "most"),
    [
        (0.00001, 0.005, 256),  # as many as one claim takes
        (0.0004, 0.005, 104),  # two claims take as long as a hundred
        (0.001, 0.1, 204),  # which is 50 ms of work for four threads
        (
            0.01,
            0.002,
            8,
        ),  # two would do, but then some threads wait for the next claim
        (0.05, 0.005, 4),
        (10.0, 0.005, 4),
    ],
)
def test_so_many_tasks_are_claimed_ahead_as_are_run_during_two_claims(task, claim, most):
    one = measured("a", task, claim)
    ((_, size),) = turns(Slots([one], 4), 1)
    assert most * 3 / 4 < size <= most


def test_claims_are_of_few_sizes():
    """As each is a statement of its own, which is compiled and planned once."""
    sizes = [slots_module._few_sizes(limit) for limit in range(1, 520)]
    assert sizes[:8] == [*range(1, 9)]
    assert all(limit * 2 / 3 < size <= limit for limit, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 20


@pytest.mark.parametrize(
    "options", [{"retry": 0}, {"alone": True}, {"is_async": True}, {"slots": 2}], ids=lambda one: str(*one)
)
def test_nothing_is_claimed_ahead_where_it_would_cost_or_could_not_be_run(options):
    assert measured("a", 0.00001, 0.005, **options).ahead == 0


def test_slot_is_free_again_when_its_action_has_ended():
    one = lane("a", slots=2)
    slots = Slots([one], 4)
    assert turns(slots, 1) == [("a", 2)]
    assert slots.next(0) is None
    left = [slots.leave(one)]
    assert turns(slots, 1) == [("a", 1)]
    slots.freed([(one, 1.0, left.pop())])
    assert slots.next(0) is None
    assert (one.busy, slots.running) == (2, 2)


def test_no_more_tasks_leave_their_slots_than_a_queue_has():
    """Where outcomes can not be written, nothing more is claimed at last."""
    one = lane("a", slots=2)
    slots = Slots([one], 4)
    assert turns(slots, 1) == [("a", 2)]
    assert [slots.leave(one), slots.leave(one)] == [True, True]
    assert turns(slots, 1) == [("a", 2)]
    assert not slots.leave(one)
    assert slots.next(0) is None
    assert slots.running == 4


def test_slot_of_a_short_task_is_taken_until_its_outcome_is_written():
    one = measured("a", 0.0001, 0.0)
    slots = Slots([one], 4)
    assert turns(slots, 1) == [("a", 4)]
    assert not slots.leave(one)
    assert slots.next(0) is None
    slots.freed([(one, 0.0001, False)])
    assert turns(slots, 1) == [("a", 1)]


def test_before_a_task_has_ended_nothing_is_claimed_ahead():
    one = lane("a")
    one.note_claim(0.005)
    assert one.ahead == 0


def test_next_tasks_are_claimed_ahead_when_half_of_them_have_ended():
    one = measured("a", 0.0004, 0.005)
    slots = Slots([one], 4)
    assert turns(slots, 1) == [("a", 96)]
    for _ in range(43):
        slots.freed([(one, None, False)])
    assert is_waiting(slots)
    slots.freed([(one, None, False)])
    assert turns(slots, 1) == [("a", 48)]


def test_queue_that_is_ahead_leaves_the_other_its_share_of_the_threads():
    a, b = measured("a", 0.0004, 0.005), lane("b")
    slots = Slots([a, b], 4)
    assert turns(slots, 2) == [("a", 48), ("b", 2)]
    for _ in range(48):
        slots.freed([(a, None, False)])
    assert turns(slots, 1) == [("a", 48)]
    slots.freed([(b, None, False)])
    assert turns(slots, 1) == [("b", 1)]


def test_queue_whose_tasks_take_long_now_is_not_ahead_any_more():
    one = measured("a", 0.0004, 0.005)
    slots = Slots([one], 4)
    turn = slots.next()
    slots.claimed(turn, 96)
    for _ in range(96):
        slots.freed([(one, 10.0, False)])
    assert one.ahead == 100
    slots.claimed(slots.next(), 0, 0.005)
    assert one.ahead == 0


def test_queue_with_a_task_that_is_never_retried_is_not_ahead_for_a_while():
    one = measured("a", 0.0004, 0.005)
    assert one.ahead == 100
    one.note_once()
    one.note_claim(0.005)
    assert one.ahead == 0
    one.not_ahead_until = time.monotonic()
    one.note_claim(0.005)
    assert one.ahead == 100


def test_board_has_a_place_for_all_that_several_queues_are_ahead():
    a, b = measured("a", 0.00001, 0.005), measured("b", 0.00001, 0.005)
    slots = Slots([a, b], 4)
    b.is_wanted = False
    assert turns(slots, 4) == [("a", 256)] * 4
    assert slots.next(0) is None
    slots.want(["b"])
    turns(slots, 2)
    assert 1024 < slots.running <= most_at_a_time([a.queue, b.queue], 4)
