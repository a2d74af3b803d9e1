"""What a task costs the database: few statements, and each finds its rows by an index in any history."""

import re
from dataclasses import replace

import pytest
from django.db import connection
from django.db.models import Q
from django.test.utils import CaptureQueriesContext

import modelqueue
from modelqueue import ONE_HOUR, Abort, Status, run, verbs
from modelqueue.engines import Change, Engine, engine_for, prepared
from modelqueue.engines.examinations import examination_for
from modelqueue.outcomes import Policy
from modelqueue.report import figures_of
from modelqueue.source import Source
from tests.actions import LONG_AGO, MILLISECOND, raising, stored, succeed, unexpected
from tests.testapp.models import Archive, Job, PrintJob, Task

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("unprepared")]

HISTORY = 100_000
#: The fields of the model with that history: each kind of index is there.
FIELDS = ["whole", "whole_nullable", "live", "live_nullable"]
#: As many wait, and as many are to be recovered; more than fit on the first two pages of candidates.
OPEN = 300

#: The statements of a claim. SQLite takes the write lock first; the others lock the row they read.
CLAIM = {
    "auto": {
        "sqlite": ["SELECT", "BEGIN", "UPDATE", "SELECT", "UPDATE", "COMMIT"],
        "postgresql": ["WITH"],
        "mysql": ["SELECT", "BEGIN", "SELECT", "SELECT", "UPDATE", "COMMIT"],
    },
    "portable": {
        "sqlite": ["SELECT", "BEGIN", "UPDATE", "SELECT", "SELECT", "UPDATE", "COMMIT"],
        "postgresql": ["SELECT", "BEGIN", "SELECT", "SELECT", "UPDATE", "COMMIT"],
        "mysql": ["SELECT", "BEGIN", "SELECT", "SELECT", "UPDATE", "COMMIT"],
    },
}
#: Those of the claim of a task that consists of more than its row.
CLAIM_AND_LOAD = CLAIM["portable"] | {"postgresql": ["BEGIN", "SELECT", "SELECT", "UPDATE", "COMMIT"]}
#: Those of an outcome. MariaDB is asked whether the action has left a transaction open.
OUTCOME = {"sqlite": ["UPDATE"], "postgresql": ["UPDATE"], "mysql": ["SELECT", "UPDATE"]}
RECOVERY_OF_NOTHING = ["SELECT"]


def sent(work):
    """The statements that something sends to the database."""
    with CaptureQueriesContext(connection) as queries:
        work()
    return [query["sql"] for query in queries]


def verb(statement):
    return statement.split()[0]


# How many statements


@pytest.fixture(params=["auto", "portable"])
def engine(request, settings):
    settings.MODELQUEUE = {"ENGINE": request.param}
    return request.param


@pytest.mark.parametrize("action", [succeed, raising(Abort())], ids=["finished", "failed"])
def test_statements_of_a_task(engine, vendor, action):
    Task.objects.bulk_create([Task() for _ in range(5)])
    run(Task.objects, "status", succeed)  # recovers, as nothing has been recovered yet
    statements = sent(lambda: run(Task.objects, "status", action))
    assert [verb(statement) for statement in statements] == CLAIM[engine][vendor] + OUTCOME[vendor]


def test_statements_of_a_task_whose_call_recovers_first(engine, vendor):
    Task.objects.create()
    statements = sent(lambda: run(Task.objects, "status", succeed))
    assert [verb(statement) for statement in statements] == (
        RECOVERY_OF_NOTHING + CLAIM[engine][vendor] + OUTCOME[vendor]
    )


@pytest.mark.parametrize(
    "rows",
    [
        Job.objects.select_related("project"),
        Job.objects.only("title"),
        PrintJob.objects.all(),
        Job.objects.filter(Q(project=None) | Q(project__name="")),
    ],
    ids=["select_related", "only", "inherited", "join"],
)
def test_statements_of_a_task_that_is_more_than_its_row(rows, vendor, settings):
    settings.MODELQUEUE = {"ENGINE": "auto"}
    rows.model.objects.create()
    statements = sent(lambda: verbs.claim(Source.of(rows, "status")))
    assert [verb(statement) for statement in statements] == CLAIM_AND_LOAD[vendor]


def test_claim_of_many_takes_as_many_statements_as_that_of_one(engine, vendor):
    Task.objects.bulk_create([Task() for _ in range(50)])
    statements = sent(lambda: verbs.claim(Source.of(Task.objects, "status"), 50))
    assert len(statements) == len(CLAIM[engine][vendor])
    assert Task.objects.filter(status__state="working").count() == 50


