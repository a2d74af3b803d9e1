"""The table of outcomes: how an attempt ended, and what is recorded. Pure decisions, without a database."""

import asyncio
import datetime as dt
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelqueue import ONE_HOUR, ZERO_SECS, Abort, Cancel, Retry, State, Status, backoff
from modelqueue.outcomes import (
    ERROR_LIMIT,
    Policy,
    Successes,
    assigned,
    decide,
    error_text,
    failed,
    recovered,
)

NOW = dt.datetime(2026, 11, 25, 12, 0, 0, 500_000, dt.timezone.utc)
SECOND = dt.timedelta(seconds=1)
MILLISECOND = dt.timedelta(milliseconds=1)
CLAIMED = NOW - SECOND
RETRIES = [0, 1, 3, 8, None]


def lease(attempts=0, claimed=CLAIMED):
    return Status.working(claimed, attempts)


def waited(attempts=0):
    return Status.waiting(CLAIMED - SECOND, attempts)


def outcome(error, attempts=0, **options):
    return decide(lease(attempts), waited(attempts), error, Policy(**options), NOW)


def raised(error):
    """The exception as it comes out of a function, with a traceback."""
    try:
        raise error
    except BaseException as caught:
        return caught


# The rows of the table


@pytest.mark.parametrize("retry", RETRIES)
@pytest.mark.parametrize("attempts", range(10))
def test_returned_action_finishes_its_task(attempts, retry):
    result = outcome(None, attempts, retry=retry)
    assert result.status == Status.finished(NOW, min(attempts + 1, 9))
    assert (result.ending, result.raised, result.note) == ("finish", None, "")


@pytest.mark.parametrize("retry", RETRIES)
@pytest.mark.parametrize("attempts", range(10))
def test_retry_waits_and_is_not_charged(attempts, retry):
    result = outcome(Retry(), attempts, retry=retry, delay=SECOND)
    assert result.status == Status.waiting(NOW + SECOND, attempts)
    assert (result.ending, result.raised) == ("retry", None)
    assert result.note is None  # what failed last is still what failed last


@pytest.mark.parametrize("retry", RETRIES)
@pytest.mark.parametrize("attempts", range(10))
@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (Abort(), "abort"),
        (ValueError("x"), "fail"),
        (KeyboardInterrupt(), "fail"),
        (SystemExit(3), "fail"),
        (GeneratorExit(), "fail"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_failure_is_charged_and_cancels_a_task_that_is_out_of_attempts(error, ending, attempts, retry):
    result = outcome(error, attempts, retry=retry, delay=SECOND)
    is_out = retry is not None and attempts + 1 > retry
    state, when = (State.canceled, NOW) if is_out else (State.waiting, NOW + SECOND)
    assert result.status == Status.combine(state, when, min(attempts + 1, 9))
    assert result.ending == ending
    assert result.raised is (None if ending == "abort" else error)
    assert result.note == error_text(error)


@pytest.mark.parametrize("retry", RETRIES)
@pytest.mark.parametrize("attempts", range(10))
def test_cancel_gives_the_task_up_at_once(attempts, retry):
    result = outcome(Cancel("no such customer"), attempts, retry=retry, delay=SECOND)
    assert result.status == Status.canceled(NOW, min(attempts + 1, 9))
    assert (result.ending, result.raised) == ("cancel", None)
    assert result.note == "modelqueue.exceptions.Cancel: no such customer"


@pytest.mark.parametrize("retry", RETRIES)
@pytest.mark.parametrize("attempts", range(10))
def test_action_canceled_from_outside_gives_its_task_back_as_it_was(attempts, retry):
    error = asyncio.CancelledError()
    result = outcome(error, attempts, retry=retry, delay=SECOND)
    assert result.status == waited(attempts)
    assert (result.ending, result.raised, result.note) == ("release", error, None)


@pytest.mark.parametrize(
    "status", [Status.created(5, 2), Status.waiting(5), Status.finished(5, 9), Status.canceled(5, 1)]
)
def test_assigned_status_is_recorded_as_it_is(status):
    result = assigned(int(status), nullable=False)
    assert (result.ending, result.status, result.raised, result.note) == ("assign", status, None, "")


def test_assigned_none_takes_the_task_out_of_a_nullable_queue():
    assert assigned(None, nullable=True).status is None
    with pytest.raises(TypeError, match="The action assigned None"):
        assigned(None, nullable=False)


@pytest.mark.parametrize("status", [Status.working(), Status(0), Status(-1), Status(6 * 10**18), 7])
def test_assigned_working_or_foreign_status_is_an_error(status):
    with pytest.raises(ValueError, match=r"The action assigned Status\(.*created, waiting, finished or"):
        assigned(status, nullable=True)


@pytest.mark.parametrize("value", [True, 2.5e18, "waiting", object(), State])
def test_assigned_value_of_a_wrong_type_is_an_error(value):
    with pytest.raises(TypeError, match=r"The action assigned .* as the status of its task"):
        assigned(value, nullable=True)


# Delays


@pytest.mark.parametrize("error", [Retry, Abort])
def test_delay_of_the_exception_goes_before_that_of_the_queue(error):
    assert outcome(error(), delay=SECOND).status.parse()[1] == NOW + SECOND
    assert outcome(error(5 * SECOND), delay=SECOND).status.parse()[1] == NOW + 5 * SECOND
    assert outcome(error(delay=ZERO_SECS), delay=SECOND).status.parse()[1] == NOW
    assert outcome(error(backoff.fixed(7 * SECOND)), delay=SECOND).status.parse()[1] == NOW + 7 * SECOND


@pytest.mark.parametrize("error", [Abort(), ValueError(), SystemExit()])
def test_callable_delay_gets_the_attempts_after_a_failure(error):
    calls = []

    def delay(attempts):
        calls.append(attempts)
        return attempts * SECOND

    for attempts in range(10):
        outcome(error, attempts, retry=None, delay=delay)
    assert calls == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]


