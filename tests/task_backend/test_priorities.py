"""Priorities: strict, the older first among equals, deferred tasks when their time has come."""

import datetime as dt
import itertools

import pytest

import modelqueue
from modelqueue import State, Status, testing
from modelqueue.task_backend import execution, priorities
from modelqueue.task_backend.execution import promote
from modelqueue.task_backend.models import QueuedTask
from tests.actions import SECOND
from tests.task_backend.backends import States, backend, queue_of, refreshed, row_of, run_all, run_one, tasks

pytestmark = pytest.mark.django_db(transaction=True)

HOUR = 3600 * SECOND
UTC = dt.timezone.utc


# The numbers


@pytest.mark.parametrize(
    "moment",
    [priorities.FIRST_DEFERRED, dt.datetime(2026, 1, 1, tzinfo=UTC), dt.datetime.max.replace(tzinfo=UTC)],
)
def test_number_of_a_higher_priority_is_lower_whatever_the_time(moment):
    early = priorities.FIRST_DEFERRED
    numbers = [priorities.in_band(priority, moment) for priority in range(100, -101, -1)]
    assert numbers == sorted(set(numbers))
    for higher, lower in itertools.pairwise(range(100, -101, -1)):
        assert priorities.in_band(higher, dt.datetime(3000, 1, 1, tzinfo=UTC)) < priorities.in_band(
            lower, early
        )


def test_number_of_a_band_is_below_all_times_and_in_the_order_of_time():
    moments = [dt.datetime(year, 1, 1, tzinfo=UTC) for year in (1969, 1970, 2010, 2026, 3000)]
    numbers = [priorities.in_band(-100, moment) for moment in moments]
    assert numbers == sorted(numbers)
    assert Status.waiting(numbers[-1]) < Status.waiting(priorities.FIRST_DEFERRED)
    assert priorities.in_band(100, moments[0]) == 0


def test_task_whose_time_is_over_is_ready():
    now = dt.datetime(2026, 1, 1, tzinfo=UTC)
    assert priorities.next_priority(0, now, now) == priorities.in_band(0, now)
    later = now + SECOND
    assert priorities.next_priority(0, later, now) == later
    before = dt.datetime(2001, 1, 1, tzinfo=UTC)  # a time that no number of a band can be told from
    assert priorities.next_priority(0, before + SECOND, before) == priorities.in_band(0, before + SECOND)


def test_promoted_task_keeps_its_attempts_and_its_time():
    moment = dt.datetime(2026, 1, 1, tzinfo=UTC)
    status = priorities.promoted(Status.waiting(moment, 3), 7)
    assert (status.state, status.priority, status.attempts) == (
        State.waiting,
        priorities.in_band(7, moment),
        3,
    )


# Ready tasks


def enqueue(*numbers, task=tasks.note, **options):
    """Enqueue a task of each priority; return the ids."""
    return [task.using(priority=number, **options).enqueue(str(number)).id for number in numbers]


def test_higher_priority_runs_first():
    ids = enqueue(0, -100, 100, 5, -5, 99)
    assert run_all() == [ids[place] for place in (2, 5, 3, 0, 4, 1)]


def test_older_task_runs_first_among_equals():
    ids = [one for _ in range(5) for one in enqueue(3, 4)]
    assert run_all() == ids[1::2] + ids[::2]


def test_task_that_comes_later_with_a_higher_priority_is_the_next():
    first, second = enqueue(0, 0)
    assert run_one().task.result_id == first
    (urgent,) = enqueue(1)
    assert run_all() == [urgent, second]


def test_task_that_may_run_since_an_earlier_time_is_before_its_equals():
    later, *_ = enqueue(0)
    (earlier,) = enqueue(0, run_after=modelqueue.now() - HOUR)
    assert run_all() == [earlier, later]


# Deferred ones


def in_an_hour():
    """Return a time in whole milliseconds, to which a task that is deferred is rounded up."""
    moment = modelqueue.now() + HOUR
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def test_deferred_task_does_not_run_before_its_time():
    moment = in_an_hour()
    result = tasks.note.using(run_after=moment).enqueue("a")
    assert (run_all(), promote(queue_of())) == ([], 0)
    with testing.travel(moment - SECOND):
        assert (run_all(), promote(queue_of())) == ([], 0)
    assert (refreshed(result).status, tasks.times("a")) == (States.READY, 0)
    with testing.travel(moment):
        assert run_all() == [result.id]
    assert result.task.run_after == moment