@pytest.mark.vendor("postgresql")
@pytest.mark.parametrize("rows", [Task.objects, Task.objects.only("status")], ids=["plain", "loaded"])
def test_claim_on_a_table_that_was_filled_since_its_statistics_takes_as_many_as_it_is_to(rows):
    """The planner believes that there is one row, and would look for the rows to claim once for each."""
    fill(Task, "status", [Status.waiting()])
    Task.objects.bulk_create([Task() for _ in range(150)])
    claims = verbs.claim(Source.of(rows, "status"), 10)
    assert len(claims) == Task.objects.filter(status__state="working").count() == 10
    Task.objects.all().delete()
    analyze(Task)


# Which index


@pytest.fixture(scope="module")
def archive(django_db_setup, django_db_blocker):
    """A table of which each test finds the history, as no test of another module does; its last key."""
    digits = [chr(ord("a") + place) for place in range(len(str(HISTORY)) - 1)]
    number = " + ".join(f"{10**place} * {name}.digit" for place, name in enumerate(digits))
    values = ", ".join([f"{int(Status.finished(LONG_AGO))} + 10 * ({number})"] * len(FIELDS))
    with django_db_blocker.unblock():
        with pytest.MonkeyPatch.context() as patch, connection.schema_editor() as editor:
            patch.setattr(Archive._meta, "managed", True)  # or it gets no index
            editor.create_model(Archive)
        with connection.cursor() as cursor:  # to make as many instances takes a hundred times as long
            cursor.execute(
                f"INSERT INTO testapp_archive ({', '.join(FIELDS)}) "
                f"WITH digits (digit) AS (SELECT {' UNION ALL SELECT '.join('0123456789')}) "
                f"SELECT {values} FROM {', '.join(f'digits AS {name}' for name in digits)}"
            )
        last = Archive.objects.latest("pk").pk
    yield last
    with django_db_blocker.unblock(), connection.schema_editor() as editor:
        editor.delete_model(Archive)


@pytest.fixture(params=FIELDS)
def queue(request, archive, transactional_db):
    """A model and its field; many rows are finished, and nothing is due."""
    yield Archive, request.param
    Archive.objects.filter(pk__gt=archive).delete()


def fill(model, field, statuses):
    others = dict.fromkeys(FIELDS if model is Archive else (), 0)
    model.objects.bulk_create([model(**{**others, field: status}) for status in statuses], 1000)
    analyze(model)


def analyze(model):
    table = connection.ops.quote_name(model._meta.db_table)
    with connection.cursor() as cursor:
        cursor.execute(f"ANALYZE {'TABLE ' if connection.vendor == 'mysql' else ''}{table}")
        if cursor.description:
            cursor.fetchall()


def index_of(model, field):
    with connection.cursor() as cursor:
        constraints = connection.introspection.get_constraints(cursor, model._meta.db_table)
    [name] = [name for name, facts in constraints.items() if facts["index"] and facts["columns"] == [field]]
    return name


def explain(statement):
    """The plan of a statement, as text: with the names of MariaDB's columns."""
    explain = "EXPLAIN QUERY PLAN" if connection.vendor == "sqlite" else "EXPLAIN"
    with connection.cursor() as cursor:
        cursor.execute(f"{explain} {statement}")
        names = [column[0] for column in cursor.description]
        return "\n".join(
            " ".join(f"{name}={value}" for name, value in zip(names, row, strict=True))
            for row in cursor.fetchall()
        )


#: How each database says that it reads a table as a whole, or an index from end to end.
READS_ALL = {"sqlite": r"\bSCAN (?!CONSTANT)", "postgresql": r"Seq Scan", "mysql": r"\btype=(ALL|index)\b"}


def assert_reads_range(statement, model, field):
    """The rows are found in the index of the status, from a first to a last number."""
    plan, index = explain(statement), index_of(model, field)
    assert not re.search(READS_ALL[connection.vendor], plan), plan
    if connection.vendor == "sqlite":
        assert re.search(rf"USING (COVERING )?INDEX {index} \({field}>\? AND {field}<\?\)", plan), plan
        return
    if connection.vendor == "postgresql":
        assert re.search(rf"Index (Only )?Scan (using|on) {index} ", plan), plan
        # What is true of all that is in the index is not looked for.
        first = "" if is_partial(field) else rf".*{field} >= "
        assert re.search(rf"Index Cond: {first}.*{field} <= ", plan), plan
    else:
        assert " type=range " in plan, plan
        assert f" key={index} " in plan, plan
    # What the database expects to read: the open tasks, also those that were deleted lately, not the history.
    assert max(map(int, re.findall(r"\brows=(\d+)", plan))) <= HISTORY / 10, plan