def test_callable_delay_gets_the_attempts_as_before_for_a_retry():
    calls = []
    for attempts in range(10):
        outcome(Retry(lambda count: calls.append(count) or SECOND), attempts)
    assert calls == list(range(10))


def test_delay_is_not_asked_where_nothing_waits():
    def delay(attempts):
        raise AssertionError("asked")

    assert outcome(ValueError(), 3, retry=3, delay=delay).status.state == State.canceled
    assert outcome(Abort(delay), 3, retry=3).status.state == State.canceled
    assert outcome(None, delay=delay).status.state == State.finished
    assert outcome(Cancel(), delay=delay).status.state == State.canceled
    assert outcome(asyncio.CancelledError(), delay=delay).status == waited()


def breaks(attempts):
    raise RuntimeError("no delay today")


def leaves(attempts):
    raise SystemExit("in the delay")


WRONG_DELAYS = [
    (5, TypeError),
    (2.5, TypeError),
    ("5", TypeError),
    (-SECOND, ValueError),
    (lambda attempts: 5, TypeError),
    (lambda attempts: None, TypeError),
    (lambda attempts: -SECOND, ValueError),
    (lambda: SECOND, TypeError),
    (breaks, RuntimeError),
    (leaves, SystemExit),
]


@pytest.mark.parametrize(("delay", "kind"), WRONG_DELAYS)
@pytest.mark.parametrize("error", [Retry, Abort])
def test_retry_or_abort_with_a_wrong_delay_is_an_ordinary_failure(error, delay, kind):
    original = error(delay)
    result = outcome(original, 1, retry=3, delay=SECOND)
    assert (result.ending, result.status) == ("fail", Status.waiting(NOW + SECOND, 2))
    assert isinstance(result.raised, kind)
    assert result.raised.__cause__ is original
    assert outcome(original, 3, retry=3).status.state == State.canceled


def test_error_of_a_wrong_delay_says_where_it_comes_from():
    said = str(outcome(Retry("busy"), 1, retry=3).raised)
    assert said.startswith(
        "Retry and Abort take a delay, no reason: delay is a datetime.timedelta or a callable"
    )
    said = str(outcome(ValueError(), 1, retry=3, delay=leaves_out_the_unit).raised)
    assert "leaves_out_the_unit" in said
    assert "returned 5 after attempt 2: the wait is a datetime.timedelta, not 5." in said


