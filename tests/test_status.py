"""The number: what goes in comes out, wrong input is refused, and nothing that only reads it ever raises."""

import ast
import copy
import datetime as dt
import doctest
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.exceptions import AppRegistryNotReady, ImproperlyConfigured
from hypothesis import given
from hypothesis import strategies as st

import modelqueue
from modelqueue import State, Status, backoff, clock, datetime_to_int, now, status

SOURCES = Path(modelqueue.__file__).parent

states = st.sampled_from(Status.states)
priorities = st.integers(0, 10**17 - 1) | st.integers(0, 1000)  # the second: with leading zeros
attempts = st.integers(0, 9)
parts = st.tuples(states, priorities, attempts)
moments = st.datetimes(timezones=st.just(dt.timezone.utc))


def python(code, *options):
    """What a fresh interpreter without Django's settings prints; `code` is what it runs."""
    unconfigured = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    command = [sys.executable, "-W", "error", *options, "-c", code]
    return subprocess.run(
        command, cwd=SOURCES.parent.parent, env=unconfigured, check=True, capture_output=True, text=True
    ).stdout.strip()


# In and out


@given(parts)
def test_parse_undoes_combine(given_parts):
    number = Status.combine(*given_parts)
    assert (number.state, number.priority, number.attempts) == given_parts
    assert Status.combine(*number.parse()) == number


@given(parts, parts)
def test_numbers_sort_as_state_priority_attempts(first, second):
    assert (Status.combine(*first) < Status.combine(*second)) == (first < second)


@given(parts)
def test_every_status_has_19_digits_and_fits_into_64_bits(given_parts):
    number = Status.combine(*given_parts)
    assert len(f"{int(number)}") == 19
    assert number < 2**63


@given(moments, states, attempts)
def test_time_comes_back_to_the_millisecond(moment, state, attempts):
    parsed = Status.combine(state, moment, attempts).parse()
    assert parsed == (state, moment.replace(microsecond=moment.microsecond // 1000 * 1000), attempts)


def test_times_have_the_digits_of_their_release():
    time = dt.datetime(2018, 1, 2, 3, 4, 56, 789123)
    assert Status.created(time, 1) == 1201801020304567891
    assert Status.waiting(time, 2) == 2201801020304567892
    assert Status.working(time, 3) == 3201801020304567893
    assert Status.finished(time, 4) == 4201801020304567894
    assert Status.canceled(time, 5) == 5201801020304567895


def test_priority_that_spells_no_time_stays_an_int():
    assert Status.waiting(20181302030456789).parse() == (State.waiting, 20181302030456789, 0)  # month 13
    assert Status.waiting(0, 7).parse() == (State.waiting, 0, 7)
    assert Status.waiting(20180102030460000).parse()[1] == 20180102030460000  # second 60


@pytest.mark.parametrize("state", [State.working, "working", 3])
def test_state_is_taken_as_state_name_or_number(state):
    assert Status.combine(state, 7, 2) == 3000000000000000072
    assert Status.minimum(state) == 3 * 10**18
    assert Status.maximum(state) == 4 * 10**18 - 1
    assert Status.filter("job__status", state) == {
        "job__status__gte": 3000000000000000000,
        "job__status__lte": 3999999999999999999,
    }


def test_constructors_take_now_as_priority():
    with clock.use(lambda: dt.datetime(2027, 3, 26, 14, 43, 25, 759999, dt.timezone.utc)):
        made = [getattr(Status, state.name)() for state in Status.states]
    assert made == [state * 10**18 + 202703261443257590 for state in (1, 2, 3, 4, 5)]
    assert Status.waiting(attempts=4).attempts == 4


def test_constructors_make_a_status_of_the_class_they_are_called_on():
    class OwnStatus(Status):
        pass

    assert type(OwnStatus.waiting()) is OwnStatus
    assert type(pickle.loads(pickle.dumps(Status.waiting()))) is Status


def test_constants_are_those_of_2_2_1():
    assert Status.states == [State.created, State.waiting, State.working, State.finished, State.canceled]
    assert (Status.max_attempts, Status.state_offset) == (9, 10**18)
    assert modelqueue.ONE_HOUR.total_seconds() == 3600
    assert modelqueue.ZERO_SECS.total_seconds() == 0
    assert modelqueue.__title__ == "modelqueue"


# States


def test_state_is_an_int_with_a_name():
    assert (State.created, State.waiting, State.working, State.finished, State.canceled) == (1, 2, 3, 4, 5)
    assert [state.name for state in Status.states] == [
        "created",
        "waiting",
        "working",
        "finished",
        "canceled",
    ]
    assert repr(State.created) == "State(1, 'created')"
    assert f"{State.created}" == str(State.created) == "created"


def test_state_can_be_called():
    own = State(2, "waiting")
    assert (own, own.name) == (State.waiting, "waiting")
    assert Status.combine(own, 0, 0) == Status.minimum("waiting")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("wating", ValueError),
        ("unknown", ValueError),
        ("", ValueError),
        ("2", ValueError),
        (0, ValueError),
        (6, ValueError),
        (-1, ValueError),
        (State(0, "unknown"), ValueError),
        (True, TypeError),
        (2.0, TypeError),
        (None, TypeError),
        (b"waiting", TypeError),
        ([2], TypeError),
    ],
)
def test_wrong_state_is_refused_everywhere(wrong, error):
    for function in (State.of, Status.minimum, Status.maximum):
        with pytest.raises(error, match="1 created, 2 waiting, 3 working, 4 finished, 5 canceled") as raised:
            function(wrong)
        assert repr(wrong) in str(raised.value)
    with pytest.raises(error):
        Status.filter("status", wrong)
    with pytest.raises(error):
        Status.combine(wrong, 0, 0)


