"""The prober: what it finds, what it asks the database, and what it does when that, or a queue, fails."""

import datetime as dt
import time
from types import SimpleNamespace

import pytest
from django.db import OperationalError, ProgrammingError, connection
from django.test.utils import CaptureQueriesContext

import modelqueue
from modelqueue import Status, clock
from modelqueue.engines import engine_for
from modelqueue.worker import database_clock, prober
from modelqueue.worker.database_clock import DatabaseClock
from modelqueue.worker.prober import Prober
from tests.actions import MILLISECOND, SECOND, succeed
from tests.faults.harm import end_session
from tests.testapp.models import Errand, Task
from tests.testapp.queues import do_errand, review

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def found():
    return []


@pytest.fixture
def look(found):
    """Make a prober of some queues; return its look, and what it passes on in `found`."""

    def make(*queues, poll=1.0):
        one = Prober(list(queues), poll, lambda due, expired: found.append((due, expired)))
        one._clock = DatabaseClock("default")
        one._clock._next, one._clock._ahead = time.monotonic() + 60, time.time() - clock.steady()
        return one

    return make


def test_due_and_abandoned_tasks_of_all_queues_are_found_by_one_statement(look, found):
    Errand.objects.create(review_status=Status.working(5))
    one = look(do_errand, review)
    with CaptureQueriesContext(connection) as queries:
        one._look()
    assert found == [(["testapp.do_errand"], ["testapp.review"])]
    assert len(queries) == 1


def test_nothing_is_found_where_nothing_is_due(look, found):
    Errand.objects.create(status=Status.waiting(modelqueue.now() + 60 * SECOND))
    Errand.objects.create(status=Status.working())
    look(do_errand, review)._look()
    assert found == [([], [])]


def test_what_becomes_due_while_the_question_is_put_is_found(look, found):
    moment = modelqueue.now()
    Errand.objects.create(status=Status.waiting(moment + 5 * MILLISECOND))
    with clock.use(lambda: moment):
        look(do_errand, review)._look()
    assert found == [(["testapp.do_errand"], [])]


def test_queue_without_rows_is_looked_at(look, found, declare):
    none = declare(Task.objects.none(), "status", name="none")(succeed)
    look(none)._look()
    assert found == [([], [])]


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_each_database_is_asked_for_tasks_and_the_first_alone_for_the_time(found, declare, monkeypatch):
    """A process has one clock: by two databases it would be set to and fro."""
    asked = []

    def engine(using):
        asked.append(using)
        return Ahead(0)

    monkeypatch.setattr(database_clock, "engine_for", engine)
    elsewhere = declare(Task.objects.using("other"), "status", name="elsewhere")(succeed)
    Errand.objects.create()
    Task.objects.using("other").create()
    one = Prober([do_errand, elsewhere], 1.0, lambda due, expired: found.append((due, expired)))
    for _ in range(2):
        one._look()
    assert found == [(["testapp.do_errand", "elsewhere"], [])] * 2
    assert asked == ["default"]


def test_lease_that_never_ends_is_never_abandoned(look, found, declare):
    forever = declare(Task, "status", name="forever", lease=dt.timedelta.max)(succeed)
    Task.objects.create()
    Task.objects.create(status=Status.working(5))
    look(forever)._look()
    assert found == [(["forever"], [])]


def failing(prober, times, error):
    probe = prober._probe
    prober._meets_everybody = lambda using, error: True

    def fail(using, queues):
        nonlocal times
        times -= 1
        if times >= 0:
            raise error
        return probe(using, queues)

    prober._probe = fail


def test_outage_is_told_once_and_nothing_is_known_meanwhile(look, found, caplog):
    Errand.objects.create()
    one = look(do_errand)
    failing(one, 2, OperationalError("away"))
    for _ in range(4):
        one._look()
    assert [due for due, _ in found] == [None, None, ["testapp.do_errand"], ["testapp.do_errand"]]
    assert caplog.text.count("does not answer, trying again: away") == 1
    assert caplog.text.count("answers again") == 1


def test_who_was_cut_off_has_nothing_recovered_until_all_have_had_time_to_renew(look, found, monkeypatch):
    """After an outage longer than the lease those of living workers have expired, too."""
    Errand.objects.create(status=Status.working(5))
    one = look(do_errand)
    one._look()
    failing(one, 1, OperationalError("away"))
    one._look()
    one._look()
    assert [expired for _, expired in found] == [["testapp.do_errand"], [], []]
    now = time.monotonic()
    later = do_errand.lease.total_seconds() + 1
    monkeypatch.setattr(prober.time, "monotonic", lambda: now + later)
    one._look(waited=later)
    assert found[-1] == ([], ["testapp.do_errand"])


