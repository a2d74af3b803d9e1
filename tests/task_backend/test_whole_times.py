"""A deferred task is due when its time has come, though the number has whole milliseconds alone."""

import datetime as dt

import pytest

from modelqueue import Status
from modelqueue.status import priority_to_datetime
from modelqueue.task_backend.priorities import next_priority

NOW = dt.datetime(2026, 11, 27, 12, tzinfo=dt.timezone.utc)


@pytest.mark.parametrize(
    ("microseconds", "due"), [(1000, 1), (1001, 2), (1999, 2), (2000, 2), (999_001, 1000)]
)
def test_deferred_task_is_not_due_before_its_time(microseconds, due):
    at = NOW + dt.timedelta(microseconds=microseconds)
    status = Status.waiting(next_priority(0, at, NOW))
    assert priority_to_datetime(status.priority) == NOW + dt.timedelta(milliseconds=due)


def test_last_microsecond_of_all_is_a_time_to_defer_to():
    last = dt.datetime.max.replace(tzinfo=dt.timezone.utc)
    assert next_priority(0, last, NOW) == last
