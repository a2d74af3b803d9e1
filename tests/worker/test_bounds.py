"""Where claims and looks begin, and when they read all: how much is read, and that nothing waits for long."""

import datetime as dt
import random
from itertools import cycle, islice
from types import SimpleNamespace

import pytest
from django.db import connection, connections
from django.test.utils import CaptureQueriesContext

import modelqueue
from modelqueue import Status, verbs
from modelqueue.engines import engine_for
from modelqueue.source import Source
from modelqueue.worker import claimer
from modelqueue.worker.bounds import Bounds, Sweeps
from modelqueue.worker.claimer import take
from modelqueue.worker.slots import Lane
from tests.actions import LONG_AGO, MILLISECOND, SECOND
from tests.testapp.models import Task

NOON = dt.datetime(2026, 11, 26, 12, tzinfo=dt.timezone.utc)
END = Status.maximum("waiting")


def seen(*keys):
    bounds = Bounds()
    bounds.note(keys)
    return bounds


# Where to begin


def test_nothing_is_known_before_something_was_seen():
    assert Bounds().ranges() == seen().ranges() == []


def test_bound_is_a_little_before_the_last_key_by_the_calendar():
    bounds = seen(Status.waiting(LONG_AGO), Status.waiting(NOON + 100 * MILLISECOND, 3))
    assert bounds.ranges() == [(Status.waiting(NOON - 150 * MILLISECOND), END)]


@pytest.mark.parametrize(("priority", "bound"), [(1_000, 750), (10, 0)])
def test_bound_of_a_number_is_a_little_less(priority, bound):
    assert seen(Status.waiting(priority, 2)).ranges() == [(Status.waiting(bound), END)]


def test_bound_is_not_below_its_band():
    assert seen(Status.waiting(10**15 + 7)).ranges()[0][0] == Status.waiting(10**15)


def test_each_band_is_read_from_a_bound_of_its_own_to_the_begin_of_the_next_one():
    low, high = Status.waiting(3 * 10**15 + 1_000), Status.waiting(NOON)
    assert seen(low, high).ranges() == [
        (low - 2_500, Status.waiting(20 * 10**15) - 1),
        (Status.waiting(NOON - 250 * MILLISECOND), END),
    ]


def test_working_ones_are_read_to_the_last_of_their_state():
    assert seen(Status.working(NOON)).ranges()[0][1] == Status.maximum("working")


def test_bound_goes_back_to_what_was_found_below_it():
    """A sweep may find more there than it can take."""
    bounds = seen(Status.waiting(NOON))
    bounds.note([Status.waiting(LONG_AGO)])
    assert bounds.ranges() == seen(Status.waiting(LONG_AGO)).ranges()