def leaves_out_the_unit(attempts):
    return 5


@pytest.mark.parametrize(("delay", "kind"), [row for row in WRONG_DELAYS if callable(row[0])])
def test_delay_of_the_queue_that_can_not_be_computed_is_zero_and_is_told(delay, kind):
    original = ValueError("x")
    result = outcome(original, 1, retry=3, delay=delay)
    assert (result.ending, result.status) == ("fail", Status.waiting(NOW, 2))
    assert isinstance(result.raised, kind)
    assert result.raised.__cause__ is original
    assert result.note == error_text(result.raised)


def test_delay_without_an_end_is_the_last_millisecond_of_the_calendar():
    for error in (Retry(dt.timedelta.max), Abort(dt.timedelta.max)):
        assert outcome(error).status.priority == 99991231235959999
    assert outcome(ValueError(), delay=dt.timedelta.max).status.priority == 99991231235959999


# Times that never go back


@given(st.timedeltas(-SECOND, SECOND), st.sampled_from([None, Retry(), Abort(), Cancel(), ValueError()]))
def test_no_outcome_is_stamped_earlier_than_its_lease(drift, error):
    held = lease(0, NOW + drift)
    status = decide(held, waited(), error, Policy(), NOW).status
    assert status.priority == max(held.priority, Status.waiting(NOW).priority)


@given(st.integers(0, 9), st.timedeltas(-SECOND, SECOND))
def test_success_among_others_is_as_one_by_itself(attempts, drift):
    held, successes = lease(attempts, NOW + drift), Successes(NOW)
    alone = decide(held, waited(attempts), None, Policy(), NOW)
    assert [successes.of(held), successes.of(held)] == [alone, alone]


@given(st.timedeltas(-SECOND, SECOND))
def test_no_recovery_is_stamped_earlier_than_its_lease(drift):
    held = lease(0, NOW + drift)
    assert recovered(held, Policy(), NOW)[0].priority == max(held.priority, Status.waiting(NOW).priority)


# Recovery


@pytest.mark.parametrize("retry", RETRIES)
@pytest.mark.parametrize("attempts", range(10))
def test_recovery_is_a_failed_attempt(attempts, retry):
    status, note, error = recovered(lease(attempts), Policy(retry, ONE_HOUR, SECOND), NOW)
    is_out = retry is not None and attempts + 1 > retry
    state, when = (State.canceled, NOW) if is_out else (State.waiting, NOW + SECOND)
    assert status == Status.combine(state, when, min(attempts + 1, 9))
    assert note.startswith(f"modelqueue.exceptions.LeaseExpired: attempt {attempts + 1} was not reported ")
    assert "within 1:00:00 of its claim" in note
    assert error is None


@pytest.mark.parametrize("delay", [breaks, lambda attempts: 5, lambda attempts: -SECOND])
def test_recovery_with_a_broken_delay_waits_no_longer(delay):
    status, _, error = recovered(lease(), Policy(delay=delay), NOW)
    assert status == Status.waiting(NOW, 1)
    assert isinstance(error, (RuntimeError, TypeError, ValueError))


def test_cutoff_is_a_timeout_ago():
    assert Policy(timeout=SECOND).cutoff(NOW) == NOW - SECOND
    assert Policy(timeout=ZERO_SECS).cutoff(NOW) == NOW


def test_timeout_that_reaches_before_the_calendar_never_expires():
    assert Policy(timeout=dt.timedelta.max).cutoff(NOW) is None
    assert Policy(timeout=dt.timedelta(days=2026 * 366)).cutoff(NOW) is None


# Changes that could not be saved


@pytest.mark.parametrize("error", [Retry(), Abort(), Cancel(), asyncio.CancelledError(), ValueError()])
def test_failed_attempt_is_a_failure_whatever_the_class(error):
    result = failed(lease(1), error, Policy(delay=SECOND), NOW)
    assert (result.ending, result.status) == ("fail", Status.waiting(NOW + SECOND, 2))
    assert result.raised is error


# Options