def is_partial(field):
    return field.startswith("live") and connection.features.supports_partial_indexes


def pages(statements):
    return [statement for statement in statements if " LIMIT " in statement]


@pytest.mark.parametrize("part", ["below", "at_least"])
def test_tasks_by_their_attempts_are_found_in_the_index(part, queue):
    model, field = queue
    fill(model, field, [Status.waiting(LONG_AGO, number % 4) for number in range(OPEN)])
    rows = replace(Source.of(model.objects, field), **{part: 3}).due(modelqueue.now())
    for statement in sent(lambda: list(rows.values_list("pk", field)[:10])):
        assert_reads_range(statement, model, field)


def test_idle_poll_is_two_reads_of_the_index(queue, engine, vendor):
    model, field = queue
    fill(model, field, [Status.waiting(modelqueue.now() + ONE_HOUR) for _ in range(OPEN)])
    for _ in range(2):  # the first call recovers before it looks for tasks, the second afterwards
        statements = sent(lambda: run(model.objects, field, unexpected))
        look = "WITH" if (engine, vendor) == ("auto", "postgresql") else "SELECT"
        assert sorted(verb(statement) for statement in statements) == sorted(["SELECT", look])
        for statement in statements:
            assert_reads_range(statement, model, field)


def test_look_of_a_worker_for_the_first_task_is_a_read_of_the_index(queue):
    model, field = queue
    later = [LONG_AGO + number * MILLISECOND for number in range(OPEN // 2)]
    fill(model, field, [*map(Status.waiting, later), *map(Status.working, later)])
    source, now = Source.of(model.objects, field), modelqueue.now()
    for question in (source.any_due(now), source.any_expired(now)):
        for asked in (question, question.between(question.first + 10**16, question.last)):
            [statement] = sent(lambda asked=asked: engine_for("default").probe([asked]))
            assert_reads_range(statement, model, field)


@pytest.fixture
def _first_pages_are_taken(monkeypatch):
    """Others have locked their tasks."""

    def lock_no_other(engine, source, candidates, *arguments):
        seen.extend(candidates)
        return lock(engine, source, candidates, *arguments) if len(seen) > 120 else []

    lock, seen = Engine._lock, []
    monkeypatch.setattr(Engine, "_lock", lock_no_other)


@pytest.mark.usefixtures("step_by_step", "_first_pages_are_taken")
def test_each_page_of_due_tasks_is_read_from_the_index(queue):
    model, field = queue
    fill(model, field, [Status.waiting(LONG_AGO + number * MILLISECOND) for number in range(OPEN)])
    statements = sent(lambda: verbs.claim(Source.of(model.objects, field), 20))
    assert len(pages(statements)) == 3
    assert model.objects.filter(**{f"{field}__state": "working"}).count() == 20
    for statement in pages(statements):
        assert_reads_range(statement, model, field)


@pytest.mark.usefixtures("step_by_step", "_first_pages_are_taken")
def test_each_page_of_tasks_with_one_status_is_read_from_the_index(queue):
    model, field = queue
    fill(model, field, [Status.waiting(5)] * OPEN)
    statements = sent(lambda: verbs.claim(Source.of(model.objects, field), 20))
    assert len(pages(statements)) == 3
    assert model.objects.filter(**{f"{field}__state": "working"}).count() == 20
    for statement in pages(statements):
        assert_reads_range(statement, model, field)


def test_each_page_of_expired_tasks_is_read_from_the_index(queue):
    model, field = queue
    fill(model, field, [Status.working(LONG_AGO + number * MILLISECOND) for number in range(OPEN)])
    statements = sent(lambda: verbs.recover(Source.of(model.objects, field), Policy(), seconds=60))
    assert len(pages(statements)) == 3
    for statement in pages(statements):
        assert_reads_range(statement, model, field)


def test_each_figure_is_a_range_of_the_index(queue, vendor, declare):
    """Also where a state has few rows in a large table, which a reader of the whole table would look for."""
    model, field = queue
    now = modelqueue.now()
    fill(model, field, [Status.waiting(LONG_AGO), Status.waiting(now + ONE_HOUR), Status.working(LONG_AGO)])
    declared = declare(model, field)(succeed)
    statements = sent(lambda: figures_of(declared))
    assert len(statements) == 11
    if is_partial(field):  # in which are the tasks that wait or are worked on
        statements = [statement for statement in statements if f"< {4 * 10**18}" in statement]
        assert len(statements) == 6
    for statement in statements:
        plan = explain(statement)
        # Of MariaDB's plan the rows that are counted are a table, too.
        plan = "\n".join(line for line in plan.splitlines() if "table=<derived" not in line)
        if vendor == "sqlite":
            plan = re.sub(r"^.*SCAN \(?subquery.*$", "", plan, flags=re.MULTILINE)
        assert not re.search(READS_ALL[vendor], plan), f"{statement}\n{plan}"
        assert index_of(model, field) in plan, plan


def test_no_statement_of_a_task_reads_the_whole_table(queue, engine, vendor):
    model, field = queue
    fill(model, field, [Status.working(LONG_AGO), Status.waiting(LONG_AGO)])
    ran = []
    statements = sent(lambda: ran.append(run(model.objects, field, succeed)))
    assert stored(ran[0], field).state == modelqueue.State.finished
    looking = [statement for statement in statements if " WHERE " in statement and "1 = 0" not in statement]
    # Both tasks are looked for, locked and written, and one is loaded.
    assert len(looking) >= {"portable": 8, "auto": 5 if vendor == "postgresql" else 7}[engine]
    for statement in looking:
        plan = explain(statement)
        assert not re.search(READS_ALL[vendor], plan), f"{statement}\n{plan}"


def test_no_statement_of_a_worker_reads_the_whole_table(queue, engine, vendor):
    model, field = queue
    fill(model, field, [Status.waiting(LONG_AGO)] * 20 + [Status.working(LONG_AGO)])
    source, database = Source.of(model.objects, field), engine_for("default")

    def work():
        claims = verbs.claim(source, 10)
        leases = {claim.row.key: {claim.lease} for claim in claims}
        assert len(verbs.renew(source, leases).renewed) == 10
        changes = [Change(key, frozenset(lease), Status.finished()) for key, lease in leases.items()]
        assert len(database.set_statuses(source, changes[:9])) == 9
        assert verbs.release(source, claims[9].row, leases[claims[9].row.key])
        now = modelqueue.now()
        assert None not in database.probe([source.any_due(now), source.any_expired(now)])
        assert examination_for("default").newest_lease(source) is not None

    statements = sent(work)
    looking = [
        one for one in statements if re.search(r"^(?!PREPARE).* WHERE (?!1 = 0)|^EXECUTE", one, re.DOTALL)
    ]
    assert len(looking) > 5
    for statement in looking:
        plan = explain(statement)
        assert not re.search(READS_ALL[vendor], plan), f"{statement}\n{plan}"


@pytest.mark.vendor("postgresql")
def test_plan_that_is_made_before_the_time_is_known_uses_the_index(queue, settings, monkeypatch):
    monkeypatch.setattr(prepared, "_WORTH_IT", 1)
    settings.MODELQUEUE = {"ENGINE": "auto"}
    model, field = queue
    fill(model, field, [Status.waiting(modelqueue.now() + ONE_HOUR) for _ in range(OPEN)])
    source = Source.of(model.objects, field)
    with connection.cursor() as cursor:
        cursor.execute("SET plan_cache_mode = force_generic_plan")
    try:
        *_, execute = sent(lambda: [verbs.claim(source, 7) for _ in range(10)])
        assert verb(execute) == "EXECUTE"
        assert_reads_range(execute, model, field)
    finally:
        with connection.cursor() as cursor:
            cursor.execute("RESET plan_cache_mode")


@pytest.mark.vendor("sqlite")
def test_claim_reads_only_between_the_first_and_the_last_number_that_it_asks_for(queue):
    """SQLite takes the first of several bounds of a column; the plan does not say which."""
    model, field = queue
    later = modelqueue.now() + ONE_HOUR
    fill(model, field, [Status.waiting(LONG_AGO)] * OPEN + [Status.waiting(later)] * OPEN)
    rows = Source.of(model.objects, field).due(modelqueue.now(), first=Status.waiting(LONG_AGO) + 1)
    steps = []
    connection.connection.set_progress_handler(lambda: steps.append(None), 10)
    assert list(rows.values_list("pk")[:1]) == []
    connection.connection.set_progress_handler(None, 0)
    assert len(steps) < 30