# Wrong numbers

WRONG = {
    "negative priority": (-1, 0, ValueError, r"priority -1 .* 0 to 10\*\*17 - 1"),
    "18 digits": (10**17, 0, ValueError, r"priority 100000000000000000 .* 17 digits.* 0 to 10\*\*17 - 1"),
    "a status as priority": (2202703261443257591, 0, ValueError, r"2202703261443257591 .* 17 digits"),
    "bool priority": (True, 0, TypeError, r"0 to 10\*\*17 - 1, not True"),
    "float priority": (1.0, 0, TypeError, r"0 to 10\*\*17 - 1, not 1\.0"),
    "str priority": ("5", 0, TypeError, r"0 to 10\*\*17 - 1, not '5'"),
    "date priority": (dt.date(2027, 1, 1), 0, TypeError, r"datetime or an int .*, not datetime\.date"),
    "negative attempts": (0, -1, ValueError, r"0 to 9, not -1"),
    "two digits of attempts": (0, 10, ValueError, r"0 to 9, not 10"),
    "bool attempts": (0, True, TypeError, r"0 to 9, not True"),
    "float attempts": (0, 1.0, TypeError, r"0 to 9, not 1\.0"),
    "str attempts": (0, "1", TypeError, r"0 to 9, not '1'"),
    "no attempts": (0, None, TypeError, r"0 to 9, not None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_digits_are_refused_with_their_value_and_the_range(name):
    priority, attempts, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        Status.combine("waiting", priority, attempts)
    for state in Status.states:
        with pytest.raises(error, match=message):
            getattr(Status, state.name)(priority, attempts)


def test_combine_takes_no_priority_of_none():
    with pytest.raises(TypeError, match=r"0 to 10\*\*17 - 1, not None"):
        Status.combine("waiting", None, 0)


def refusals():
    """What each wrong call raises, for a comparison of interpreters."""
    calls = [(Status.combine, "waiting", priority, attempts) for priority, attempts, *_ in WRONG.values()]
    calls += [(Status.combine, "wating", 0, 0), (Status.minimum, 6), (Status.filter, "status", None)]
    calls += [(datetime_to_int, "now"), (backoff.fixed, 5), (backoff.linear, -modelqueue.ONE_HOUR)]
    return [refusal(*call) for call in calls]


def refusal(function, *arguments):
    try:
        return f"not refused: {function(*arguments)!r}"
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def test_optimised_python_refuses_the_same():
    found = python("import json, tests.test_status as t; print(__debug__, json.dumps(t.refusals()))", "-O")
    assert found == f"False {json.dumps(refusals())}"
    assert not any(refusal.startswith("not refused") for refusal in refusals())


def test_no_guard_is_an_assert_statement():
    files = list(SOURCES.rglob("*.py"))
    nodes = ((file.name, node) for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))))
    assert len(files) > 10
    assert [f"{name}:{node.lineno}" for name, node in nodes if isinstance(node, ast.Assert)] == []


