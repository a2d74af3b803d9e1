"""Queries on the parts of a status say what `Status` says, exactly on 64 bits, and use the index."""

import random

import pytest
from django.db import connection, models
from django.db.models import Count, F, Max, OuterRef, Q, Subquery, Value
from django.db.models.functions import Coalesce

from modelqueue import State, Status, StatusField
from tests.testapp.models import Job, PlainJob, PrintJob, Project

ENDS = [end for state in Status.states for end in (Status.minimum(state), Status.maximum(state))]
FOREIGN = [0, 1, -1, 9, -9, 10, -10, 10**18 - 1, 6 * 10**18, -(10**18), -(2 * 10**18), 2**63 - 1, -(2**63)]
NUMBERS = sorted(
    {*FOREIGN, *ENDS, *(end + 1 for end in ENDS), *(end - 1 for end in ENDS)}
    | {random.Random(number).randrange(-(2**63), 2**63) for number in range(100)}
)

STATES = [State(0, "unknown"), *Status.states]


@pytest.fixture
def jobs(db):
    """A job for each number, and one without."""
    Job.objects.bulk_create([Job(review_status=number) for number in [*NUMBERS, None]])
    return Job.objects.order_by("review_status")


def numbers(queryset):
    """The numbers of the rows, in order, without the type that reading them gives."""
    found = queryset.values_list("review_status", flat=True)
    return sorted((None if number is None else int(number) for number in found), key=lambda n: (n is None, n))


# Values


def test_parts_equal_what_status_says(jobs):
    rows = jobs.filter(review_status__isnull=False).values_list(
        "review_status", "review_status__state", "review_status__priority", "review_status__attempts"
    )
    assert [row[0] for row in rows] == NUMBERS
    for number, *parts in rows:
        assert parts == [number.state, number.priority, number.attempts], number


def test_parts_of_null_are_null(jobs):
    row = jobs.values_list("review_status__state", "review_status__priority", "review_status__attempts")
    assert row.get(review_status=None) == (None, None, None)


def test_state_is_read_as_state(jobs):
    states = set(jobs.values_list("review_status__state", flat=True))
    assert states == {None, 0, 1, 2, 3, 4, 5}
    assert {str(state) for state in states} == {
        *("None", "unknown", "created", "waiting", "working", "finished", "canceled")
    }


@pytest.mark.parametrize("part", ["state", "priority", "attempts"])
def test_rows_are_counted_by_a_part(jobs, part):
    # A GROUP BY that differs in one digit would put a row under its neighbour.
    rows = jobs.order_by().values(f"review_status__{part}").annotate(rows=Count("pk"))
    expected = {None: 1}
    for number in NUMBERS:
        value = getattr(Status(number), part)
        expected[value] = expected.get(value, 0) + 1
    assert {row[f"review_status__{part}"]: row["rows"] for row in rows} == expected


def test_rows_are_ordered_by_a_part(jobs):
    waiting = jobs.filter(review_status__state="waiting")
    found = waiting.order_by("review_status__attempts", "-review_status__priority")
    assert list(found) == sorted(
        waiting, key=lambda job: (job.review_status.attempts, -job.review_status.priority)
    )


def test_part_can_be_aggregated_and_annotated(jobs):
    waiting = jobs.filter(review_status__state="waiting")
    assert waiting.aggregate(last=Max("review_status__priority"))["last"] == 10**17 - 1
    first = waiting.annotate(tries=F("review_status__attempts")).first()
    assert (first.review_status, first.tries) == (Status.minimum("waiting"), 0)


def test_parts_of_an_expression_with_values(jobs):
    jobs.filter(review_status__isnull=False).exclude(review_status__state="working").delete()
    either = Coalesce("review_status", Value(int(Status.waiting(7, 3))), output_field=StatusField())
    rows = jobs.annotate(either=either).annotate(
        state=F("either__state"), priority=F("either__priority"), attempts=F("either__attempts")
    )
    parts = ("state", "priority", "attempts")
    assert rows.values_list(*parts).get(review_status=None) == (State.waiting, 7, 3)
    assert rows.get(either__state="waiting").review_status is None
    assert rows.get(either__state__in=["waiting", "created"], either__attempts=3, either__priority=7)
    assert rows.filter(either__state__in=["waiting", "working"]).count() == rows.count()


@pytest.mark.parametrize(
    ("part", "sql"),
    [("priority", "ABS(MOD(TRUNC({} / 10), 100000000000000000))"), ("attempts", "ABS(MOD({}, 10))")],
)
def test_oracle_computes_without_the_operator_it_lacks(db, part, sql):
    compiler = Job.objects.annotate(part=F(f"status__{part}")).query.get_compiler("default")
    column, _ = compiler.compile(compiler.query.resolve_ref("status"))
    transform = compiler.query.annotations["part"]
    assert transform.as_oracle(compiler, connection) == (sql.format(column), ())