@pytest.mark.parametrize("retry", [True, 1.0, "3", SECOND])
def test_retry_of_a_wrong_type_is_refused(retry):
    with pytest.raises(TypeError, match="retry is an int from 0 to 8, or None for no limit, not "):
        Policy.of(retry, ONE_HOUR, ZERO_SECS)


@pytest.mark.parametrize("retry", [-1, 9, 10**20])
def test_retry_out_of_range_is_refused(retry):
    with pytest.raises(ValueError, match=f"retry={retry} is out of range"):
        Policy.of(retry, ONE_HOUR, ZERO_SECS)


@pytest.mark.parametrize("timeout", [None, 60, 1.5, "60", True, lambda attempts: SECOND])
def test_timeout_of_a_wrong_type_is_refused(timeout):
    with pytest.raises(TypeError, match=r"timeout is a datetime\.timedelta, not "):
        Policy.of(3, timeout, ZERO_SECS)


@pytest.mark.parametrize("delay", [None, 60, 1.5, "60", True])
def test_delay_of_a_wrong_type_is_refused(delay):
    with pytest.raises(TypeError, match=r"delay is a datetime\.timedelta or a callable .*, not "):
        Policy.of(3, ONE_HOUR, delay)


def test_negative_duration_is_refused():
    with pytest.raises(ValueError, match="timeout=-1 day, 23:59:59 is negative"):
        Policy.of(3, -SECOND, ZERO_SECS)
    with pytest.raises(ValueError, match="delay=-1 day, 23:59:59 is negative"):
        Policy.of(3, ONE_HOUR, -SECOND)


@pytest.mark.parametrize("retry", [0, 8, None])
@pytest.mark.parametrize("duration", [ZERO_SECS, MILLISECOND, dt.timedelta.max])
def test_options_at_their_limits_are_accepted(retry, duration):
    assert Policy.of(retry, duration, duration) == Policy(retry, duration, duration)


# The text of a failure


class Quiet(Exception):  # noqa: N818
    class Nested(Exception):  # noqa: N818
        pass


class Unprintable(Exception):  # noqa: N818
    def __str__(self):
        raise ValueError("not today")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no digits"), "builtins.ValueError: no digits"),
        (ValueError(), "builtins.ValueError"),
        (KeyboardInterrupt(), "builtins.KeyboardInterrupt"),
        (Cancel("enough"), "modelqueue.exceptions.Cancel: enough"),
        (Quiet.Nested("x"), f"{__name__}.Quiet.Nested: x"),
        (Unprintable(), f"{__name__}.Unprintable: <its message can not be shown: ValueError>"),
    ],
    ids=repr,
)
def test_error_text_begins_with_the_class_and_its_message(error, line):
    assert error_text(error) == line
    text = error_text(raised(error))
    assert text.splitlines()[0] == line
    assert text.splitlines()[1] == "Traceback (most recent call last):"


def test_error_text_ends_with_the_traceback():
    error = raised(ValueError("no digits"))
    assert error_text(error).endswith("".join(traceback.format_exception(error)).rstrip())


@pytest.mark.parametrize(
    "message", ["x" * 50_000, "\x00" * 50_000, "\ud800" * 50_000, "é" * 9_990], ids=["x", "NUL", "half", "é"]
)
def test_error_text_is_capped_with_its_beginning_and_its_end(message):
    text = error_text(raised(ValueError(message + "end")))
    assert len(text) <= ERROR_LIMIT
    assert text.startswith("builtins.ValueError: ")
    assert "\n[...]\n" in text
    assert text.endswith("end")


def test_error_text_that_just_fits_is_whole():
    message = "x" * (ERROR_LIMIT - len("builtins.ValueError: "))
    assert error_text(ValueError(message)) == f"builtins.ValueError: {message}"
    assert len(error_text(ValueError(message + "x"))) == ERROR_LIMIT


@given(st.text(st.characters()))
def test_error_text_holds_nothing_that_a_database_refuses(message):
    text = error_text(ValueError(message))
    text.encode()
    assert "\x00" not in text


def test_error_text_shows_what_it_replaces():
    assert error_text(ValueError("a\x00b\udc80c")) == "builtins.ValueError: a\\x00b\\udc80c"
