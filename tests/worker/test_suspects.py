"""Expired tasks are taken back only if they are seen twice, a moment apart."""

import math

import pytest

from modelqueue import Status
from modelqueue.engines import Candidate
from modelqueue.worker import suspects
from modelqueue.worker.suspects import Suspects


@pytest.fixture
def at(monkeypatch):
    """Set the time."""
    return lambda seconds: monkeypatch.setattr(suspects.time, "monotonic", lambda: 1000.0 + seconds)


ROW = Candidate(1, 1, Status.working(5))


def test_row_is_confirmed_when_it_was_seen_a_moment_ago(at):
    one, seen = Suspects(), []
    for seconds in (0.0, 1.0, 2.0, 2.1):
        at(seconds)
        one.begin()
        seen.append(one.confirm(ROW))
    assert seen == [False, False, True, True]


def test_who_has_seen_something_for_the_first_time_is_to_look_again(at):
    one = Suspects()
    at(0.0)
    one.begin()
    assert one.look_at == math.inf
    one.confirm(ROW)
    assert one.look_at == 1001.5
    at(2.0)
    one.begin()
    one.confirm(ROW)
    assert one.look_at == math.inf


def test_row_that_is_seen_too_soon_is_looked_at_no_later_for_that(at):
    one = Suspects()
    for seconds in (0.0, 1.0):
        at(seconds)
        one.begin()
        one.confirm(ROW)
    one.confirm(ROW._replace(key=2))
    assert one.look_at == 1001.5


def test_row_that_was_renewed_meanwhile_is_another(at):
    one = Suspects()
    at(0.0)
    assert not one.confirm(ROW)
    at(2.0)
    assert not one.confirm(ROW._replace(status=Status.working(6)))


def test_row_that_was_seen_long_ago_is_not_confirmed(at):
    """An outage may have come between."""
    one = Suspects()
    at(0.0)
    one.confirm(ROW)
    at(20.0)
    one.begin()
    assert not one.confirm(ROW)


def test_nothing_is_confirmed_after_a_failure(at):
    one = Suspects()
    at(0.0)
    one.confirm(ROW)
    one.forget()
    assert one.look_at == math.inf
    at(2.0)
    assert not one.confirm(ROW)
