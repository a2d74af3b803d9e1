"""The sub-commands of `manage.py modelqueue` beside the worker: what they show, change, delete and refuse."""

import datetime as dt
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from unittest.mock import Mock

import pytest
from django.core.management import CommandError, call_command
from django.db import IntegrityError, OperationalError, connection, connections, models
from django.test.utils import isolate_apps

import modelqueue
from modelqueue import ONE_HOUR, State, Status, clock
from modelqueue.durations import in_short, parse_duration
from modelqueue.fields import declared_on
from modelqueue.management import choose, reload, worker
from modelqueue.management.choose import chosen_queues
from modelqueue.management.progress import Progress
from modelqueue.queues import Queue
from modelqueue.report import Count, figures_of, report
from modelqueue.selection import VERBS, Selection, change, parse_key
from modelqueue.verbs import Pruned
from tests import testapp
from tests.actions import MILLISECOND, SECOND, Clock, stored, succeed
from tests.pace import within
from tests.processes import ROOT, environment, wait_until
from tests.testapp.models import (
    Attachment,
    Errand,
    Job,
    NumberedJob,
    Paper,
    PrintJob,
    Project,
    Receipt,
    UuidTask,
)
from tests.testapp.queues import do_errand, review

pytestmark = pytest.mark.django_db(transaction=True)

MINUTE, HOUR, DAY = 60 * SECOND, 3600 * SECOND, dt.timedelta(days=1)
NAME = "testapp.do_errand"


@pytest.fixture
def frozen():
    """A clock that stands still."""
    moment = Clock()
    with clock.use(moment):
        yield moment


@pytest.fixture
def queue_over():
    """Make a queue over a model that is forgotten after the test; no command knows it by name."""
    made = []

    def make(model, **options):
        options = {
            "name": "tasks", "retry": 3, "timeout": HOUR, "lease": 30 * SECOND, "delay": 0 * SECOND,
            "atomic": False, "error_field": None, "cancel_on": (), "slots": None, "claim_values": None,
            "next_priority": None,
            "upkeep": None, "task_options": None,
            **options,
        }  # fmt: skip
        queue = Queue(model, "status", succeed, where="here", **options)
        declared_on(queue.field).append(queue)
        made.append(queue)
        return queue

    yield make
    for queue in made:
        declared_on(queue.field).remove(queue)