# Times


def test_datetime_to_int_cuts_off_below_the_millisecond():
    assert datetime_to_int(dt.datetime(2018, 1, 2, 3, 4, 56, 789999)) == 20180102030456789


def test_aware_time_is_converted_to_utc_and_naive_one_taken_as_utc():
    tokyo = dt.timezone(dt.timedelta(hours=9))
    assert datetime_to_int(dt.datetime(2027, 1, 1, 8, 30, tzinfo=tokyo)) == 20261231233000000
    assert datetime_to_int(dt.datetime(2027, 1, 1, 8, 30)) == 20270101083000000


def test_zone_that_leaves_the_calendar_gives_its_end():
    west, east = dt.timezone(-dt.timedelta(hours=9)), dt.timezone(dt.timedelta(hours=9))
    assert datetime_to_int(dt.datetime.max.replace(tzinfo=west)) == 99991231235959999
    assert datetime_to_int(dt.datetime.min.replace(tzinfo=east)) == 10101000000000


@pytest.mark.parametrize("wrong", ["2027-01-01", 20270101000000000, dt.date(2027, 1, 1), None])
def test_datetime_to_int_refuses_what_is_no_datetime(wrong):
    with pytest.raises(TypeError, match=r"takes a datetime\.datetime, not") as raised:
        datetime_to_int(wrong)
    assert repr(wrong) in str(raised.value)


def test_shifted_time_stops_at_the_ends_of_the_calendar():
    moment = dt.datetime(2027, 1, 1, tzinfo=dt.timezone.utc)
    assert status.shifted(moment, modelqueue.ONE_HOUR) == dt.datetime(2027, 1, 1, 1, tzinfo=dt.timezone.utc)
    last = status.shifted(moment, dt.timedelta.max)
    first = status.shifted(moment, dt.timedelta.min)
    assert (datetime_to_int(last), datetime_to_int(first)) == (99991231235959999, 10101000000000)
    assert last.tzinfo is first.tzinfo is dt.timezone.utc


def test_now_is_aware_utc_of_this_moment():
    before = dt.datetime.now(dt.timezone.utc)
    assert before <= now() <= dt.datetime.now(dt.timezone.utc)
    assert now().tzinfo is dt.timezone.utc


def test_clock_is_given_back_after_an_error():
    def stopped_clock():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), clock.use(stopped_clock):
        now()
    assert now().tzinfo is dt.timezone.utc


# Words


def test_str_says_state_time_and_attempts():
    assert str(Status.waiting(now() + dt.timedelta(minutes=5, seconds=30))) == (
        "waiting; 5 minutes from now; 0 attempts"
    )
    assert str(Status.finished(now() - dt.timedelta(hours=3, seconds=30), 1)) == (
        "finished; 3 hours ago; 1 attempts"
    )
    assert str(Status.waiting(0)) == "waiting; 0 priority; 0 attempts"
    assert repr(Status(2000000000000000000)) == "Status(2000000000000000000)"


def test_str_of_this_moment_is_now():
    moment = now()
    assert str(Status.waiting(moment)) in ("waiting; now; 0 attempts", "waiting; a second ago; 0 attempts")


@given(st.integers(-(2**63), 2**63 - 1) | st.integers())
def test_str_and_parts_of_any_integer_never_raise(number):
    foreign = Status(number)
    state, _, attempts = foreign.parse()
    assert str(foreign).startswith(f"{state.name}; ")
    assert repr(foreign) == f"Status({number})"
    assert (state == 0) == (not 10**18 <= number < 6 * 10**18)
    assert 0 <= foreign.priority < 10**17
    assert 0 <= attempts <= 9


@given(states, moments)
def test_str_of_any_time_never_raises(state, moment):
    assert str(Status.combine(state, moment, 3)).endswith("; 3 attempts")