def test_deferred_task_runs_at_its_time_in_the_tests_of_a_user():
    tasks.note.using(run_after=modelqueue.now() + HOUR).enqueue("a")
    tasks.note.using(run_after=modelqueue.now() + 3 * HOUR).enqueue("b")
    testing.run_until(2 * HOUR, queue_of())
    assert (tasks.times("a"), tasks.times("b")) == (1, 0)


def test_deferred_task_takes_its_place_when_its_time_has_come():
    moment = in_an_hour()
    (low,) = enqueue(-1, run_after=moment)
    (high,) = enqueue(7, run_after=moment)
    with testing.travel(moment + HOUR):
        equal, higher = enqueue(7, 8)
        (zero,) = enqueue(0)
        assert promote(queue_of()) == 2
        assert run_all("default") == [higher, high, equal, zero, low]


def test_upkeep_of_the_queue_promotes():
    moment = in_an_hour()
    (deferred,) = enqueue(5, run_after=moment)
    with testing.travel(moment):
        (other,) = enqueue(4)
        queue_of().keep_up()
        assert run_all() == [deferred, other]


def test_many_are_promoted_in_batches(monkeypatch):
    monkeypatch.setattr(execution, "_BATCH", 2)
    moment = in_an_hour()
    ids = enqueue(*[3] * 5, run_after=moment)
    with testing.travel(moment):
        assert promote(queue_of()) == 5
        assert promote(queue_of()) == 0
        assert run_all() == ids


def test_promotion_leaves_others_alone():
    moment = in_an_hour()
    mine = tasks.add.using(run_after=moment).enqueue(1)
    others = [
        tasks.note_elsewhere.using(run_after=moment).enqueue("a"),
        tasks.note_elsewhere.using(run_after=moment, queue_name="blue").enqueue("a"),
        tasks.add.enqueue(1),
    ]
    running = tasks.add.using(priority=9).enqueue(1)
    queue_of().claim()
    before = {one.id: row_of(one).status for one in [*others, running]}
    with testing.travel(moment):
        assert promote(queue_of()) == 1
    assert {one.id: row_of(one).status for one in [*others, running]} == before
    assert row_of(mine).status.priority == priorities.in_band(0, moment)


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_promotion_passes_over_what_somebody_has_locked(bystander, monkeypatch):
    monkeypatch.setattr(execution, "_BATCH", 2)
    moment = in_an_hour()
    ids = enqueue(*[3] * 3, run_after=moment)
    with bystander.cursor() as cursor:
        cursor.execute("SELECT id FROM modelqueue_tasks_queuedtask WHERE result_id = %s FOR UPDATE", [ids[0]])
        cursor.fetchall()
    with testing.travel(moment):
        assert promote(queue_of()) in (1, 2)
        bystander.rollback()
        promote(queue_of())
        assert run_all() == ids


# Retries


def test_task_keeps_its_priority_when_it_is_tried_again():
    (failing,) = enqueue(5, task=tasks.fail_at_first)
    lower, higher = enqueue(4, 6)
    assert run_one().task.result_id == higher
    assert run_one().task.result_id == failing
    assert QueuedTask.objects.get(result_id=failing).status.attempts == 1
    (higher,) = enqueue(6)
    assert run_all() == [higher, failing, lower]


def test_task_that_waits_for_a_delay_is_promoted_after_it():
    result = tasks.fail_for_hours.using(priority=5).enqueue()
    run_all()
    status = row_of(result).status
    assert Status.waiting(modelqueue.now() + 2 * HOUR - 60 * SECOND) < status
    assert (refreshed(result).status, run_all()) == (States.READY, [])
    with testing.travel(modelqueue.now() + 2 * HOUR):
        lower, higher = enqueue(4, 6)
        promote(queue_of())
        assert row_of(result).status.attempts == 1
        assert run_all() == [higher, result.id, lower]


def test_task_that_is_retried_by_hand_takes_its_place_again():
    result = tasks.fail.using(priority=5).enqueue()
    run_all()
    lower, higher = enqueue(4, 6)
    assert backend().retry(result.id)
    promote(queue_of())
    assert run_all() == [higher, result.id, lower]


def test_promotion_goes_on_where_somebody_was_quicker_with_one(monkeypatch):
    monkeypatch.setattr(execution, "_BATCH", 2)
    moment = in_an_hour()
    ids = enqueue(*[3] * 5, run_after=moment)
    actual = execution.engine_for("default")
    kind, write = type(actual), type(actual).set_statuses
    monkeypatch.setattr(kind, "set_statuses", lambda self, source, changes: write(self, source, changes[:1]))
    with testing.travel(moment):
        assert promote(queue_of()) == 5
        monkeypatch.undo()
        assert run_all() == ids
