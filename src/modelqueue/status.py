"""The number: state, priority and attempts of a task in one signed 64-bit integer.

Written in decimal it has 19 digits, so that a person can read it in any database shell::

    2 20260327144325759 0
    | |                 |
    | |                 attempts, 0 to 9
    | priority, 17 digits: a UTC time YYYYMMDDhhmmssmmm or any whole number; lower runs first
    state: 1 created, 2 waiting, 3 working, 4 finished, 5 canceled

Number order is therefore (state, priority, attempts) order, and one index serves every question
that a queue asks. All other integers are *foreign*: they have the state ``unknown``, no query of
the library touches them, and nothing here raises because of one.

Pure Python: works before Django is configured (only `Status.tally` needs a database).
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from modelqueue.clock import now

if TYPE_CHECKING:
    from django.db.models import Manager, QuerySet

__all__ = ["ONE_HOUR", "ZERO_SECS", "State", "Status", "datetime_to_int", "now"]

ONE_HOUR = dt.timedelta(hours=1)
ZERO_SECS = dt.timedelta(0)

StateLike: TypeAlias = "State | str | int"
Priority = dt.datetime | int

#: Priorities from here on are times, where the age of a task is asked for. Those below are an order alone,
#: even if their digits spell a time by chance.
FIRST_TIME = 20010101000000000

_PRIORITY_LIMIT = 10**17
_LAST_MILLISECOND = 99991231235959999
_FIRST_MILLISECOND = 10101000000000
_LAST_MOMENT = dt.datetime.max.replace(tzinfo=dt.timezone.utc)
_FIRST_MOMENT = dt.datetime.min.replace(tzinfo=dt.timezone.utc)


def datetime_to_int(datetime: dt.datetime) -> int:
    """Convert a time to a priority: the 17 digits YYYYMMDDhhmmssmmm of its UTC time.

    Args:
        datetime: an aware time of any zone, or a naive one, which is taken as UTC. What is finer
            than a millisecond is cut off. A zone that moves the time past the year 9999 (or
            before year 1) gives the last (first) millisecond there is.

    Raises:
        TypeError: not a `datetime.datetime`.

    >>> datetime_to_int(dt.datetime(2018, 1, 2, 3, 4, 56, 789123))
    20180102030456789
    """
    if not isinstance(datetime, dt.datetime):
        raise TypeError(f"datetime_to_int() takes a datetime.datetime, not {datetime!r}.")
    if datetime.tzinfo is not None and datetime.tzinfo is not dt.timezone.utc:
        try:
            datetime = datetime.astimezone(dt.timezone.utc)
        except OverflowError:
            return _LAST_MILLISECOND if datetime.year > 1 else _FIRST_MILLISECOND
    date = (datetime.year * 100 + datetime.month) * 100 + datetime.day
    time = (datetime.hour * 100 + datetime.minute) * 100 + datetime.second
    return (date * 1_000_000 + time) * 1000 + datetime.microsecond // 1000


def priority_to_datetime(priority: int) -> dt.datetime | None:
    """Convert a priority to the aware UTC time that its digits spell, or None where they spell none.

    >>> priority_to_datetime(20180102030456789)
    datetime.datetime(2018, 1, 2, 3, 4, 56, 789000, tzinfo=datetime.timezone.utc)
    """
    rest, milliseconds = divmod(priority, 1000)
    rest, second = divmod(rest, 100)
    rest, minute = divmod(rest, 100)
    rest, hour = divmod(rest, 100)
    rest, day = divmod(rest, 100)
    year, month = divmod(rest, 100)
    try:
        return dt.datetime(year, month, day, hour, minute, second, milliseconds * 1000, dt.timezone.utc)
    except ValueError:
        return None


def shifted(moment: dt.datetime, by: dt.timedelta) -> dt.datetime:
    """Return ``moment + by``, where the calendar ends its last (or first) microsecond in UTC.

    Needed because a delay of `datetime.timedelta.max` is a legal way to say "never".
    """
    try:
        return moment + by
    except OverflowError:
        return _LAST_MOMENT if by > ZERO_SECS else _FIRST_MOMENT


class State(int):
    """One of the five states of a task: an int with a name.

    >>> State.waiting
    State(2, 'waiting')
    >>> State.waiting == 2, State.waiting.name, str(State.waiting)
    (True, 'waiting', 'waiting')
    """

    name: str
    created: ClassVar[State]
    waiting: ClassVar[State]
    working: ClassVar[State]
    finished: ClassVar[State]
    canceled: ClassVar[State]

    def __new__(cls, number: int, name: str) -> State:
        state = super().__new__(cls, number)
        state.name = name
        return state

    def __reduce__(self) -> tuple[type[State], tuple[int, str]]:
        # copy and pickle would call __new__ without the name.
        return type(self), (int(self), self.name)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"State({int(self)}, {self.name!r})"

    @classmethod
    def of(cls, state: StateLike) -> State:
        """Return the state that a `State`, a name or a number means.

        Raises:
            ValueError: no state has that name or number.
            TypeError: neither a `State`, nor a str, nor an int (a bool is none).

        >>> State.of("finished"), State.of(5)
        (State(4, 'finished'), State(5, 'canceled'))
        """
        if type(state) is State and _STATES_BY_NUMBER.get(state) is state:
            return state
        if isinstance(state, str):
            found = _STATES_BY_NAME.get(state)
        elif isinstance(state, int) and not isinstance(state, bool):
            found = _STATES_BY_NUMBER.get(int(state))
        else:
            raise TypeError(f"A state is a State, a name or a number, not {state!r}. {_STATES_HELP}")
        if found is None:
            raise ValueError(f"There is no state {state!r}. {_STATES_HELP}")
        return found


State.created = State(1, "created")
State.waiting = State(2, "waiting")
State.working = State(3, "working")
State.finished = State(4, "finished")
State.canceled = State(5, "canceled")

_STATES = [State.created, State.waiting, State.working, State.finished, State.canceled]
_STATES_BY_NAME = {state.name: state for state in _STATES}
_STATES_BY_NUMBER = {int(state): state for state in _STATES}
_STATES_HELP = "The states are " + ", ".join(f"{int(state)} {state.name}" for state in _STATES) + "."
_UNKNOWN = State(0, "unknown")

#: The statuses of waiting and working tasks are from the first of these to below the second.
FIRST_LIVE, END_OF_LIVE = 2 * 10**18, 4 * 10**18


class Status(int):
    """The status of a task: state, priority and attempts in one int.

    ``Status(number)`` takes any integer; use `combine` or the constructor named after a state
    (`created`, `waiting`, `working`, `finished`, `canceled`) to make one with checks.

    >>> status = Status(3201801020304567896)
    >>> status.state, status.priority, status.attempts
    (State(3, 'working'), 20180102030456789, 6)
    >>> Status.canceled(123, 5)
    Status(5000000000000001235)
    """

    __slots__ = ()  # an int and nothing else: made faster, and smaller, than one with a dict

    state_offset: ClassVar[int] = 10**18
    states: ClassVar[list[State]] = _STATES
    max_attempts: ClassVar[int] = 9

    @property
    def state(self) -> State:
        """The `State`; ``State(0, 'unknown')`` for a foreign number."""
        return _STATES_BY_NUMBER.get(int(self) // self.state_offset, _UNKNOWN)

    @property
    def priority(self) -> int:
        """The 17 digits in the middle as an int, 0 to 10**17 - 1; lower runs first."""
        return abs(int(self)) // 10 % _PRIORITY_LIMIT

    @property
    def attempts(self) -> int:
        """How often the task was tried, 0 to 9, where 9 stands for more, too."""
        return abs(int(self)) % 10

    def parse(self) -> tuple[State, dt.datetime | int, int]:
        """Return (state, priority, attempts), the priority as an aware UTC time where it is one.

        ``Status.combine(*status.parse()) == status`` for every status that is not foreign.

        >>> Status(3000000000000000007).parse()
        (State(3, 'working'), 0, 7)
        """
        priority = self.priority
        moment = priority_to_datetime(priority)
        return self.state, priority if moment is None else moment, self.attempts

    @classmethod
    def combine(cls, state: StateLike, priority: Priority, attempts: int) -> Status:
        """Pack a status.

        Args:
            state: a `State`, its name or its number.
            priority: a time (see `datetime_to_int`) or an int, 0 to 10**17 - 1; lower runs first.
            attempts: 0 to 9.

        Raises:
            TypeError: an argument has the wrong type (bool, float, str and None included).
            ValueError: an argument is out of its range.

        >>> Status.combine("waiting", dt.datetime(2018, 1, 2, 3, 4, 56, 789123), 3)
        Status(2201801020304567893)
        """
        digit = State.of(state)
        digits = datetime_to_int(priority) if isinstance(priority, dt.datetime) else priority
        if not isinstance(digits, int) or isinstance(digits, bool):
            raise TypeError(f"A priority is a datetime or an int from 0 to 10**17 - 1, not {priority!r}.")
        if not 0 <= digits < _PRIORITY_LIMIT:
            raise ValueError(
                f"The priority {int(digits)} does not fit into 17 digits. Use an int from 0 to 10**17 - 1."
            )
        if not isinstance(attempts, int) or isinstance(attempts, bool):
            raise TypeError(f"Attempts are an int from 0 to {cls.max_attempts}, not {attempts!r}.")
        if not 0 <= attempts <= cls.max_attempts:
            raise ValueError(f"Attempts are one digit, 0 to {cls.max_attempts}, not {int(attempts)}.")
        return cls(int(digit) * cls.state_offset + int(digits) * 10 + int(attempts))

    @classmethod
    def created(cls, priority: Priority | None = None, attempts: int = 0) -> Status:
        """Return a status *created*: the task exists but must not run yet. See `waiting`."""
        return cls._constructed(State.created, priority, attempts)

    @classmethod
    def waiting(cls, priority: Priority | None = None, attempts: int = 0) -> Status:
        """Return a status *waiting*: the task may run when its priority is due.

        Args:
            priority: a time or an int as in `combine`; None means now.
            attempts: 0 to 9.
        """
        return cls._constructed(State.waiting, priority, attempts)

    @classmethod
    def working(cls, priority: Priority | None = None, attempts: int = 0) -> Status:
        """Return a status *working*: a worker has claimed the task. See `waiting`."""
        return cls._constructed(State.working, priority, attempts)

    @classmethod
    def finished(cls, priority: Priority | None = None, attempts: int = 0) -> Status:
        """Return a status *finished*: the action returned. See `waiting`."""
        return cls._constructed(State.finished, priority, attempts)

    @classmethod
    def canceled(cls, priority: Priority | None = None, attempts: int = 0) -> Status:
        """Return a status *canceled*: given up. See `waiting`."""
        return cls._constructed(State.canceled, priority, attempts)

    @classmethod
    def _constructed(cls, state: State, priority: Priority | None, attempts: int) -> Status:
        if priority is None and type(attempts) is int and 0 <= attempts <= cls.max_attempts:
            # The default of each new row, so without a check of what is right by itself.
            return cls(state * cls.state_offset + datetime_to_int(now()) * 10 + attempts)
        return cls.combine(state, now() if priority is None else priority, attempts)

    @classmethod
    def minimum(cls, state: StateLike) -> int:
        """Return the smallest number of a state.

        >>> Status.minimum("working")
        3000000000000000000
        """
        return int(State.of(state)) * cls.state_offset

    @classmethod
    def maximum(cls, state: StateLike) -> int:
        """Return the largest number of a state.

        >>> Status.maximum("working")
        3999999999999999999
        """
        return (int(State.of(state)) + 1) * cls.state_offset - 1

    @classmethod
    def filter(cls, field: str, state: StateLike) -> dict[str, int]:
        """Return keyword arguments for ``queryset.filter(**...)`` that keep the rows in a state.

        Works on a plain `BigIntegerField` too, and uses its index.

        >>> Status.filter("status", "waiting")
        {'status__gte': 2000000000000000000, 'status__lte': 2999999999999999999}
        """
        return {f"{field}__gte": cls.minimum(state), f"{field}__lte": cls.maximum(state)}

    @classmethod
    def tally(cls, queryset: QuerySet[Any] | Manager[Any], field: str) -> dict[str, int]:
        """Count the tasks of a queryset by state, in one query.

        Returns:
            The five names of the states, in order, each with its count, zero included. NULL and
            foreign numbers are left out.

        Raises:
            TypeError: `queryset` is none, nor a manager.
        """
        from django.db.models import Count, Manager, Q, QuerySet  # here: the number itself needs no Django

        given: object = queryset
        if not isinstance(given, (QuerySet, Manager)):
            name = getattr(given, "__name__", "Task")
            raise TypeError(
                f"tally() counts a QuerySet or a Manager, not {given!r}. Give for example {name}.objects."
            )
        counts = {
            f"modelqueue_{state.name}": Count(field, filter=Q(**cls.filter(field, state)))
            for state in cls.states
        }
        result = queryset.all().aggregate(**counts)
        return {state.name: result[f"modelqueue_{state.name}"] for state in cls.states}

    def __reduce__(self) -> tuple[type[Status], tuple[int]]:
        return type(self), (int(self),)

    def __str__(self) -> str:
        state, when, attempts = self.parse()
        words = _in_words(when) if isinstance(when, dt.datetime) else f"{when} priority"
        return f"{state}; {words}; {attempts} attempts"

    def __repr__(self) -> str:
        return f"Status({int(self)})"


def _in_words(moment: dt.datetime) -> str:
    """Say a time as people do (``3 hours ago``); as digits where Django can not translate yet."""
    from django.contrib.humanize.templatetags.humanize import naturaltime
    from django.core.exceptions import AppRegistryNotReady, ImproperlyConfigured

    try:
        words = str(naturaltime(moment))  # here: "now" is a lazy translation
    except (AppRegistryNotReady, ImproperlyConfigured, ArithmeticError, ValueError):
        return moment.isoformat(sep=" ", timespec="milliseconds")
    # Django binds number and unit by a no-break space, which nobody can type into a search.
    return words.replace("\xa0", " ")