@pytest.mark.parametrize("number", [0, -1, 1, 10**18 - 1, 6 * 10**18, 2**63 - 1, -(2**63), 10**30])
def test_state_of_a_foreign_number_is_unknown(number):
    assert (Status(number).state, Status(number).state.name) == (0, "unknown")
    assert repr(Status(number).state) == "State(0, 'unknown')"


PRINT_TIMES = """
from modelqueue import Status, now, ONE_HOUR
import datetime
for ago in (datetime.timedelta(), ONE_HOUR, -ONE_HOUR, 500 * ONE_HOUR, -9000 * ONE_HOUR):
    print(Status.waiting(now() - ago))
print(Status.waiting(datetime.datetime.max))
print(Status.waiting(datetime.datetime.min))
print(Status(0))
"""
CONFIGURE = "import django; from django.conf import settings; settings.configure({}); "


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param("", id="no settings"),
        pytest.param(CONFIGURE.format("USE_TZ=True"), id="apps not ready"),
        pytest.param(CONFIGURE.format("USE_TZ=True") + "django.setup()", id="ready"),
        pytest.param(
            CONFIGURE.format("USE_TZ=False, USE_I18N=False") + "django.setup()", id="no translation"
        ),
    ],
)
def test_str_works_in_any_state_of_django(settings):
    *times, foreign = python(settings + PRINT_TIMES).splitlines()
    assert len(times) == 7
    assert all(line.startswith("waiting; ") and line.endswith("; 0 attempts") for line in times)
    assert foreign == "unknown; 0 priority; 0 attempts"


@pytest.mark.parametrize("error", [AppRegistryNotReady, ImproperlyConfigured, OverflowError, ValueError])
def test_str_gives_digits_where_django_has_no_words(monkeypatch, error):
    def naturaltime(moment):
        raise error

    monkeypatch.setattr("django.contrib.humanize.templatetags.humanize.naturaltime", naturaltime)
    number = Status.waiting(dt.datetime(2027, 3, 26, 14, 43, 25, 759000))
    assert str(number) == "waiting; 2027-03-26 14:43:25.759+00:00; 0 attempts"


# Copies


@pytest.mark.parametrize("value", [State.waiting, State(0, "unknown"), Status.waiting(5), Status(-7)])
@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        *(
            lambda value, p=p: pickle.loads(pickle.dumps(value, p))
            for p in range(pickle.HIGHEST_PROTOCOL + 1)
        ),
    ],
)
def test_copy_and_pickle_keep_value_and_type(value, copied):
    twin = copied(value)
    assert (twin, type(twin), str(twin), repr(twin)) == (value, type(value), str(value), repr(value))


# The package


def test_package_is_imported_without_settings():
    assert python("import modelqueue; print(modelqueue.Status.minimum('waiting'))") == "2000000000000000000"


def test_doctests_of_the_package_run_without_django():
    code = "import doctest, modelqueue; print(*doctest.testmod(modelqueue))"
    failed, attempted = map(int, python(code).split())
    assert failed == 0
    assert attempted > 0


@pytest.mark.parametrize("module", [modelqueue, status, backoff])
def test_doctests_of_a_module_pass(module):
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted > 0


def test_public_names_are_exactly_all():
    public = {name for name in dir(modelqueue) if not name.startswith("_")}
    modules = {path.stem for path in SOURCES.iterdir()} - {"backoff"}
    private = {"annotations", "Any", "TYPE_CHECKING"}
    assert public - modules - private == set(modelqueue.__all__)
    assert all(hasattr(modelqueue, name) for name in modelqueue.__all__)
    assert sorted(modelqueue.__all__) == sorted(set(modelqueue.__all__))


def test_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'modelqueue' has no attribute 'rum'"):
        modelqueue.rum  # noqa: B018


def test_admin_is_imported_only_by_who_asks_for_its_parts():
    code = (
        "import sys, modelqueue; print('modelqueue.admin' in sys.modules); "
        "from django.conf import settings; settings.configure(); "
        "modelqueue.admin_actions; print('modelqueue.admin' in sys.modules)"
    )
    assert python(code).split() == ["False", "True"]
