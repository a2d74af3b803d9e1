"""Waits between attempts: how they grow, where they stop, and what is refused."""

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelqueue import backoff

SECOND = dt.timedelta(seconds=1)


def test_fixed_wait_stays_the_same():
    wait = backoff.fixed(5 * SECOND)
    assert [wait(attempts) for attempts in (0, 1, 2, 9)] == [5 * SECOND] * 4


def test_linear_wait_grows_by_a_step_up_to_the_cap():
    wait = backoff.linear(2 * SECOND, cap=5 * SECOND)
    assert [wait(attempts) for attempts in (1, 2, 3, 9)] == [2 * SECOND, 4 * SECOND, 5 * SECOND, 5 * SECOND]
    assert backoff.linear(2 * SECOND)(100) == 200 * SECOND


def test_exponential_wait_doubles_up_to_the_cap():
    wait = backoff.exponential(SECOND, cap=5 * SECOND, jitter=0)
    assert [wait(attempts) for attempts in (1, 2, 3, 4, 9)] == [
        seconds * SECOND for seconds in (1, 2, 4, 5, 5)
    ]


@pytest.mark.parametrize("grown", [backoff.linear, lambda base: backoff.exponential(base, jitter=0)])
def test_wait_before_the_first_failure_is_that_after_it(grown):
    # A Retry is not charged, so a task can wait with 0 attempts.
    assert grown(SECOND)(0) == grown(SECOND)(1) == SECOND


@given(st.integers(0, 5000), st.floats(0, 1))
def test_jitter_shortens_a_wait_by_its_part_at_most(attempts, jitter):
    full = backoff.exponential(SECOND, cap=60 * SECOND, jitter=0)(attempts)
    wait = backoff.exponential(SECOND, cap=60 * SECOND, jitter=jitter)(attempts)
    assert full * (1 - jitter) <= wait <= full


def test_jitter_spreads_the_waits():
    wait = backoff.exponential(60 * SECOND, jitter=0.5)
    assert len({wait(1) for _ in range(20)}) > 1


@pytest.mark.parametrize("grown", [backoff.linear, lambda base: backoff.exponential(base, jitter=0)])
def test_wait_beyond_the_longest_timedelta_is_the_longest(grown):
    assert grown(dt.timedelta.max)(9) == dt.timedelta.max


@pytest.mark.parametrize("wrong", [5, 5.0, "5", True, None, dt.time(0, 5)])
@pytest.mark.parametrize(
    ("function", "name"), [(backoff.fixed, "wait"), (backoff.linear, "step"), (backoff.exponential, "base")]
)
def test_wait_of_a_wrong_type_is_refused(function, name, wrong):
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\): {name} is a datetime.timedelta, not "):
        function(wrong)


@pytest.mark.parametrize("function", [backoff.fixed, backoff.linear, backoff.exponential])
def test_negative_wait_is_refused(function):
    with pytest.raises(ValueError, match=rf"{function.__name__}\(\): .*=-1 day, 23:59:59 is negative"):
        function(-SECOND)


@pytest.mark.parametrize("function", [backoff.linear, backoff.exponential])
def test_wrong_cap_is_refused(function):
    with pytest.raises(ValueError, match="cap=-1 day, 23:59:59 is negative"):
        function(SECOND, cap=-SECOND)
    with pytest.raises(TypeError, match=r"cap is a datetime\.timedelta, not 60"):
        function(SECOND, cap=60)


@pytest.mark.parametrize("jitter", [-0.1, 1.1, float("nan"), float("inf")])
def test_jitter_out_of_range_is_refused(jitter):
    with pytest.raises(ValueError, match="jitter is a number from 0 to 1, not "):
        backoff.exponential(SECOND, jitter=jitter)


@pytest.mark.parametrize("jitter", [True, None, "0.1", SECOND])
def test_jitter_of_a_wrong_type_is_refused(jitter):
    with pytest.raises(TypeError, match="jitter is a number from 0 to 1, not "):
        backoff.exponential(SECOND, jitter=jitter)
