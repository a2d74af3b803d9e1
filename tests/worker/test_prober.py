"""The prober: what it finds, what it asks the database, and what it does when that, or a queue, fails."""

import datetime as dt
import time
from types import SimpleNamespace

import pytest
from django.db import OperationalError, ProgrammingError, connection
from django.db.models.sql.compiler import SQLCompiler
from django.test.utils import CaptureQueriesContext

import modelqueue
from modelqueue import Status, clock
from modelqueue.engines import engine_for, note_full
from modelqueue.queues import declared_queues
from modelqueue.worker import database_clock, prober
from modelqueue.worker.database_clock import DatabaseClock
from modelqueue.worker.prober import Prober, Seen
from tests.actions import LONG_AGO, MILLISECOND, SECOND, succeed
from tests.faults.harm import end_session
from tests.pace import within
from tests.processes import wait_until
from tests.testapp.models import Errand, Task
from tests.testapp.queues import do_errand, review

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def found():
    return []


def note_in(found):
    """Return what writes down what is due, and what is expired."""
    return lambda seen: found.append((None, []) if seen is None else (seen.due, list(seen.expired)))


@pytest.fixture
def look(found):
    """Make a prober of some queues; return its look, and what it passes on in `found`."""

    def make(*queues, poll=1.0):
        one = Prober(list(queues), poll, note_in(found))
        one._clock = DatabaseClock("default")
        one._clock._next, one._clock._ahead = time.monotonic() + 60, time.time() - clock.steady()
        return one

    return make


@pytest.mark.usefixtures("unprepared")
def test_abandoned_tasks_of_all_queues_are_found_by_one_statement_and_due_ones_by_two(look, found):
    Errand.objects.create(status=Status.created(1), review_status=Status.working(5))
    one = look(do_errand, review)
    one._look()  # of each session MySQL is asked once whether it is with a cluster
    with CaptureQueriesContext(connection) as queries:
        one._look()
    assert found == [([], ["testapp.review"])] * 2
    assert len(queries) == 1
    found.clear()
    Errand.objects.create()
    one._look()
    with CaptureQueriesContext(connection) as queries:
        one._look()
    assert found == [(["testapp.do_errand"], ["testapp.review"])] * 2
    assert len(queries) == 2  # which of those are to run alone


def test_tasks_on_their_last_attempt_are_found_apart(declare):
    """A worker runs them alone."""
    seen = []
    declare(Task, "status", name="once", retry=0)(succeed)
    declare(Task, "status", name="ever", retry=None)(succeed)
    queues = [queue for queue in declared_queues() if queue.name in ("once", "ever", do_errand.name)]
    one = Prober(queues, 1.0, seen.append)
    Errand.objects.create(status=Status.waiting(5, 2))
    Task.objects.create(status=Status.waiting(5, 0))
    one._look()
    assert seen[-1] == Seen(["ever", "once"], ["testapp.do_errand"], {})
    Errand.objects.create(status=Status.waiting(5, 1))
    one._look()
    assert sorted(seen[-1].due) == ["ever", "once", "testapp.do_errand"]
    assert seen[-1].alone == ["testapp.do_errand"]


def test_last_attempts_are_looked_for_once_a_second_while_others_are_due(monkeypatch):
    monkeypatch.setattr(prober, "_FOR_LAST_ATTEMPTS", 600.0)
    seen = []
    one = Prober([do_errand], 1.0, seen.append)
    other = Errand.objects.create(status=Status.waiting(5))
    one._look()
    last = Errand.objects.create(status=Status.waiting(5, 2))
    one._look()
    assert [look.alone for look in seen] == [[], []]
    other.delete()
    one._look()
    assert (seen[-1].due, seen[-1].alone) == ([], ["testapp.do_errand"])
    other.save()
    last.delete()
    one._look()
    assert (seen[-1].due, seen[-1].alone) == (["testapp.do_errand"], ["testapp.do_errand"])


class Sweeping:
    """Says of each look in turn whether it is to be one at all rows."""

    pays = True

    def __init__(self, *turns):
        self.turns = list(turns)
        self.noted = []

    def is_due(self, now):
        return self.turns.pop(0)

    def note(self, was_whole, now, seconds):
        self.noted.append(was_whole)


def test_what_appears_below_the_bounds_is_found_by_the_next_look_at_all_and_from_then_on(look, found):
    one = look(do_errand, review)
    one._questions.sweeps["default"] = sweeps = Sweeping(True, False, True, False)
    one._look()
    Errand.objects.create(status=Status.waiting(5), review_status=Status.working(5))
    for _ in range(3):
        one._look()
    everything = (["testapp.do_errand"], ["testapp.review"])
    assert found == [([], []), ([], []), everything, everything]
    assert sweeps.noted == [True, False, True, False]