@pytest.mark.parametrize("which", ["time", "monotonic"])
def test_who_stood_still_has_nothing_recovered_until_all_have_had_time_to_renew(
    which, look, found, monkeypatch
):
    """A machine that was suspended, for example: its own leases have expired, and are renewed now."""
    Errand.objects.create(status=Status.working(5))
    one = look(do_errand)
    one._look()
    actual, gap = getattr(time, which), 2.5
    one._clock.follow = lambda: 0.0
    monkeypatch.setattr(prober.time, which, lambda: actual() + gap)
    one._look()
    one._look()
    assert [expired for _, expired in found] == [["testapp.do_errand"], [], []]
    one._held_back.clear()
    one._look()
    assert found[-1] == ([], ["testapp.do_errand"])


def test_standstill_costs_a_queue_of_long_leases_nothing(look, found, declare, monkeypatch):
    hours = declare(Task, "status", name="hours", lease=dt.timedelta(hours=1))(succeed)
    Task.objects.create(status=Status.working(5))
    Errand.objects.create(status=Status.working(5))
    one = look(do_errand, hours)
    one._look()
    actual = time.monotonic
    monkeypatch.setattr(prober.time, "monotonic", lambda: actual() + 2.5)
    one._look()
    assert [expired for _, expired in found] == [["testapp.do_errand", "hours"], ["hours"]]
    assert one._held_back["testapp.do_errand"] < prober.time.monotonic() + 4


@pytest.mark.parametrize(("jump", "expired"), [(0.5, ["testapp.do_errand"]), (600.0, []), (-600.0, [])])
def test_clock_that_has_jumped_makes_nothing_look_abandoned(jump, expired, look, found):
    """That of the database was set, and other workers have not seen it yet."""
    Errand.objects.create(status=Status.working(5))
    one = look(do_errand)
    one._clock.follow = lambda: jump
    one._look()
    assert found == [([], expired)]
    if not expired:
        assert one._held_back["testapp.do_errand"] > time.monotonic() + database_clock.INTERVAL


def test_prober_looks_often_again_when_something_has_expired(look):
    """As only what is seen twice is taken back."""
    one = look(do_errand)
    one._active_until = 0.0
    Errand.objects.create(status=Status.working(5))
    one._look()
    assert one._active_until > time.monotonic()
    one._active_until = 0.0
    one._look()
    assert one._active_until == 0.0  # a transaction has locked it, perhaps, for long


@pytest.mark.vendor("postgresql", "mysql")
def test_session_that_ends_when_the_clock_is_to_be_read_is_replaced(look, found):
    Errand.objects.create()
    one = look(do_errand)
    one._look()
    end_session(connection)
    one._clock._next = 0.0
    one._look()
    one._look()
    assert found[-1] == (["testapp.do_errand"], [])


@pytest.mark.vendor("postgresql", "mysql")
def test_session_that_the_server_has_ended_is_replaced(look, found):
    Errand.objects.create()
    one = look(do_errand)
    one._look()
    end_session(connection)
    one._look()
    one._look()
    assert [due for due, _ in found] == [["testapp.do_errand"], None, ["testapp.do_errand"]]


def test_queue_whose_callable_raises_costs_the_others_nothing(look, found, declare, caplog, monkeypatch):
    Errand.objects.create()
    is_broken = []

    def rows():
        if is_broken:
            raise LookupError("broken")
        return Task.objects.all()

    broken = declare(rows, "status", name="broken")(succeed)
    is_broken.append(True)
    Task.objects.create()
    one = look(broken, do_errand)
    one._look()
    one._look()
    assert found == [(["testapp.do_errand"], [])] * 2
    assert caplog.text.count("broken: its tasks can not be looked for") == 1
    assert one.left_out == ["broken"]
    monkeypatch.setattr(one, "_left_out", {"broken": 0.0})  # its time is over
    one._look()
    assert caplog.text.count("broken: its tasks can not be looked for") == 1
    assert found[-1] == (["testapp.do_errand"], [])
    is_broken.clear()
    monkeypatch.setattr(one, "_left_out", {"broken": 0.0})
    one._look()
    assert one.left_out == []
    assert found[-1] == (["broken", "testapp.do_errand"], [])


@pytest.mark.parametrize("error", [ProgrammingError, OperationalError])  # as the databases call it
def test_queue_whose_statement_fails_costs_the_others_nothing(error, look, found, declare, caplog):
    Errand.objects.create()
    broken = declare(Task, "status", name="broken")(succeed)
    one = look(broken, do_errand)
    probe = one._probe

    def fail(using, queues):
        if broken in queues:
            raise error("no such table")
        return probe(using, queues)

    one._probe = fail
    one._look()
    assert found == [(["testapp.do_errand"], [])]
    assert "broken: its tasks can not be looked for" in caplog.text
    assert "Are all migrations applied?" in caplog.text