def test_few_bands_are_known_those_seen_last():
    bounds = seen(*[Status.waiting(number * 10**15) for number in (1, 2, 3, 4)])
    bounds.note([Status.waiting(10**15)])
    bounds.note([Status.waiting(NOON)])
    assert [first // 10**16 for first, _ in bounds.ranges()] == [201, 203, 204, 220]


# Whether to read all


def measured(whole, bounded=(), at=0.0):
    """Sweeps of which these costs were measured, as often as it takes, the last one at a time."""
    sweeps = Sweeps()
    for cost in bounded:
        sweeps.note(False, at, *cost)
    for cost in islice(cycle(whole), 4):
        sweeps.note(True, at, *cost)
    return sweeps


def test_all_is_read_until_its_cost_is_known():
    """The first time it takes longer: it has to be compiled."""
    sweeps, due = Sweeps(), []
    for _ in range(5):
        due.append(sweeps.is_due(0.0))
        sweeps.note(True, 0.0, 0.010, 9)
    assert due == [True, True, True, True, False]


def test_all_is_read_each_time_while_that_is_cheap():
    sweeps = measured(whole=[(0.0009, 1)], bounded=[(0.0001, 1)])
    assert [sweeps.is_due(now) for now in (0.0, 0.5)] == [True, True]
    assert not sweeps.pays


def test_bound_is_tried_now_and_then_where_that_saves_little():
    sweeps = measured(whole=[(0.010, 9)], bounded=[(0.009, 9)])
    assert [sweeps.is_due(now) for now in (0.0, 0.2, 0.3)] == [True, True, False]
    assert not sweeps.pays


def test_bound_is_tried_at_once_where_nobody_knows_what_it_saves():
    assert not measured(whole=[(0.010, 9)]).is_due(0.0)


def test_bound_is_used_while_to_read_all_costs_much_more_but_once_a_second():
    sweeps = measured(whole=[(0.010, 9)], bounded=[(0.004, 9)])
    assert [sweeps.is_due(now) for now in (0.0, 0.2, 0.9, 1.0)] == [False, False, False, True]


@pytest.mark.parametrize(("cost", "period"), [(0.05, 1.0), (0.5, 5.0), (60.0, 10.0)])
def test_sweeps_take_a_tenth_of_the_time_at_most_as_long_as_they_are_not_too_rare(cost, period):
    sweeps = measured(whole=[(cost, 9)], bounded=[(0.004, 9)])
    assert [sweeps.is_due(now) for now in (period - 0.01, period)] == [False, True]


def test_after_an_idle_wait_all_is_read_as_soon_as_that_takes_little_of_the_time():
    sweeps = measured(whole=[(0.010, 0)], bounded=[(0.001, 0)])
    assert [sweeps.is_due(now, was_idle=True) for now in (0.09, 0.1)] == [False, True]


def test_measurement_that_was_held_up_by_something_else_does_not_count():
    slow = measured(whole=[(0.004, 9), (0.5, 9)], bounded=[(0.0035, 9)])
    assert not slow.pays
    assert slow.is_due(1.0)
    assert measured(whole=[(0.010, 9)], bounded=[(0.5, 9), (0.003, 9)]).pays


def test_what_is_cheap_again_is_read_as_a_whole_again():
    sweeps = measured(whole=[(0.010, 9)], bounded=[(0.003, 9)])
    assert sweeps.pays
    sweeps.note(True, 1.0, 0.0035, 9)
    assert not sweeps.pays


@pytest.mark.parametrize(
    ("whole", "bounded", "pays"),
    [
        ((0.010, 90), (0.004, 90), True),
        ((0.010, 90), (0.004, 10), False),  # for as many it would take longer
        ((0.010, 10), (0.004, 90), True),
        ((0.010, 1), (0.001, 0), False),  # to find nothing takes no commit
        ((0.010, 0), (0.001, 0), True),
    ],
)
def test_costs_are_compared_for_as_many_tasks(whole, bounded, pays):
    assert measured(whole=[whole], bounded=[bounded]).pays is pays


# That nothing waits for long


class World:
    """A queue under an old snapshot: to read all takes 50 ms, from a bound on 5 ms. Workers take turns."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0
        self.waiting = []
        self.claimed_at = {}
        self.reads = []
        monkeypatch.setattr(claimer.time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(claimer.verbs, "claim", self.claim)

    def key(self, ago=dt.timedelta()):
        return int(Status.waiting(NOON + self.seconds * SECOND - ago))

    def claim(self, ends, limit, engine=None):
        self.reads.append("whole" if ends is ALL else "bounded")
        self.seconds += 0.050 if ends is ALL else 0.005
        rows = sorted(key for key in self.waiting if ends.first <= key <= ends.last)[:limit]
        for key in rows:
            self.waiting.remove(key)
            self.claimed_at.setdefault(key, self.seconds)
        return [SimpleNamespace(row=SimpleNamespace(status=Status(key))) for key in rows]

    def run(self, workers, seconds, limit=10, ahead=3):
        """Let workers claim, while there is always more to do than they take."""
        until = self.seconds + seconds
        while self.seconds < until:
            lately, now = self.key(SECOND), self.key()
            missing = ahead * limit - sum(key > lately for key in self.waiting)
            self.waiting += [now + number for number in range(missing)]
            take(random.choice(workers), ALL, limit)


class Ends(SimpleNamespace):
    def between(self, first, last):
        return Ends(first=first, last=last)


ALL = Ends(first=0, last=10**19)


def worker():
    policy = SimpleNamespace(retry=3)
    queue = SimpleNamespace(name="a", slots=4, is_async=False, shared=None, alone=None, policy=policy)
    return Lane(queue, 4)


@pytest.fixture(params=[1, 3])
def busy(request, monkeypatch):
    """Workers with bounds of their own that have been busy for some time."""
    world = World(monkeypatch)
    workers = [worker() for _ in range(request.param)]
    world.run(workers, 3.0)
    assert world.reads[-20:].count("bounded") > 10
    return world, workers


#: Seconds within which there is a sweep: its period, and what it and the claims between take.
ONE_SWEEP = 1.2


@pytest.mark.parametrize("limit", [1, 10])
@pytest.mark.parametrize(
    "key",
    [
        lambda world: world.key(ago=5 * SECOND),  # committed late, or by a clock that is behind
        lambda world: int(Status.waiting(7)),
        lambda world: int(Status.waiting(NOON - 60 * SECOND, 1)),  # given back under its old status
    ],
    ids=["late commit", "integer priority", "re-queue"],
)
def test_what_appears_below_the_bounds_of_busy_workers_waits_for_one_sweep(key, limit, busy):
    world, workers = busy
    for _ in range(3):
        low, since = key(world), world.seconds
        world.claimed_at.pop(low, None)
        world.waiting.append(low)
        world.run(workers, ONE_SWEEP, limit)
        assert low in world.claimed_at
        assert world.claimed_at[low] - since <= ONE_SWEEP


def test_all_that_appears_below_comes_before_what_is_above(busy):
    """A sweep that is full goes on where it has ended, and not at the bound."""
    world, workers = busy
    low = [world.key(ago=9 * SECOND) + number for number in range(200)]
    world.waiting += low
    world.run(workers, ONE_SWEEP)
    assert set(low) <= set(world.claimed_at)


def test_tasks_of_a_machine_whose_clock_is_behind_wait_for_one_sweep_each(busy):
    world, workers = busy
    late = {}
    for number in range(40):
        low = world.key(ago=3 * SECOND) + number
        late[low] = world.seconds
        world.waiting.append(low)
        world.run(workers, 0.1)
    world.run(workers, ONE_SWEEP)
    assert max(world.claimed_at[low] - since for low, since in late.items()) <= ONE_SWEEP


def test_sweeps_take_little_of_the_time(busy):
    world, workers = busy
    world.reads.clear()
    world.run(workers, 5.0)
    assert world.reads.count("whole") <= 6 * len(workers)
    assert world.reads.count("bounded") > 300


def test_stream_of_a_band_below_is_claimed_at_once(busy):
    """Strict priorities, once a sweep has found the first one."""
    world, workers = busy
    band = int(Status.waiting(10**16))
    world.waiting.append(band)
    world.run(workers, ONE_SWEEP)
    for one in workers:  # each has seen it
        one.bounds.note([band])
    world.reads.clear()
    for number in range(1, 20):
        world.waiting.append(band + 10 * number)
        since = world.seconds
        world.run(workers, 0.05)
        assert world.claimed_at[band + 10 * number] - since < 0.05


def test_what_is_below_is_claimed_by_who_had_nothing_to_do(busy):
    world, workers = busy
    world.waiting.clear()
    take(workers[0], ALL, 10)
    workers[0].sweeps.note(True, world.seconds, 0.050)
    low = world.key(ago=5 * SECOND)
    world.waiting.append(low)
    for waited, is_claimed in [(0.4, False), (0.2, True)]:  # ten times as long as it takes to read all
        world.seconds += waited
        take(workers[0], ALL, 10)
        assert (low in world.claimed_at) is is_claimed


def test_what_was_claimed_in_one_range_is_kept_when_the_next_one_fails(busy, monkeypatch, caplog):
    world, workers = busy
    one, band = workers[0], int(Status.waiting(10**16))
    one.bounds.note([band])
    world.waiting.append(band)
    claim = world.claim
    one.sweeps.note(True, world.seconds, 0.050, 10)

    def fail(ends, limit, engine=None):
        if limit == 9:
            raise ZeroDivisionError
        return claim(ends, limit)

    monkeypatch.setattr(claimer.verbs, "claim", fail)
    assert [claimed.row.status for claimed in take(one, ALL, 10)] == [band]
    assert "a: fewer are claimed" in caplog.text
    with pytest.raises(ZeroDivisionError):
        take(one, ALL, 9)


# What the database gets


@pytest.fixture(params=["auto", "portable"])
def engine(request, settings):
    settings.MODELQUEUE = {"ENGINE": request.param}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "rows",
    [Task.objects.all, lambda: Task.objects.filter(pk__gt=0), lambda: Task.objects.only("status")],
    ids=["plain", "filtered", "loaded"],
)
def test_claim_takes_what_is_between_the_bounds(rows, engine):
    keys = [Status.waiting(LONG_AGO + number * SECOND) for number in range(60)]
    Task.objects.bulk_create([Task(status=key) for key in keys])
    source = Source.of(rows(), "status")
    for first, last in [(keys[50], keys[55]), (keys[20], keys[22])]:  # what is compiled is compiled once
        claims = verbs.claim(source.between(first, last), 5)
        assert [claim.row.status for claim in claims] == keys[keys.index(first) : keys.index(last) + 1][:5]
    assert [claim.row.status for claim in verbs.claim(source, 1)] == keys[:1]


@pytest.mark.django_db(transaction=True)
def test_first_task_of_a_range_is_the_answer_to_a_question():
    now = modelqueue.now()
    keys = [Status.waiting(LONG_AGO + number * SECOND) for number in range(3)]
    Task.objects.bulk_create([Task(status=key) for key in keys])
    due = Source.of(Task.objects, "status").any_due(now)
    asked = [due, due.between(keys[1], END), due.between(keys[1] + 1, keys[2] - 1), due.between(0, keys[0])]
    assert engine_for("default").probe(asked) == [keys[0], keys[1], None, keys[0]]
    assert due.between(0, END)[2:] == due[2:]


FINISHED = 20_000


@pytest.fixture
def finished_under_a_snapshot():
    """Tasks that have ended since somebody else's transaction began, which is open still; the last key."""
    names = [field.column for field in Task._meta.local_concrete_fields if not field.primary_key]
    columns = ", ".join(names)
    values = columns.replace("status", "status + 10 * number")
    Task.objects.create(status=Status.waiting(LONG_AGO))
    other = connections.create_connection("default")
    with connection.cursor() as cursor, other.cursor() as open_for_long:
        # Not into the room that rolled-back rows of other tests have left here and there: a hundred
        # neighbours of the index would be on as many pages.
        cursor.execute("VACUUM FULL testapp_task")
        cursor.execute(
            f"INSERT INTO testapp_task ({columns}) SELECT {values} "
            f"FROM testapp_task, generate_series(1, {FINISHED - 1}) AS numbers (number)"
        )
        last = Status(Task.objects.latest("status").status)
        open_for_long.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        open_for_long.execute("SELECT count(*) FROM testapp_task")
        for _ in range(2):  # working, finished
            cursor.execute(f"UPDATE testapp_task SET status = status + {10**18}")
        cursor.execute("ANALYZE testapp_task")
        yield last
        open_for_long.execute("ROLLBACK")
        cursor.execute("DELETE FROM testapp_task")
        cursor.execute("ANALYZE testapp_task")
    other.close()


def pages_read(work):
    """How many pages the statement of something reads that finds nothing."""
    with CaptureQueriesContext(connection) as queries:
        assert not work()
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {queries[-1]['sql']}")
        ((explained,),) = cursor.fetchall()
    return explained[0]["Plan"]["Shared Hit Blocks"] + explained[0]["Plan"]["Shared Read Blocks"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.vendor("postgresql")
def test_little_is_read_from_a_bound_on_where_the_entries_of_ended_tasks_pile_up(finished_under_a_snapshot):
    now, last = modelqueue.now(), finished_under_a_snapshot
    source, engine = Source.of(Task.objects, "status"), engine_for("default")
    working = Status.combine("working", last.priority, 0)
    due, expired = source.any_due(now), source.any_expired(now)
    [waiting_ends], [working_ends] = seen(last).ranges(), seen(working).ranges()
    for whole, bounded in [
        (lambda: verbs.claim(source, 10), lambda: verbs.claim(source.between(*waiting_ends), 10)),
        (lambda: any(engine.probe([due])), lambda: any(engine.probe([due.between(*waiting_ends)]))),
        (lambda: any(engine.probe([expired])), lambda: any(engine.probe([expired.between(*working_ends)]))),
    ]:
        assert pages_read(whole) > 100
        assert pages_read(bounded) < 50  # of some hundred entries within the overlap