def test_what_becomes_due_after_a_look_is_above_its_bounds(look, found):
    one = look(do_errand)
    one._questions.sweeps["default"] = Sweeping(True, False)
    one._look()
    Errand.objects.create()
    one._look()
    assert found == [([], []), (["testapp.do_errand"], [])]


def test_drain_looks_at_all_before_it_says_that_nothing_is_due(found):
    one = Prober([do_errand], 1.0, note_in(found), is_certain=True)
    one._questions.sweeps["default"] = Sweeping(True, False, False)
    one._look()
    Errand.objects.create(status=Status.waiting(5))
    for _ in range(2):
        one._look()
    assert found == [([], []), (["testapp.do_errand"], []), (["testapp.do_errand"], [])]


def test_tasks_on_their_last_attempt_at_the_head_are_read_once_for_others(look, monkeypatch):
    """There may be very many of them, and none of them is for an ordinary process."""
    one, asked, engine = look(do_errand), [], type(engine_for("default"))
    one._questions.sweeps["default"] = Sweeping(True, False)
    last, other = Errand.objects.create(status=Status.waiting(5, 2)), Errand.objects.create()
    one._look()
    probe = engine.probe
    monkeypatch.setattr(
        engine, "probe", lambda self, some, is_usual: asked.extend(some) or probe(self, some, is_usual)
    )
    one._look()
    [shared] = [question for question in asked if question.source.below is not None]
    assert last.status < shared.first <= other.status


def test_first_task_on_its_last_attempt_is_no_bound_for_others(look, found):
    one = look(do_errand)
    one._questions.sweeps["default"] = Sweeping(True, False)
    Errand.objects.create(status=Status.waiting(LONG_AGO))
    last = Errand.objects.create(status=Status.waiting(attempts=2))
    one._look()
    last.delete()
    one._look()
    assert found == [(["testapp.do_errand"], [])] * 2


@pytest.mark.parametrize("pays", [True, False])
def test_hint_is_followed_from_the_bounds_on_where_these_save_much(pays, look, monkeypatch):
    """It is of what has just been made due."""
    one = look(do_errand, review)
    one._questions.sweeps["default"] = Sweeping(True)
    one._look()
    monkeypatch.setattr(Sweeping, "pays", pays)
    Errand.objects.create(status=Status.waiting(5), review_status=Status.waiting())
    assert one._perhaps_due([do_errand, review]) == ["testapp.do_errand"] * (not pays) + ["testapp.review"]


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


def test_question_is_compiled_once_where_the_queryset_is_always_the_same(look, found, declare, monkeypatch):
    """That takes Django longer than the database takes to answer."""
    rows = Task.objects.filter(data__in=["mine", "too"])
    mine = declare(rows, "status", name="mine")(succeed)
    one, compiled, compile_it = look(mine, do_errand), [], SQLCompiler.as_sql
    one._look()
    monkeypatch.setattr(
        SQLCompiler, "as_sql", lambda self, *args, **kw: compiled.append(1) or compile_it(self)
    )
    moment = modelqueue.now()
    with clock.use(lambda: moment):
        one._look()
    assert compiled == []
    for title in ("mine", "theirs"):
        Task.objects.create(data=title, status=Status.waiting(moment + SECOND))
    with clock.use(lambda: moment):
        one._look()
    with clock.use(lambda: moment + SECOND):
        one._look()
        assert mine.claim(5) == [Task.objects.get(data="mine")]
        one._look()
    assert [due for due, _ in found] == [[], [], [], ["mine"], []]


def test_queryset_that_is_made_anew_may_be_another_each_time(look, found, declare):
    titles = ["first"]
    queue = declare(lambda: Task.objects.filter(data=titles[-1]), "status", name="changing")(succeed)
    one = look(queue)
    Task.objects.create(data="second")
    one._look()
    assert queue.claim(5) == []
    titles.append("second")
    one._look()
    assert [due for due, _ in found] == [[], ["changing"]]
    assert len(queue.claim(5)) == 1


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
    one = Prober([do_errand, elsewhere], 1.0, note_in(found))
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

    def fail(*arguments):
        nonlocal times
        times -= 1
        if times >= 0:
            raise error
        return probe(*arguments)

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


def test_nothing_is_recovered_as_long_as_the_disk_is_full_and_until_all_have_had_time_to_renew(look, found):
    """Who lives may find no room to renew, and the one that recovers finds the last."""
    Errand.objects.create(status=Status.working(5))
    one = look(do_errand)
    note_full("other")
    one._look()
    note_full("default")
    one._look()
    one._look()
    assert [expired for _, expired in found] == [["testapp.do_errand"], [], []]
    assert one._held_back["testapp.do_errand"] > time.monotonic() + do_errand.lease.total_seconds() - 1