def test_it_looks_often_while_there_is_work_and_ever_less_often_after_that(look, found, monkeypatch):
    monkeypatch.setattr(prober, "_LATELY", 0.3)
    one = look(do_errand, poll=30.0)
    one.start()
    try:
        time.sleep(3)
        assert 8 <= len(found) <= 22
        assert one.is_alive
    finally:
        one.stop()
        one._thread.join(10)
    assert not one.is_alive


def test_it_ends_when_it_is_stopped_during_a_pause(look):
    one = look(do_errand, poll=60.0)
    one._active_until = 0.0
    one.start()
    one.stop()
    one._thread.join(10)
    assert not one.is_alive


# The clock of the database


class Ahead:
    """An engine whose database is ahead by so many seconds; None: it does not tell."""

    def __init__(self, *seconds):
        self.seconds = list(seconds)

    def clock_offset(self):
        seconds = self.seconds.pop(0)
        return None if seconds is None else seconds * SECOND


@pytest.mark.parametrize(
    ("seconds", "shifted", "told"),
    [(0.01, 0, ""), (0.5, 0.5, ""), (5, 5, "is 5.0 s behind that of"), (-5, -5, "is 5.0 s ahead of that of")],
)
def test_clock_of_the_database_is_followed(seconds, shifted, told, monkeypatch, caplog):
    monkeypatch.setattr(database_clock, "engine_for", lambda using: Ahead(seconds))
    before = modelqueue.now()
    DatabaseClock("default").follow()
    assert abs(modelqueue.now() - before - shifted * SECOND) < SECOND / 4
    assert told in caplog.text
    assert bool(caplog.text) == bool(told)


def test_who_follows_the_clock_goes_on_steadily_when_somebody_sets_that_of_the_machine(monkeypatch):
    engine = Ahead(0, 0)
    monkeypatch.setattr(database_clock, "engine_for", lambda using: engine)
    one = DatabaseClock("default")
    assert one.follow() == 0.0
    before = modelqueue.now()
    monkeypatch.setattr(
        clock, "dt", SimpleNamespace(datetime=Hourly, timezone=dt.timezone, timedelta=dt.timedelta)
    )
    assert modelqueue.now() - before < SECOND
    monkeypatch.setattr(database_clock.time, "time", lambda actual=time.time: actual() + 3600)
    assert 3599 < one.follow() < 3601  # that of SQLite is the same clock
    assert engine.seconds == []
    assert one.follow() == 0.0


class Hourly(dt.datetime):
    """The clock of a machine that was set on by an hour."""

    @classmethod
    def now(cls, tz=None):
        return dt.datetime.now(tz) + dt.timedelta(hours=1)


def test_clock_is_asked_again_soon_after_an_answer_that_took_long(monkeypatch, caplog):
    engine = Ahead(None, None, 0, 7)
    monkeypatch.setattr(database_clock, "engine_for", lambda using: engine)
    one = DatabaseClock("default")
    left = []
    for later in (0, 1, 6, 12, 18):
        now = time.monotonic()
        with monkeypatch.context() as patch:
            patch.setattr(database_clock.time, "monotonic", lambda now=now, later=later: now + later)
            one.follow()
        left.append(len(engine.seconds))
    assert left == [3, 3, 2, 1, 1]
    assert caplog.text.count("takes too long to answer to tell the time") == 1


def test_first_look_at_the_clock_of_the_database_is_no_jump(monkeypatch):
    monkeypatch.setattr(database_clock, "engine_for", lambda using: Ahead(600))
    assert DatabaseClock("default").follow() == 0.0


def test_clock_that_can_not_be_read_ends_nothing(monkeypatch):
    class Away:
        def clock_offset(self):
            raise OperationalError("away")

    monkeypatch.setattr(database_clock, "engine_for", lambda using: Away())
    before = modelqueue.now()
    DatabaseClock("default").follow()
    assert abs(modelqueue.now() - before) < SECOND


@pytest.mark.parametrize("zone", ["UTC", "America/Chicago"])
@pytest.mark.parametrize("use_tz", [True, False])
def test_database_tells_its_clock_in_any_time_zone(zone, use_tz, settings):
    settings.USE_TZ, settings.TIME_ZONE = use_tz, zone
    connection.close()
    try:
        assert abs(engine_for("default").clock_offset()) < 2 * SECOND
    finally:
        connection.close()


def test_clock_is_not_trusted_after_a_long_round_trip(monkeypatch, vendor):
    monkeypatch.setattr("modelqueue.engines.sessions._LONGEST_ROUND_TRIP", -SECOND)
    assert engine_for("default").clock_offset() == (0 * SECOND if vendor == "sqlite" else None)