def call(*arguments, **options):
    """Call the command; return its exit code and what it wrote to the standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    try:
        call_command("modelqueue", *map(str, arguments), stdout=out, stderr=err, no_color=True, **options)
    except SystemExit as stop:
        code = stop.code
    return code, out.getvalue(), err.getvalue()


def call_json(*arguments):
    """Call the command with --json; return its exit code and the document."""
    code, out, _ = call(*arguments, "--json")
    return code, json.loads(out)


def make(*statuses):
    return [Errand.objects.create(status=status) for status in statuses]


def states(*errands):
    return [stored(errand).state.name for errand in errands]


# Durations


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("90", 90 * SECOND),
        ("90s", 90 * SECOND),
        ("5m", 5 * MINUTE),
        ("12h", 12 * HOUR),
        ("30d", 30 * DAY),
        ("0.5h", 30 * MINUTE),
        ("0", 0 * SECOND),
    ],
)
def test_duration_is_a_number_and_a_unit(text, duration):
    assert parse_duration(text) == duration


@pytest.mark.parametrize("text", ["", "d", "-5", "5w", "1h30m", "5 m x", "nan", "٣"])
def test_what_is_no_duration_is_refused_with_examples(text):
    with pytest.raises(ValueError, match=r"is no duration\. Give .* 90s, 5m, 12h, 30d"):
        parse_duration(text)


def test_duration_that_python_can_not_hold_is_refused():
    with pytest.raises(ValueError, match="'9999999999d' is longer than a duration can be, 999999999d"):
        parse_duration("9999999999d")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (-3, "0s"), (59.9, "59s"), (303, "5m 3s"), (7205, "2h"), (93_900, "1d 2h"), (86_400, "1d")],
)
def test_duration_is_shown_in_its_two_largest_units(seconds, text):
    assert in_short(seconds) == text


# status


def test_status_counts_each_state_as_tally_does_and_leaves_null_and_foreign_numbers_out():
    now = modelqueue.now()
    make(Status.created(), Status.waiting(), Status.waiting(5), Status.waiting(now + HOUR))
    make(Status.working(), Status.finished(), Status.finished(now - HOUR), Status.canceled())
    make(0, -5, 7, 6 * 10**18, 9_100_000_000_000_000_000)
    code, document = call_json("status")
    by_name = {one["queue"]: one for one in document["queues"]}
    assert code == 0
    assert by_name[NAME]["counts"] == do_errand.tally()
    assert sum(by_name[NAME]["counts"].values()) == 8
    assert (by_name[NAME]["due"], by_name[NAME]["scheduled"]) == (2, 1)
    assert by_name[NAME]["capped"] == []
    assert set(by_name["testapp.review"]["counts"].values()) == {0}  # NULL


def test_status_of_an_empty_queue_is_all_zero():
    (one,) = call_json("status", "testapp.review")[1]["queues"]
    assert (one["queue"], one["model"], one["field"], one["database"]) == (
        "testapp.review", "testapp.Errand", "review_status", "default"
    )  # fmt: skip
    assert (one["longest_wait"], one["next_due"], one["running"], one["eta"]) == (None, None, [], 0)
    assert one["lately"] == {"seconds": 300, "finished": 0, "canceled": 0, "per_second": 0}


def test_figures_are_counted_no_further_than_the_cap(frozen):
    now = frozen.moment
    make(*[Status.waiting(now - number * SECOND) for number in range(4)], Status.waiting(now + HOUR))
    make(*[Status.finished(now - number * SECOND) for number in range(6)])
    figures = figures_of(do_errand, cap=4)
    assert str(figures.counts[State.finished]) == "4+"
    assert figures.due == Count(4)
    assert figures.scheduled == Count(1)
    assert figures.counts[State.waiting] == Count(4, is_capped=True)
    assert figures.as_dict()["capped"] == ["waiting", "finished", "finished_lately"]
    # Of more than the cap the newest are asked: five within four seconds.
    assert figures.rate == 5 / 4
    assert str(Count(10_000, is_capped=True)) == "10,000+"


def test_rate_of_a_burst_within_a_millisecond_is_a_number(frozen):
    make(*[Status.finished(frozen.moment)] * 3)
    assert figures_of(do_errand, cap=2).rate == 3000


def test_queue_of_the_longest_wait_comes_first(frozen):
    now = frozen.moment
    Errand.objects.create(status=Status.waiting(now - MINUTE), review_status=Status.waiting(now - HOUR))
    Errand.objects.create(status=Status.waiting(5))
    first, second = report([do_errand, review])
    assert (first.queue, first.longest_wait, second.longest_wait) == (review, 3600, 60)
    Errand.objects.update(review_status=None)
    assert [one.queue for one in report([review, do_errand])] == [do_errand, review]


def test_number_for_a_priority_has_no_wait(frozen):
    make(Status.waiting(5), Status.waiting(200 * 10**14 + 1_700_000_000_000))
    figures = figures_of(do_errand)
    assert (figures.due, figures.longest_wait, figures.scheduled) == (Count(2), None, Count(0))


def test_next_scheduled_task_is_told(frozen):
    make(Status.waiting(frozen.moment + HOUR), Status.waiting(frozen.moment + MINUTE))
    assert figures_of(do_errand).next_due == 60
    Errand.objects.update(status=Status.waiting(10**17 - 1))  # no time
    assert figures_of(do_errand).next_due is None


def test_running_tasks_are_listed_with_their_last_renewal_and_whether_they_are_abandoned(frozen):
    wait = do_errand.recovery().lease
    ages = [wait + SECOND, wait, wait - MILLISECOND, 2 * SECOND, SECOND, 0 * SECOND]
    errands = make(*[Status.working(frozen.moment - age, 1) for age in ages])
    figures = figures_of(do_errand)
    assert [one.pk for one in figures.running] == [errand.pk for errand in errands[:5]]
    assert [one.is_abandoned for one in figures.running] == [True, True, False, False, False]
    assert (figures.running[3].renewed_ago, figures.running[3].attempts) == (2.0, 1)
    assert figures.as_dict()["running"][3] == {
        "pk": errands[3].pk, "renewed_ago": 2.0, "attempts": 1, "abandoned": False
    }  # fmt: skip
    text = call("status")[1]
    assert f"running: {NAME} {errands[3].pk} renewed 2s ago, attempt 2\n" in text
    assert f"running: {NAME} {errands[0].pk} renewed {in_short(ages[0].seconds)} ago, attempt 2, " in text
    assert f"running: {NAME} and 1 more" in text


def test_running_task_whose_number_is_no_time_is_abandoned(frozen):
    make(Status.working(5))
    ((one,),) = [figures_of(do_errand).running]
    assert (one.renewed_ago, one.is_abandoned) == (None, True)
    assert "attempt 1, its lease has run out" in call("status")[1]


def test_what_ended_lately_gives_the_rate_and_the_eta(frozen):
    now = frozen.moment
    make(*[Status.finished(now - number * MINUTE) for number in (0, 4, 5, 6)], Status.canceled(now))
    figures = figures_of(do_errand)
    assert (figures.finished_lately, figures.canceled_lately, figures.eta) == (Count(3), Count(1), 0)
    make(*[Status.waiting(now)] * 8)
    assert figures_of(do_errand).eta == 8 / (4 / 300)
    assert "3, 1 canceled  10m" in call("status")[1]


def test_eta_is_unknown_where_nothing_ends():
    make(Status.waiting())
    assert call_json("status", NAME)[1]["queues"][0]["eta"] is None
    assert call("status", NAME)[1].splitlines()[1].endswith("unknown")


def test_drain_tells_what_is_to_come_later(supervise):
    Errand.objects.create(status=Status.waiting(modelqueue.now() + ONE_HOUR))
    supervise(finish=1)
    assert call("worker", NAME, "--drain")[1].endswith("1 task waiting for a time that has not come.\n")


def test_status_has_no_eta_where_nothing_is_due():
    Errand.objects.create(status=Status.waiting(modelqueue.now() + ONE_HOUR))
    assert call("status", NAME)[1].splitlines()[1].endswith(" -")


def test_status_is_a_table_with_a_row_for_each_queue(frozen):
    make(Status.waiting(frozen.moment - 303 * SECOND), *[Status.finished(5)] * 12)
    header, first, second = call("status")[1].splitlines()[:3]
    assert " ".join(header.split()) == (
        "queue wait due scheduled created waiting working finished canceled last 5 min ETA"
    )
    assert first.split() == [NAME, "5m", "3s", "1", "0", "0", "1", "0", "12", "0", "0", "unknown"]
    assert second.split()[:2] == ["testapp.review", "-"]
    assert len(header) == len(first) == len(second)


def test_watch_shows_it_each_second_until_ctrl_c(monkeypatch):
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    code, out, err = call("status", "--watch", "--json")
    assert (code, err, pauses) == (0, "", [1, 1])
    assert [len(json.loads(line)["queues"]) for line in out.splitlines()] == [2, 2]


def test_watch_clears_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    out = Terminal()
    call_command("modelqueue", "status", "--watch", stdout=out)
    assert out.getvalue().startswith("\x1b[2J\x1b[H")


@pytest.fixture
def missing(declare):
    """The name of a queue whose table is missing."""
    with isolate_apps("tests.testapp"):

        class Missing(models.Model):
            status = modelqueue.StatusField()

            class Meta:
                app_label = "testapp"

    declare(Missing, "status", name="a.missing")(succeed)
    return "a.missing"


def test_queue_that_can_not_be_looked_at_hides_no_other(missing):
    make(Status.waiting())
    code, document = call_json("status")
    *others, broken = document["queues"]
    assert (code, [one["queue"] for one in others]) == (1, [NAME, "testapp.review"])
    error = broken.pop("error")
    assert broken == {"queue": "a.missing", "model": "testapp.Missing", "field": "status"}
    assert re.match(r"(Operational|Programming)Error: .*testapp_missing", error)
    code, out, err = call("status")
    assert (code, err) == (1, "")
    assert out.splitlines()[1].startswith(NAME)
    assert f"error: a.missing can not be looked at: {error}\n" in out
    assert "are all migrations applied (migrate)?\n" in out
    assert call("status", "a.missing")[1].startswith("error: a.missing")


@pytest.fixture
def broken(declare):
    """The name of a queue whose tasks can not be asked for any more."""
    rows = [Errand.objects.all()]
    declare(rows.pop, "status", name="a.broken")(succeed)
    return "a.broken"


@pytest.mark.django_db(transaction=True, databases=["default", "other"])  # for the checks of Django
def test_queue_that_gives_no_queryset_stops_no_command_for_the_others(broken, supervise):
    made = supervise()
    make(Status.waiting())
    code, out, err = call("status", skip_checks=False)
    assert code == 1
    assert NAME in out
    assert f"error: {broken} can not be looked at: IndexError: pop from empty list\n" in out
    assert "modelqueue.W010" in err
    code, out, _ = call("worker", "--drain", skip_checks=False)
    assert code == 0
    assert f"  {broken}  testapp.Errand.status can not be looked for: pop from empty list\n" in out
    assert f"  {NAME}  testapp.Errand.status in default" in out
    assert made[0].options.names == (broken, NAME, "testapp.review")
    assert call("worker", "--exclude", broken, skip_checks=False)[0] == 0
    assert call("retry", NAME, "--all", skip_checks=False)[0] == 0


def test_queue_that_gives_no_queryset_is_in_no_database(broken, caplog):
    assert chosen_queues([], ["testapp.review"], "default") == [do_errand]
    assert "nobody knows where the tasks of a.broken are: pop from empty list" in caplog.text
    with pytest.raises(CommandError, match=r"leaves out: a\.broken is in none that is known\."):
        chosen_queues([broken], [], "default")


def test_tasks_of_a_queue_that_gives_no_queryset_can_not_be_changed(broken):
    with pytest.raises(
        CommandError, match=r"a\.broken has no tasks to look for: pop from empty list\nWhat it is"
    ):
        call("retry", broken, "--all")


@pytest.mark.vendor("postgresql", "mysql")
def test_watch_goes_on_when_the_database_was_away(monkeypatch):
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 1:
            connections["default"].connection.close()
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    code, out, err = call("status", "--watch", "--json")
    assert (code, err) == (0, "")
    found = [json.loads(line)["queues"] for line in out.splitlines()]
    assert [["error" in one for one in queues] for queues in found] == [
        [False] * 2, [True] * 2, [False] * 2
    ]  # fmt: skip


# retry, cancel, enqueue


EACH = [Status.combine(state, 5, attempts) for attempts, state in enumerate(Status.states)]


@pytest.mark.parametrize(
    ("verb", "after"),
    [
        ("retry", ["created", "waiting", "working", "finished", "waiting"]),
        ("cancel", ["canceled", "canceled", "canceled", "finished", "canceled"]),
        ("enqueue", ["waiting", "waiting", "working", "waiting", "waiting"]),
    ],
)
def test_verb_changes_only_the_states_that_it_is_for(verb, after):
    errands, (foreign,) = make(*EACH), make(7)
    before = do_errand.tally()
    code, out, _ = call(verb, NAME, "--all", "--dry-run")
    assert (code, do_errand.tally()) == (0, before)
    count = {"retry": 1, "cancel": 3, "enqueue": 3}[verb]
    assert out == f"{'1 task' if count == 1 else '3 tasks'} of {NAME} would be {VERBS[verb].done}.\n"
    code, document = call_json(verb, NAME, "--all")
    assert code == 0
    assert (document["matching"], document["changed"], document["locked"]) == (count, count, 0)
    assert states(*errands) == after
    assert stored(foreign) == Status(7)


def test_enqueue_makes_scheduled_tasks_and_null_due_and_says_so():
    (later,) = make(Status.waiting(modelqueue.now() + HOUR))
    code, out, _ = call("enqueue", NAME, "--pk", later.pk)
    assert (code, out) == (0, f"1 task of {NAME} made waiting.\n")
    assert stored(later) <= Status.waiting(attempts=9)
    code, out, _ = call("enqueue", "testapp.review", "--pk", later.pk)
    assert (code, stored(later, "review_status").state) == (0, State.waiting)


def test_tasks_are_chosen_by_several_keys():
    errands = make(*[Status.canceled()] * 4)
    code, document = call_json(
        "retry", NAME, "--pk", errands[0].pk, errands[1].pk, "--pk", errands[2].pk, errands[0].pk
    )
    assert (code, document["changed"]) == (0, 3)
    assert states(*errands) == ["waiting"] * 3 + ["canceled"]


def test_tasks_are_chosen_by_states():
    errands = make(*EACH)
    assert call_json("cancel", NAME, "--state", "created", "--state", "working")[1]["changed"] == 2
    assert states(*errands) == ["canceled", "waiting", "canceled", "finished", "canceled"]


def test_tasks_are_chosen_by_age(frozen):
    now = frozen.moment
    times = [now - DAY, now - HOUR, now - HOUR + MILLISECOND, now + HOUR]
    errands = make(*[Status.waiting(moment) for moment in times], Status.waiting(5))
    older = change(do_errand, Selection(older_than=HOUR), VERBS["cancel"], dry_run=True)
    younger = change(do_errand, Selection(younger_than=HOUR), VERBS["cancel"], dry_run=True)
    both = change(do_errand, Selection(older_than=HOUR, younger_than=DAY), VERBS["cancel"], dry_run=True)
    assert (older.matching, younger.matching, both.matching) == (2, 2, 1)
    assert call("cancel", NAME, "--older-than", "1h")[0] == 0
    assert states(*errands) == ["canceled"] * 2 + ["waiting"] * 3
    call("cancel", NAME, "--younger-than", "1h")
    assert states(*errands) == ["canceled"] * 4 + ["waiting"]  # a number has no age


def test_age_beyond_the_calendar_is_every_time(frozen):
    make(Status.canceled(frozen.moment), Status.canceled(5))
    assert call_json("retry", NAME, "--younger-than", "99999999d", "--dry-run")[1]["matching"] == 1
    assert call_json("retry", NAME, "--older-than", "99999999d", "--dry-run")[1]["matching"] == 0


def test_missing_and_unfit_tasks_are_named_and_the_others_changed():
    canceled, finished = make(Status.canceled(), Status.finished())
    gone = finished.pk + 1000
    keys = ["--pk", canceled.pk, finished.pk, gone]
    for dry in (["--dry-run"], []):
        code, out, err = call("retry", NAME, *keys, *dry)
        assert code == 1
        assert f"{NAME} has no task {gone}.\n" in err
        assert f"Left alone, as finished: {finished.pk}.\n" in err
        assert out.startswith(f"1 task of {NAME} ")
    code, document = call_json("retry", "testapp.review", *keys)
    assert (code, document["changed"], document["missing_pks"]) == (1, 0, [gone])
    assert {one["state"] for one in document["left"]} == {"null"}
    assert "Left alone, as not in the queue: " in call("retry", "testapp.review", *keys)[2]


def test_long_list_of_keys_is_cut_off():
    make(Status.finished())
    _, _, err = call("retry", NAME, "--pk", *range(10**9, 10**9 + 25))
    assert err.endswith("1000000019 and 5 more.\n")


def test_key_that_is_not_of_the_chosen_state_is_left_alone():
    created, waiting = make(Status.created(), Status.waiting())
    code, document = call_json("cancel", NAME, "--pk", created.pk, waiting.pk, "--state", "created")
    assert (code, document["changed"]) == (1, 1)
    assert document["left"] == [{"pk": waiting.pk, "state": "waiting"}]


def test_keys_are_those_of_the_model():
    key = "8c1f5f0e-6a7e-4b8e-9a62-3f1f0c0a7b11"
    assert str(parse_key(UuidTask, key)) == key
    with pytest.raises(ValueError, match=r"'x' is no primary key of testapp.UuidTask, which is a UUIDField"):
        parse_key(UuidTask, "x")
    if hasattr(testapp.models, "CompositeTask"):
        assert parse_key(testapp.models.CompositeTask, "[1, 2]") == (1, 2)
        with pytest.raises(ValueError, match="is no primary key"):
            parse_key(testapp.models.CompositeTask, "1")


@pytest.mark.parametrize("model", [Errand, PrintJob], ids=["own key", "that of its parent"])
@pytest.mark.parametrize("key", [2**63, -(2**63) - 1])
def test_number_that_no_database_holds_is_no_key(model, key):
    with pytest.raises(ValueError, match=f"'{key}' is no primary key of testapp.{model.__name__}"):
        parse_key(model, str(key))
    assert parse_key(model, str(2**63 - 1)) == 2**63 - 1


def test_verb_works_by_key_on_an_inherited_status(queue_over):
    job = NumberedJob.objects.create(number=77, status=Status.canceled())
    queue = queue_over(NumberedJob)
    result = change(queue, Selection(keys=[77, 78]), VERBS["retry"])
    assert (result.changed, result.missing) == (1, [78])
    assert stored(job).state == State.waiting


@pytest.mark.skipif(not hasattr(testapp.models, "CompositeTask"), reason="since Django 5.2")
def test_tasks_with_a_composite_key_are_chosen_and_pruned_by_it(queue_over):
    model = testapp.models.CompositeTask
    model.objects.bulk_create([model(tenant=1, number=one, status=Status.canceled(5)) for one in range(3)])
    queue = queue_over(model)
    result = change(queue, Selection(keys=[(1, 2), (2, 2)]), VERBS["retry"])
    assert (result.changed, result.missing) == (1, [(2, 2)])
    assert queue.prune(HOUR, "canceled") == 2
    assert model.objects.get().pk == (1, 2)
    assert [one.pk for one in figures_of(queue).running] == []


@pytest.fixture
def bystander():
    """Another session, in an open transaction; what it locks stays locked until the test is over."""
    other = connections["default"].copy()
    other.set_autocommit(False)
    yield other
    other.rollback()
    other.close()


def lock(other, task):
    with other.cursor() as cursor:
        cursor.execute(f"SELECT id FROM {task._meta.db_table} WHERE id = {task.pk} FOR UPDATE")
        cursor.fetchall()


@pytest.mark.db_feature("has_select_for_update_skip_locked")
@pytest.mark.parametrize("verb", VERBS)
def test_locked_task_is_left_alone_and_the_exit_code_says_so(verb, bystander):
    errands = make(*[Status.created() if verb == "cancel" else Status.canceled()] * 3)
    lock(bystander, errands[1])
    before = stored(errands[1])
    began = time.monotonic()
    code, document = call_json(verb, NAME, "--all")
    assert (code, document["matching"], document["changed"], document["locked"]) == (1, 3, 2, 1)
    assert stored(errands[1]) == before
    code, document = call_json(verb, NAME, "--pk", errands[1].pk)
    assert (code, document["changed"], document["locked_pks"]) == (1, 0, [errands[1].pk])
    _, _, err = call(verb, NAME, "--pk", errands[1].pk)
    assert err == f"Left alone, as somebody has locked them: 1 task: {errands[1].pk}.\n"
    assert time.monotonic() - began < within(5)
    bystander.rollback()
    assert call(verb, NAME, "--pk", errands[1].pk)[0] == 0


def test_task_that_somebody_else_has_changed_meanwhile_is_not_called_locked(monkeypatch):
    first, second = make(Status.canceled(), Status.canceled())

    def enqueue_first(rows, name):
        Errand.objects.filter(pk=first.pk).update(status=Status.waiting())
        return modelqueue.verbs.retry(rows, name)

    verb = VERBS["retry"].__class__(
        "retry", "waiting", (State.canceled,), VERBS["retry"].condition, enqueue_first
    )
    for selection in (Selection(), Selection(keys=[first.pk, second.pk])):
        Errand.objects.update(status=Status.canceled())
        result = change(do_errand, selection, verb)
        assert (result.matching, result.changed, result.locked, result.is_complete) == (2, 1, 0, True)


@pytest.fixture
def ahead(monkeypatch):
    """The clock of this machine is ahead of that of the database by ten minutes."""
    engine = type(modelqueue.engines.engine_for("default"))
    monkeypatch.setattr(engine, "clock_offset", lambda self: -10 * MINUTE)


def test_clock_of_the_database_counts(ahead, caplog, monkeypatch):
    before = modelqueue.now()
    (errand,) = make(Status.canceled())
    assert call("retry", NAME, "--pk", errand.pk)[0] == 0
    assert stored(errand) < Status.waiting(before - 9 * MINUTE)
    (one,) = call_json("status", NAME)[1]["queues"]
    assert one["due"] == 1
    assert one["longest_wait"] < MINUTE.seconds
    assert caplog.text.count("ahead of that of the database 'default'") == 2
    monkeypatch.setattr(time, "sleep", Mock(side_effect=[None, KeyboardInterrupt]))
    call("status", "--watch")
    assert caplog.text.count("ahead of that of the database 'default'") == 3  # not each second
    make(Status.finished(before - 15 * MINUTE))
    assert call_json("prune", NAME, "--older-than", "10m")[1]["queues"][0]["matching"] == 0
    assert modelqueue.now() >= before  # that of this machine, for who called it


def test_clock_that_a_test_has_set_counts_and_not_that_of_the_database(ahead, frozen):
    make(Status.waiting(frozen.moment - HOUR))
    assert call_json("status", NAME)[1]["queues"][0]["longest_wait"] == HOUR.seconds


# prune


@pytest.mark.vendor("sqlite")
def test_prune_lets_others_write_for_as_long_as_a_batch_took(monkeypatch):
    from modelqueue.engines import sqlite

    make(*[Status.finished(modelqueue.now() - 31 * DAY)] * 1200)
    rests = []
    monkeypatch.setattr(sqlite, "time", Mock(sleep=rests.append, monotonic=time.monotonic))
    assert do_errand.prune(30 * DAY) == 1200
    assert len(rests) == 3
    assert all(0 < seconds <= 0.1 for seconds in rests)


def test_prune_deletes_what_ended_long_ago():
    now = modelqueue.now()
    make(*[Status.finished(now - 31 * DAY)] * 3)
    kept = make(Status.finished(now - 29 * DAY), Status.canceled(now - 31 * DAY), Status.waiting(5))
    code, out, _ = call("prune", "--older-than", "30d", "--dry-run")
    assert (code, Errand.objects.count()) == (0, 6)
    assert f"3 finished tasks of {NAME} would be deleted.\n" in out
    assert call("prune", NAME, "--older-than", "30d")[:2] == (0, f"3 finished tasks of {NAME} are deleted.\n")
    assert set(Errand.objects.all()) == set(kept)
    code, document = call_json("prune", NAME, "--older-than", "30d", "--state", "canceled")
    assert document == {
        "command": "prune", "older_than": 30 * 86400, "state": "canceled", "dry_run": False,
        "queues": [
            {"queue": NAME, "matching": 1, "deleted": 1, "locked": 0, "protected": 0, "protected_by": []}
        ],
    }  # fmt: skip
    assert Errand.objects.count() == 2


def test_prune_leaves_rows_that_are_open_in_another_queue():
    long_ago = modelqueue.now() - 31 * DAY
    for review_status in (None, *EACH, 7):
        Errand.objects.create(status=Status.finished(long_ago), review_status=review_status)
    assert call_json("prune", NAME, "--older-than", "30d")[1]["queues"][0]["deleted"] == 4
    assert [row.review_status.state.name for row in Errand.objects.order_by("review_status")] == [
        "created", "waiting", "working"
    ]  # fmt: skip
    assert do_errand.prune(0 * SECOND) == 0


def test_prune_leaves_a_row_that_comes_to_another_stage_meanwhile(monkeypatch):
    first, _ = make(Status.finished(5), Status.finished(6))
    engine = modelqueue.engines.Engine
    deletable = engine.deletable

    def enqueue_first(self, rows):
        Errand.objects.filter(pk=first.pk).update(review_status=Status.waiting())
        return deletable(self, rows)

    monkeypatch.setattr(engine, "deletable", enqueue_first)
    assert do_errand.prune(HOUR) == 1
    assert list(Errand.objects.all()) == [first]


def test_prune_leaves_rows_that_are_open_in_a_stage_without_a_declared_queue(queue_over):
    kept = Job.objects.create(status=Status.finished(5), review_status=Status.waiting(5))
    Job.objects.create(status=Status.finished(5))
    assert queue_over(Job).prune(HOUR) == 1
    assert list(Job.objects.all()) == [kept]


@isolate_apps("tests.testapp")
def test_prune_leaves_rows_whose_child_is_open(queue_over, table):
    class Parent(models.Model):
        status = modelqueue.StatusField()

        class Meta:
            app_label = "testapp"

    class Child(Parent):
        print_status = modelqueue.StatusField()

        class Meta:
            app_label = "testapp"

    table(Parent)
    table(Child)
    over = Status.finished(5)
    kept = Child.objects.create(status=over)
    Child.objects.create(status=over, print_status=over)
    Parent.objects.create(status=over)
    assert queue_over(Parent).prune(HOUR) == 2
    assert list(Child.objects.all()) == [kept]
    Child.objects.update(print_status=over)
    assert queue_over(Parent).prune(HOUR) == 1


@pytest.mark.db_feature("has_select_for_update_skip_locked")
@isolate_apps("tests.testapp")
def test_prune_leaves_rows_whose_child_somebody_has_locked(queue_over, table, bystander):
    """It is about to come to a stage of its own, perhaps."""

    class Parent(models.Model):
        status = modelqueue.StatusField()

        class Meta:
            app_label = "testapp"

    class Child(Parent):
        print_status = modelqueue.StatusField()

        class Meta:
            app_label = "testapp"

    table(Parent)
    table(Child)
    over = Status.finished(5)
    kept, _ = (Child.objects.create(status=over, print_status=over) for _ in range(2))
    with bystander.cursor() as cursor:
        cursor.execute(f"UPDATE testapp_child SET print_status = 5 WHERE parent_ptr_id = {kept.pk}")
    assert queue_over(Parent).prune(HOUR) == 1
    assert list(Child.objects.all()) == [kept]
    bystander.rollback()
    assert queue_over(Parent).prune(HOUR) == 1


def test_prune_that_the_database_does_not_answer_says_so(monkeypatch):
    def away(self, rows):
        raise OperationalError("away")

    make(Status.finished(5))
    monkeypatch.setattr(modelqueue.engines.Engine, "deletable", away)
    monkeypatch.setattr(
        modelqueue.engines.Engine, "patiently", lambda self, function, reconnect=False: function()
    )
    monkeypatch.setattr(modelqueue.engines.Engine, "is_of_the_database_itself", lambda self, error: True)
    with pytest.raises(OperationalError, match="away"):
        do_errand.prune(HOUR)
    assert do_errand.tally()["finished"] == 1


KEEP = {
    "sqlite": """
        CREATE TRIGGER keep BEFORE DELETE ON testapp_errand WHEN OLD.title = 'kept'
        BEGIN SELECT RAISE(ABORT, 'kept'); END
        """,
    "postgresql": """
        CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'kept'; END $$;
        CREATE TRIGGER keep BEFORE DELETE ON testapp_errand FOR EACH ROW WHEN (OLD.title = 'kept')
            EXECUTE FUNCTION keep()
        """,
    "mysql": """
        CREATE TRIGGER keep BEFORE DELETE ON testapp_errand FOR EACH ROW
        IF OLD.title = 'kept' THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'kept'; END IF
        """,
}


def test_prune_passes_over_what_a_trigger_keeps(vendor, caplog):
    """By whatever error its database has for that."""
    kept = Errand.objects.create(title="kept", status=Status.finished(5))
    make(Status.finished(6))
    with connection.cursor() as cursor:
        cursor.execute(KEEP[vendor])
        try:
            assert do_errand.prune(HOUR) == 1
        finally:
            cursor.execute("DROP FUNCTION keep() CASCADE" if vendor == "postgresql" else "DROP TRIGGER keep")
    assert list(Errand.objects.all()) == [kept]
    assert f"testapp.Errand {kept.pk} can not be deleted: " in caplog.text


@isolate_apps("tests.testapp")
def test_prune_passes_over_what_the_database_refuses_to_delete(queue_over, table, caplog):
    class Footnote(models.Model):
        """Django leaves its foreign key to the database, which checks it at the commit or at once."""

        errand = models.ForeignKey(Errand, models.DO_NOTHING, related_name="+")

        class Meta:
            app_label = "testapp"

    table(Footnote)
    kept, *_ = make(*(Status.finished(number) for number in range(4)))
    note = Footnote.objects.create(errand=kept)
    code, _, err = call("prune", NAME, "--older-than", "1h")
    assert (code, err) == (1, "Left alone, as the database refuses it: 1 task.\n")
    assert list(Errand.objects.all()) == [kept]
    assert f"testapp.Errand {kept.pk} can not be deleted: " in caplog.text
    note.delete()
    assert do_errand.prune(HOUR) == 1


def test_prune_deletes_children_of_an_inherited_status(queue_over):
    for number in (5, 6):
        NumberedJob.objects.create(number=70 + number, status=Status.finished(number))
    kept = NumberedJob.objects.create(number=80)
    queue = queue_over(NumberedJob)
    assert queue.prune(HOUR) == 2
    assert (NumberedJob.objects.get(), Job.objects.count()) == (kept, 1)


@pytest.mark.parametrize("batch", [1, 500])
def test_prune_leaves_a_task_that_somebody_enqueues_meanwhile_and_goes_on(batch, monkeypatch):
    first, _ = make(Status.finished(5), Status.finished(6))
    engine = modelqueue.engines.Engine
    deletable = engine.deletable

    def enqueue_first(self, rows):
        Errand.objects.filter(pk=first.pk).update(status=Status.waiting())
        return deletable(self, rows)

    monkeypatch.setattr(engine, "deletable", enqueue_first)
    assert list(modelqueue.verbs.prune(Errand.objects, "status", HOUR, batch=batch)) == [Pruned(1)]
    assert list(Errand.objects.all()) == [first]


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_prune_passes_over_locked_rows(bystander):
    errands = make(*[Status.finished(number) for number in range(5)])
    lock(bystander, errands[0])
    lock(bystander, errands[3])
    assert list(modelqueue.verbs.prune(Errand.objects, "status", HOUR, batch=1)) == [Pruned(1)] * 3
    code, document = call_json("prune", NAME, "--older-than", "1h")
    assert (code, document["queues"][0]["locked"]) == (1, 2)
    assert (
        call("prune", NAME, "--older-than", "1h")[2] == "Left alone, as somebody has locked them: 2 tasks.\n"
    )
    assert {errand.pk for errand in Errand.objects.all()} == {errands[0].pk, errands[3].pk}


def test_prune_passes_over_what_a_foreign_key_protects_and_goes_on(declare):
    declare(Paper, "status", name="papers")(succeed)
    papers = [Paper.objects.create(status=Status.finished(number)) for number in range(3)]
    Receipt.objects.create(paper=papers[0])
    make(Status.finished(5))
    code, document = call_json("prune", "papers", NAME, "--older-than", "1h")
    assert code == 1
    assert document["queues"] == [
        {
            "queue": "papers", "matching": 3, "deleted": 2, "locked": 0,
            "protected": 1, "protected_by": ["testapp.Receipt"],
        },
        {"queue": NAME, "matching": 1, "deleted": 1, "locked": 0, "protected": 0, "protected_by": []},
    ]  # fmt: skip
    code, out, err = call("prune", "papers", "--older-than", "1h")
    assert (code, out) == (1, "0 finished tasks of papers are deleted.\n")
    assert err == "Left alone, as foreign keys of testapp.Receipt protect them: 1 task.\n"


def test_queue_that_can_not_be_pruned_hides_no_other(missing):
    make(Status.finished(5))
    code, out, err = call("prune", "--older-than", "1h")
    assert code == 1
    assert out.startswith(
        f"0 finished tasks of {missing} are deleted.\n1 finished task of {NAME} is deleted.\n"
    )
    assert re.match(
        f"error: {missing} can not be pruned: (Operational|Programming)Error: .*testapp_missing", err
    )
    assert "are all migrations applied (migrate)?\n" in err
    code, document = call_json("prune", missing, NAME, "--older-than", "1h")
    broken, other = document["queues"]
    assert (code, broken["deleted"], other["deleted"]) == (1, 0, 0)
    assert "testapp_missing" in broken["error"]
    assert "error" not in other


def test_prune_that_is_stopped_says_what_it_has_deleted(monkeypatch):
    make(*[Status.finished(5)] * 3)

    def batches(*arguments):
        yield Pruned(2)
        raise KeyboardInterrupt

    monkeypatch.setattr(modelqueue.verbs, "prune", batches)
    code, out, err = call("prune", "--older-than", "1h")
    assert (code, out, err) == (1, f"2 finished tasks of {NAME} are deleted.\n", "Stopped by Ctrl-C.\n")
    code, document = call_json("prune", "--older-than", "1h")
    (one,) = document["queues"]
    assert (code, one["matching"], one["deleted"], one["error"]) == (1, 3, 2, "Stopped by Ctrl-C.")


def test_one_task_is_said_of_in_the_singular():
    make(Status.finished(5))
    arguments = ("prune", NAME, "--older-than", "1h")
    assert call(*arguments, "--dry-run")[1] == f"1 finished task of {NAME} would be deleted.\n"
    assert call(*arguments)[1] == f"1 finished task of {NAME} is deleted.\n"


def test_what_refers_to_a_task_goes_with_it(queue_over):
    paper = Paper.objects.create(status=Status.finished(5), project=Project.objects.create())
    Attachment.objects.create(paper=paper)
    assert queue_over(Paper).prune(HOUR) == 1
    assert (Attachment.objects.count(), Project.objects.count()) == (0, 1)


# worker, as far as it is the command's; what it does is tested in tests/worker


@pytest.fixture
def supervise(monkeypatch):
    """Play the supervisor: which attempts end, and what it returns; return a list of those that were made."""
    made = []

    def supervise(code=0, **ended):
        class Supervisor:
            def __init__(self, options, queues, told, ended=None):
                self.options, self.queues, self._ended = options, queues, ended
                self.stops = 0
                made.append(self)

            def stop(self):
                self.stops += 1

            def run(self):
                if ended:
                    self._ended(Counter(ended))
                return code

        monkeypatch.setattr(worker, "Supervisor", Supervisor)
        return made

    return supervise


def test_worker_is_as_big_as_it_is_told(supervise):
    made = supervise()
    code, out, _ = call("worker", NAME, "--processes", 2, "--poll", "0.5", "--max-seconds", "1.5")
    (one,) = made
    assert (code, one.queues, one.options.names) == (0, [do_errand], (NAME,))
    assert (one.options.processes, one.options.poll, one.options.max_seconds) == (2, 0.5, 1.5)
    assert out.startswith("Serving 1 queue with 2 processes of 4 threads:\n")
    assert out.endswith("Stop it with Ctrl-C.\n")


def bare_logger(monkeypatch):
    """Return that of the package, without the handlers of pytest, which come with the call of a test."""
    logger = logging.getLogger("modelqueue")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.setattr(logger, "_cache", {})  # of what that level lets through
    return logger


@pytest.mark.parametrize(
    ("verbosity", "level", "handlers"),
    [(0, logging.ERROR, 1), (1, None, 0), (2, logging.DEBUG, 1), (3, logging.DEBUG, 1)],
)
def test_worker_shows_log_lines_where_the_project_does_not(
    verbosity, level, handlers, supervise, monkeypatch
):
    supervise()
    logger = bare_logger(monkeypatch)
    before = logger.level
    code, out, _ = call("worker", verbosity=verbosity)
    assert (code, bool(out)) == (0, verbosity > 0)
    assert (len(logger.handlers), logger.level) == (handlers, before if level is None else level)


def test_worker_leaves_the_logging_of_the_project_alone(supervise, monkeypatch):
    made = supervise()
    logger = bare_logger(monkeypatch)
    logger.addHandler(logging.NullHandler())
    before = logger.level
    call("worker", verbosity=2)
    assert (len(logger.handlers), logger.level, made[0].options.verbosity) == (1, before, 2)


@pytest.mark.parametrize(
    ("code", "ended", "exit_code", "words"),
    [
        (0, {}, 0, "Nothing was due.\n"),
        (0, {"finish": 1200, "fail": 1}, 0, r"Attempts: 1,200 finished, 1 failed; [\d,]+ a second\.\n"),
        (1, {}, 1, ""),  # a fault of the worker, which its log tells
        (3, {}, 3, "Something is due still.\n"),
        (3, {"fail": 2}, 3, r"Attempts: 2 failed; [\d,]+ a second\.\nSomething is due still\.\n"),
    ],
)
def test_drain_has_an_exit_code_for_what_is_due_still(code, ended, exit_code, words, supervise):
    supervise(code, **ended)
    found, out, _ = call("worker", "--drain")
    assert found == exit_code
    _, _, last_words = out.partition("It stops when nothing is due.\n")
    assert re.fullmatch(words, last_words)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signals")
@pytest.mark.parametrize("arguments", [[], ["--drain"]])
def test_worker_hears_a_signal_that_comes_before_it_serves(arguments, supervise, monkeypatch):
    """As what comes before may take long; the first process of a container would never get it."""

    def introduce(options, queues):
        os.kill(os.getpid(), signal.SIGTERM)
        return ["Serving"]

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGTERM, lambda *_: None)  # lest it ends the tests
    made = supervise()
    monkeypatch.setattr(worker, "introduction", introduce)
    try:
        assert call("worker", *arguments)[0] == 0
    finally:
        signal.signal(signal.SIGTERM, before[1])
    assert made[0].stops == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_worker_reloads_with_debug_or_when_asked(supervise, monkeypatch, settings):
    supervise()
    monkeypatch.setattr(reload, "run_children", lambda: 7)
    monkeypatch.setattr(reload, "serve_until_code_changes", lambda supervisor: 5)
    assert call("worker", "--reload") == (7, "", "")  # its child says the rest
    settings.DEBUG = True
    assert call("worker")[0] == 7
    assert call("worker", "--no-reload")[0] == 0
    assert call("worker", "--drain")[0] == 0
    monkeypatch.setenv("RUN_MAIN", "true")
    code, out, _ = call("worker")
    assert (code, out[:7]) == (5, "Serving")


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch):
    seconds = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: seconds)
    stream = io.StringIO()
    with Progress("deleted", 3000, stream) as bar:
        assert bar.rate == 0
        for seconds in (1.0, 6.0, 7.0):  # noqa: B007  (the clock reads it)
            bar.add(600)
    assert stream.getvalue() == "deleted: 1,200 of 3,000, 200 a second, 9s left\n"


def test_progress_of_an_unknown_total_has_no_end():
    bar = Progress("run", stream=io.StringIO(), every=0)
    bar.add(5)
    assert (bar.count, bar.eta) == (5, None)
    assert str(bar).startswith("run: 5, ")
    assert Progress("run", 5, io.StringIO()).eta is None


def test_progress_is_a_bar_on_a_terminal():
    stream = Terminal()
    with Progress("deleted", 10, stream) as bar:
        bar.add(10)
    assert "deleted: 100%" in stream.getvalue()
    assert stream.getvalue().endswith("\n")


def test_progress_is_lines_on_a_terminal_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    with Progress("deleted", 10, stream, every=0) as bar:
        bar.add(5)
    assert stream.getvalue().startswith("deleted: 5 of 10, ")


# Wrong calls


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (
            ["status", "testapp.reviw"],
            2,
            r"There is no queue 'testapp.reviw'. Did you mean 'testapp.review'\?",
        ),
        (
            ["retry", "x", "--all"],
            2,
            "There is no queue 'x'. Declared are: testapp.do_errand, testapp.review",
        ),
        (["worker", "--database", "x"], 2, "There is no database 'x'"),
        (["prune", "x", "--older-than", "5s"], 2, "There is no queue 'x'"),
        (["cancel", NAME], 2, "This would cancel every task of testapp.do_errand. Say which: .* or --all"),
        (
            ["cancel", NAME, "--all", "--pk", "1"],
            2,
            "--all means the whole queue, and the other options a part",
        ),
        (["retry", NAME, "--pk", "x"], 2, "'x' is no primary key of testapp.Errand, which is a BigAutoField"),
        (["retry", NAME, "--pk", "9" * 30], 2, "is no primary key"),
        (
            ["retry", NAME, "--older-than", "2h", "--younger-than", "1h"],
            2,
            "No task is older than 2:00:00 and",
        ),
        (["worker", "--drain", "--reload"], 2, "--drain stops when nothing is due, and --reload .* either"),
    ],
)
def test_wrong_call_is_refused_with_its_exit_code(arguments, code, text):
    with pytest.raises(CommandError, match=text) as error:
        call(*arguments)
    assert error.value.returncode == code


def test_queues_of_the_worker_are_chosen_by_database_too():
    assert chosen_queues([], ["testapp.review"], "default") == [do_errand]
    for names, exclude, using, text in (
        ([], [], "nowhere", "There is no database 'nowhere'. DATABASES has: default, other."),
        ([], [NAME], "other", "--database other leaves out: testapp.review is in default."),
        ([], [NAME, "testapp.review"], None, f"--exclude leaves none of {NAME}, testapp.review."),
        ([NAME], [NAME], None, f"--exclude leaves none of {NAME}."),
    ):
        with pytest.raises(CommandError, match=text) as error:
            chosen_queues(names, exclude, using)
        assert error.value.returncode == 2


def test_queue_that_was_named_is_not_dropped_in_silence_for_its_database(declare):
    elsewhere = declare(Errand.objects.using("other"), "status", name="elsewhere")(succeed)
    assert chosen_queues([], [], "other") == [elsewhere]
    with pytest.raises(CommandError, match=f"--database other leaves out: {NAME} is in default."):
        chosen_queues(["elsewhere", NAME], [], "other")


def test_project_without_queues_is_told_how_to_declare_one(monkeypatch):
    monkeypatch.setattr(choose, "declared_queues", list)
    with pytest.raises(
        CommandError, match=r"No queue is declared\. Decorate a function with @modelqueue\.queue"
    ):
        call("status")


@pytest.mark.parametrize("arguments", [["worker", "--drain"], ["retry", NAME, "--all"]])
def test_command_that_can_not_use_the_database_says_what_to_look_at(arguments, monkeypatch):
    def away(self, *arguments):
        raise OperationalError("connection failed:\n  is it running?")

    monkeypatch.setattr(models.QuerySet, "count", away)
    with pytest.raises(CommandError, match=r"can not be used: connection failed: is it running\?") as error:
        call(*arguments)
    assert "\nIs its server up, does DATABASES name the right one, may its user use the" in str(error.value)
    assert error.value.returncode == 1


def test_command_whose_change_the_database_refuses_says_so(monkeypatch):
    def refuse(self, *arguments):
        raise IntegrityError("CHECK constraint failed")

    monkeypatch.setattr(models.QuerySet, "count", refuse)
    with pytest.raises(
        CommandError, match="has refused it: CHECK constraint failed\nIs it against a constraint"
    ):
        call("retry", NAME, "--all")


def test_command_that_meets_a_lock_says_to_try_again(monkeypatch):
    def locked(self, *arguments):
        raise OperationalError("database is locked")

    monkeypatch.setattr(models.QuerySet, "count", locked)
    engine = type(modelqueue.engines.engine_for("default"))
    monkeypatch.setattr(engine, "is_try_again", lambda self, error: "is locked" in str(error))
    with pytest.raises(CommandError, match="The database is busy: database is locked\nSomebody holds a lock"):
        call("retry", NAME, "--all")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["retry"], "the following arguments are required: QUEUE"),
        (["retry", NAME, "--state", "finished"], "finished tasks are left alone by this. Give canceled"),
        (
            ["cancel", NAME, "--state", "wating"],
            "no state 'wating'. Did you mean 'waiting'.* Give created or",
        ),
        (["cancel", NAME, "--state", "x"], "there is no state 'x'. Give created or waiting or working"),
        (["enqueue", NAME, "--older-than", "soon"], "argument --older-than: 'soon' is no duration"),
        (["prune", NAME], "the following arguments are required: --older-than"),
        (["prune", NAME, "--older-than", "30"], "'30' has no unit. Give for example 30s, 30m, 30h or 30d"),
        (["prune", NAME, "--older-than", "1d", "--state", "waiting"], "waiting tasks are left alone by this"),
        (["worker", "--threads", "x"], "argument --threads: give a whole number, 1 or more, not 'x'"),
        (["worker", "--processes", "0"], "argument --processes: give a whole number, 1 or more, not '0'"),
        (["worker", "--poll", "abc"], "argument --poll: give seconds, 0 or more, such as 0.5, not 'abc'"),
        (["worker", "--grace", "-1"], "argument --grace: give seconds, 0 or more, such as 0.5, not '-1'"),
        (["worker", "--grace", "inf"], "argument --grace: give seconds, 0 or more, such as 0.5, not 'inf'"),
        (["worker", "--max-seconds", "0"], "argument --max-seconds: give seconds, more than 0, not '0'"),
        (["worker", "--max-seconds", "x"], "argument --max-seconds: give seconds, 0 or more"),
    ],
)
def test_wrong_option_is_refused(arguments, text):
    with pytest.raises(CommandError, match=text):
        call(*arguments)


# As processes


def manage(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "django", "modelqueue", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=60,
        check=False,
        **options,
    )


@pytest.mark.vendor("sqlite")  # seven starts of a process, the same on every database
def test_exit_codes_of_real_processes():
    (errand,) = make(Status.canceled())
    shown = manage("status", "--json", "--settings", "tests.settings")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert len(json.loads(shown.stdout)["queues"]) == 2
    assert manage("retry", NAME, "--pk", errand.pk).returncode == 0
    again = manage("retry", NAME, "--pk", errand.pk)
    assert (again.returncode, again.stderr) == (1, f"Left alone, as waiting: {errand.pk}.\n")
    unknown = manage("status", "testapp.reviw")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("CommandError: There is no queue 'testapp.reviw'. Did you mean")
    assert manage("cancel", NAME).returncode == 2
    wrong = manage("cancel", NAME, "--state", "over")
    assert wrong.returncode == 2
    assert "usage: " in wrong.stderr
    assert "Traceback" not in "".join(one.stderr for one in (again, unknown, wrong))


@pytest.mark.vendor("sqlite")
@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent in another way")
def test_ctrl_c_ends_watch_quietly(tmp_path):
    path = tmp_path / "output"
    with path.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "django", "modelqueue", "status", "--watch"],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(),
        )
    try:
        wait_until(lambda: path.read_text().count("queue ") >= 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in path.read_text()
    assert "Interrupt" not in path.read_text()


def test_every_option_of_every_sub_command_has_a_help():
    from modelqueue.management.commands.modelqueue import Command

    parser = Command().create_parser("manage.py", "modelqueue")
    (sub,) = [action for action in parser._actions if action.dest == "command"]
    assert set(sub.choices) == {"worker", "status", "retry", "cancel", "enqueue", "prune", "doctor"}
    for one in sub.choices.values():
        assert one.description
        assert one.description.endswith(".")
        assert "Exit codes: 0 " in one.epilog
        assert all(action.help for action in one._actions)