def test_longest_lease_of_a_field_is_what_all_have_to_renew_in(look, found, declare, monkeypatch):
    """That counts for recovery, whatever queue of the field a worker serves."""
    declare(Task, "status", name="long", lease=dt.timedelta(minutes=10))(succeed)
    short = declare(Task, "status", name="short", lease=3 * SECOND)(succeed)
    Task.objects.create(status=Status.working(5))
    one = look(short)
    failing(one, 1, OperationalError("away"))
    one._look()
    one._look()
    now, later = time.monotonic(), 0.0
    monkeypatch.setattr(prober.time, "monotonic", lambda: now + later)
    for minutes in (9, 11):
        one._last_look = None  # nobody has stood still
        later = minutes * 60
        one._look()
    assert [expired for _, expired in found] == [[], [], [], ["short"]]


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


def test_who_waited_for_a_cluster_has_nothing_recovered_until_all_have_had_time_to_renew(
    look, found, monkeypatch
):
    """While it commits nothing, as it has just lost a node, it answers questions all the same."""
    Errand.objects.create(status=Status.working(5))
    one = look(do_errand)
    one._clock.follow = lambda: 0.0
    one._look()
    actual, gap = time.monotonic, 0.0

    def catch_up(engine):
        nonlocal gap
        gap = 2.5
        return True

    monkeypatch.setattr(prober.time, "monotonic", lambda: actual() + gap)
    monkeypatch.setattr(type(prober.engine_for("default")), "catch_up", catch_up)
    one._look()
    assert [expired for _, expired in found] == [["testapp.do_errand"], []]


def test_server_that_takes_part_in_nothing_is_away_and_no_fault_of_a_queue(look, found, monkeypatch):
    one = look(do_errand)
    monkeypatch.setattr(type(prober.engine_for("default")), "is_away", lambda self, error: True)
    monkeypatch.setattr(one, "_probe", raising_away)
    one._look()
    assert (found, one.left_out) == ([(None, [])], [])


def raising_away(*arguments):
    raise OperationalError(1047, "WSREP has not yet prepared node for application use")


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

    def fail(using, queues, is_whole):
        if broken in queues:
            raise error("no such table")
        return probe(using, queues, is_whole)

    one._probe = fail
    one._look()
    assert found == [(["testapp.do_errand"], [])]
    assert "broken: its tasks can not be looked for" in caplog.text
    assert "Are all migrations applied?" in caplog.text


def test_it_looks_often_while_there_is_work_and_ever_less_often_after_that(look, found, monkeypatch):
    monkeypatch.setattr(prober, "_LATELY", 0.3)
    one = look(do_errand, poll=30.0)
    began = time.monotonic()
    one.start()
    try:
        wait_until(lambda: len(found) >= 12)
        assert time.monotonic() - began > 1.9  # as often as at first it would take 1.1 s
        assert not one.has_ended
    finally:
        one.stop()
        one._thread.join(10)
    assert one.has_ended


def test_it_goes_on_to_look_where_something_has_expired(look, found, monkeypatch):
    """It is recovered when it was seen twice, and a row that is locked for long is seen again and again."""
    monkeypatch.setattr(prober, "_LATELY", 0.0)
    monkeypatch.setattr(prober, "_LONGEST_WITH_EXPIRED", 0.1)
    Errand.objects.create(status=Status.working(5))
    one = look(do_errand, poll=600.0)
    one.start()
    began = time.monotonic()
    try:
        wait_until(lambda: len(found) >= 30)  # with pauses that grow it would take 118 s
    finally:
        one.stop()
        one._thread.join(10)
    assert time.monotonic() - began < within(20)


def test_it_ends_when_it_is_stopped_during_a_pause(look):
    one = look(do_errand, poll=60.0)
    one._active_until = 0.0
    one.start()
    one.stop()
    one._thread.join(10)
    assert one.has_ended


# What somebody has told


@pytest.fixture
def hinted():
    return []


@pytest.fixture
def ask(found, hinted, monkeypatch):
    """Start a prober of some queues that looks once a minute; return it."""
    monkeypatch.setattr(prober, "_LATELY", 0.0)
    monkeypatch.setattr(prober, "_GROWTH", 1000.0)
    started = []

    def ask(*queues):
        one = Prober(list(queues), 60.0, note_in(found), hinted.append)
        one.start()
        started.append(one)
        wait_until(lambda: found)
        return one

    yield ask
    for one in started:
        one.stop()
        one._thread.join(10)
        assert one.has_ended


def test_queue_of_which_somebody_has_told_is_passed_on_without_a_question(ask, hinted):
    """The claim asks anyhow."""
    one = ask(do_errand, review)
    one.ask(["testapp.do_errand"])
    wait_until(lambda: hinted)
    assert hinted == [["testapp.do_errand"]]
    with CaptureQueriesContext(connection) as queries:
        one._perhaps_due([do_errand])
    assert len(queries) == 0