# Filters by state


@pytest.mark.parametrize("state", Status.states)
def test_state_filter_keeps_exactly_its_range(jobs, state):
    expected = [number for number in NUMBERS if Status(number).state == state]
    assert len(expected) >= 4
    for same in (state, state.name, int(state)):
        assert numbers(jobs.filter(review_status__state=same)) == expected
        assert numbers(jobs.filter(Q(review_status__state__exact=same))) == expected


@pytest.mark.parametrize(
    "names", [["waiting"], ["canceled", "created", "canceled"], [s.name for s in Status.states]]
)
def test_states_filter_keeps_exactly_their_ranges(jobs, names):
    expected = [number for number in NUMBERS if Status(number).state.name in names]
    assert numbers(jobs.filter(review_status__state__in=names)) == expected
    assert numbers(jobs.filter(review_status__state__in=iter(names))) == expected


def test_no_state_keeps_nothing(jobs):
    assert not jobs.filter(review_status__state__in=[]).exists()
    assert not jobs.filter(review_status__state__in=[None]).exists()
    assert numbers(jobs.filter(review_status__state__in=[None, "waiting"])) == numbers(
        jobs.filter(review_status__state="waiting")
    )
    assert jobs.exclude(review_status__state__in=[]).count() == len(NUMBERS) + 1


def test_exclude_of_a_state_keeps_all_others_null_included(jobs):
    others = [number for number in NUMBERS if Status(number).state != State.waiting]
    assert numbers(jobs.exclude(review_status__state="waiting")) == [*others, None]
    assert numbers(jobs.exclude(review_status__state__in=["waiting"])) == [*others, None]


def test_state_of_none_means_null(jobs):
    assert numbers(jobs.filter(review_status__state=None)) == [None]
    assert numbers(jobs.filter(review_status__state__isnull=True)) == [None]
    assert numbers(jobs.filter(review_status__state__isnull=False)) == NUMBERS


@pytest.mark.parametrize(
    ("lookup", "state"), [("gt", "working"), ("gte", "finished"), ("lt", "waiting"), ("lte", "created")]
)
def test_states_are_compared_as_numbers(jobs, lookup, state):
    compared = {"gt": "__gt__", "gte": "__ge__", "lt": "__lt__", "lte": "__le__"}[lookup]
    expected = [n for n in NUMBERS if getattr(int(Status(n).state), compared)(int(State.of(state)))]
    assert numbers(jobs.filter(**{f"review_status__state__{lookup}": state})) == expected


@pytest.mark.parametrize(
    ("wrong", "error"),
    [("wating", ValueError), (6, ValueError), (0, ValueError), (True, TypeError), (2.0, TypeError)],
)
def test_wrong_state_in_a_filter_says_which_there_are(wrong, error):
    for condition in ({"status__state": wrong}, {"status__state__in": ["waiting", wrong]}):
        with pytest.raises(error, match="1 created, 2 waiting, 3 working, 4 finished, 5 canceled") as raised:
            Job.objects.filter(**condition)
        assert repr(wrong) in str(raised.value)


# Filters by priority and attempts


def test_priority_filter_is_exact_to_the_last_digit(jobs):
    for priority in (0, 10**17 - 1):
        expected = [number for number in NUMBERS if Status(number).priority == priority]
        assert expected
        assert numbers(jobs.filter(review_status__priority=priority)) == expected
    waiting = jobs.filter(review_status__state="waiting")
    assert numbers(waiting.filter(review_status__priority__gt=10**17 - 2)) == [3 * 10**18 - 2, 3 * 10**18 - 1]


@pytest.mark.parametrize("attempts", range(10))
def test_attempts_filter_looks_at_the_last_digit(jobs, attempts):
    expected = [number for number in NUMBERS if Status(number).attempts == attempts]
    assert numbers(jobs.filter(review_status__attempts=attempts)) == expected
    assert numbers(jobs.filter(review_status__attempts__in=[attempts])) == expected


# Expressions as the other side


def test_state_is_compared_with_that_of_another_field(jobs):
    jobs.update(status=Status.finished(0))
    finished = [number for number in NUMBERS if Status(number).state == State.finished]
    assert numbers(jobs.filter(review_status__state=F("status__state"))) == finished
    either = jobs.filter(review_status__state__in=["created", F("status__state")])
    assert numbers(either) == [number for number in NUMBERS if Status(number).state in (1, 4)]