def test_of_several_queues_those_with_due_tasks_are_passed_on(ask, hinted):
    one = ask(do_errand, review)
    Errand.objects.create()
    one.ask(["testapp.do_errand", "testapp.review", "gone"])
    wait_until(lambda: hinted)
    assert hinted == [["testapp.do_errand"]]


def test_it_looks_soon_after_somebody_has_told(ask, found, hinted):
    """The task may be due a moment later by our clock."""
    one = ask(do_errand, review)
    count = len(found)
    one.ask(["testapp.do_errand", "testapp.review"])
    wait_until(lambda: len(found) > count, 20)
    assert hinted == []


def test_those_who_tell_at_the_same_time_get_one_question(look, hinted):
    one = look(do_errand, review)
    one._hinted = hinted.append
    one.ask(["testapp.do_errand"])
    assert hinted == [["testapp.do_errand"]]  # at once, in whatever thread that is
    not_before = one._not_before
    one._ask_what_is_wanted()
    assert one._not_before == not_before  # there was nothing to rest from
    one._not_before = time.monotonic() + 0.2
    for _ in range(100):
        one.ask(["testapp.do_errand"])
    assert len(hinted) == 1
    before = time.monotonic()
    one._ask_what_is_wanted()
    assert hinted == [["testapp.do_errand"]] * 2
    assert before < one._not_before < time.monotonic() + within(1)


def test_there_is_a_rest_between_two_questions(look, hinted, monkeypatch):
    monkeypatch.setattr(prober, "_SHORTEST_WANTED", 0.3)
    one = look(do_errand)
    moments = []
    one._hinted = lambda names: moments.append(time.monotonic())
    for _ in range(2):
        one.ask(["testapp.do_errand"])
        one._ask_what_is_wanted()
    assert moments[1] - moments[0] >= 0.29


def test_question_that_fails_is_left_to_the_next_look(ask, found, hinted, caplog):
    one = ask(do_errand, review)

    def fail(queues):
        raise OperationalError("away")

    one._perhaps_due = fail
    count = len(found)
    one.ask(["testapp.do_errand", "testapp.review"])
    wait_until(lambda: len(found) > count, 20)
    assert hinted == []
    assert caplog.text == ""


def test_pause_that_is_cut_short_does_not_hide_that_the_machine_stood_still(look, monkeypatch):
    """What it was to wait is what it has waited, but in the last second."""
    one = look(do_errand)
    times = iter([0.0, 1.0, 1.0, 21.0, 21.0, 21.0])
    monkeypatch.setattr(prober.time, "monotonic", lambda: next(times, 21.0))
    waits = iter([False, False, True])
    one._is_wanted = SimpleNamespace(wait=lambda seconds: next(waits), clear=lambda: None)
    monkeypatch.setattr(one, "_ask_what_is_wanted", one._is_stopped.set)
    assert one._rest(30.0) == 2.0


# The clock of the database


class Ahead:
    """An engine whose database is ahead by so many seconds; None: it does not tell."""

    def __init__(self, *seconds):
        self.seconds = list(seconds)

    def clock_offset(self):
        seconds = self.seconds.pop(0)
        if isinstance(seconds, Exception):
            raise seconds
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
    assert abs(one.follow()) < 1
    before = modelqueue.now()
    monkeypatch.setattr(
        clock, "dt", SimpleNamespace(datetime=Hourly, timezone=dt.timezone, timedelta=dt.timedelta)
    )
    assert modelqueue.now() - before < 60 * SECOND
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


def test_nothing_is_taken_back_at_first_by_a_clock_that_may_have_been_set_a_moment_ago(found, monkeypatch):
    """Workers that live stamp their leases by what it said before, for a minute."""
    monkeypatch.setattr(database_clock, "engine_for", lambda using: Ahead(600))
    Errand.objects.create()
    Errand.objects.create(status=Status.working())
    one = Prober([do_errand], 1.0, note_in(found))
    one._look()
    assert found == [(["testapp.do_errand"], [])]
    assert one.holds_back == ["testapp.do_errand"]
    assert one._held_back["testapp.do_errand"] > time.monotonic() + database_clock.INTERVAL


@pytest.mark.parametrize("failure", [None, OperationalError("away")])
def test_time_jumps_when_the_clock_of_the_database_is_read_late(failure, monkeypatch):
    """What was stamped until then, by the clock of the machine, may be old."""
    engine = Ahead(failure, 600)
    monkeypatch.setattr(database_clock, "engine_for", lambda using: engine)
    one = DatabaseClock("default")
    assert abs(one.follow()) < 1
    one._next = 0.0
    assert abs(one.follow() - 600) < 1


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