def test_state_is_compared_with_a_subquery(jobs):
    Job.objects.create(title="model", status=Status.canceled(0))
    of_model = Job.objects.filter(title="model").values("status__state")[:1]
    canceled = [number for number in NUMBERS if Status(number).state == State.canceled]
    assert numbers(jobs.filter(review_status__state=Subquery(of_model))) == canceled
    every = Job.objects.filter(title="model").values("status__state")
    assert numbers(jobs.filter(review_status__state__in=every)) == canceled
    own = Job.objects.filter(pk=OuterRef("pk")).values("review_status__state")[:1]
    assert numbers(jobs.filter(review_status__state=Subquery(own))) == NUMBERS


def test_state_filter_serves_case_and_filtered_count(jobs):
    counts = jobs.aggregate(
        waiting=Count("pk", filter=Q(review_status__state="waiting")),
        others=Count("pk", filter=~Q(review_status__state__in=["waiting", "working"])),
    )
    states = [Status(number).state for number in NUMBERS]
    assert counts == {
        "waiting": states.count(State.waiting),
        "others": len(states) + 1 - states.count(State.waiting) - states.count(State.working),
    }
    named = jobs.annotate(
        name=models.Case(models.When(review_status__state="waiting", then=Value("due")), default=Value("not"))
    )
    assert set(named.filter(name="due").values_list("review_status__state", flat=True)) == {State.waiting}


def test_state_is_found_through_relations_and_parents(db):
    project = Project.objects.create()
    PrintJob.objects.create(project=project, status=Status.working(0))
    PrintJob.objects.create(project=project, status=Status.finished(0))
    assert Project.objects.get(job__status__state="working") == project
    assert PrintJob.objects.filter(status__state="working").count() == 1
    assert PrintJob.objects.exclude(project__job__status__state="working").count() == 0


# The index


@pytest.mark.parametrize(
    "condition",
    [
        {"status__state": "waiting"},
        {"status__state__in": ["waiting", "working"]},
        Status.filter("status", "waiting"),
    ],
    ids=["state", "states", "filter"],
)
def test_state_filter_reads_the_index(db, vendor, condition):
    Job.objects.bulk_create([Job(status=Status.finished(number)) for number in range(1000)])
    Job.objects.bulk_create([Job(status=Status.waiting(number)) for number in range(3)])
    if vendor == "postgresql":
        with connection.cursor() as cursor:  # whether it can; for so few rows it would not
            cursor.execute("SET LOCAL enable_seqscan = off")
    plan = Job.objects.filter(**condition).explain()
    used = {
        "sqlite": "USING INDEX testapp_job_status_",
        "postgresql": "Index Cond: ((status >= '2000000000000000000'::bigint)",
        "mysql": "range testapp_job_status_",
    }
    assert used[vendor] in plan


# Tally


def test_tally_counts_five_states_in_order(jobs):
    states = [Status(number).state for number in NUMBERS]
    expected = {state.name: states.count(state) for state in Status.states}
    tally = Status.tally(jobs, "review_status")
    assert list(tally.items()) == list(expected.items())
    assert list(tally) == ["created", "waiting", "working", "finished", "canceled"]


def test_tally_is_one_query(jobs, django_assert_num_queries):
    with django_assert_num_queries(1):
        Status.tally(jobs, "review_status")


@pytest.mark.parametrize(
    "rows", [Job.objects.none(), Job.objects.filter(pk__in=[]), Job.objects.all(), Job.objects]
)
def test_tally_of_nothing_is_five_zeros(db, rows):
    assert Status.tally(rows, "status") == {state.name: 0 for state in Status.states}


def test_tally_counts_the_rows_of_the_queryset_given(jobs):
    assert Status.tally(jobs.filter(review_status__state="waiting"), "review_status")["created"] == 0
    ahead = jobs.filter(review_status__gte=Status.minimum("waiting"))[:3]
    assert Status.tally(ahead, "review_status") == {
        "created": 0,
        "waiting": 3,
        "working": 0,
        "finished": 0,
        "canceled": 0,
    }


def test_tally_of_no_queryset_is_refused():
    with pytest.raises(
        TypeError, match=r"tally\(\) counts a QuerySet or a Manager, .* example Job\.objects\."
    ):
        Status.tally(Job, "status")


def test_tally_counts_a_plain_integer_field(db):
    PlainJob.objects.bulk_create([PlainJob(status=number) for number in [*ENDS, *FOREIGN, None]])
    assert Status.tally(PlainJob.objects, "status") == {state.name: 2 for state in Status.states}


def test_tally_counts_an_inherited_field(db):
    PrintJob.objects.create(status=Status.canceled(5))
    assert Status.tally(PrintJob.objects, "status")["canceled"] == 1
