"""What the library tells: each signal with its arguments, and each as a line of the log."""

import asyncio
import logging
from contextlib import suppress

import pytest
from django.db import connection

from modelqueue import Abort, Cancel, Retry, State, Status, clock, run, signals, verbs
from modelqueue.outcomes import Policy
from modelqueue.source import Source
from tests.actions import LONG_AGO, SECOND, Clock, heard, raising, stored, succeed
from tests.testapp.models import Job, Paper, PickyPaper, PrintJob, ProxyJob, StampedPaper, Task

pytestmark = pytest.mark.django_db(transaction=True)

NOW = Clock().moment
EXPIRED = Status.working(LONG_AGO, 1)
#: A claim is stamped with the next millisecond, and so is what follows while the clock stands still.
STAMP = Clock().moment.replace(microsecond=1000)

failure = ValueError("no such file\nand no second line")


@pytest.fixture(autouse=True)
def _clock():
    with clock.use(Clock()):
        yield


def assign(status):
    def action(task):
        task.review_status = status

    return action


def attempt(queryset, action, field="status", **options):
    """Run a task whatever comes of it."""
    with suppress(ValueError, SystemExit, asyncio.CancelledError):
        return run(queryset, field, action, **options)
    return None


def recover(queryset, field="status", **policy):
    return verbs.recover(Source.of(queryset, field), Policy(**policy))


# Claimed, finished

ENDINGS = {
    "finish": (succeed, Status.finished(STAMP, 2)),
    "assign": (assign(Status.created(5, 7)), Status.created(5, 7)),
    "assign None": (assign(None), None),
    "retry": (raising(Retry(SECOND)), Status.waiting(NOW + SECOND, 1)),
    "abort": (raising(Abort(SECOND)), Status.waiting(NOW + SECOND, 2)),
    "cancel": (raising(Cancel("no use")), Status.canceled(STAMP, 2)),
    "fail": (raising(failure), Status.waiting(STAMP, 2)),
    "fail leaving": (raising(SystemExit(3)), Status.waiting(STAMP, 2)),
    "release": (raising(asyncio.CancelledError()), Status.waiting(0, 1)),
}
endings = pytest.mark.parametrize(
    ("ending", "action", "status"),
    [(name.split()[0], *values) for name, values in ENDINGS.items()],
    ids=ENDINGS,
)


def raised_by(action):
    try:
        action(Job())
    except BaseException as error:
        return error
    return None


@endings
@pytest.mark.parametrize("model", [Job, PrintJob, ProxyJob])
def test_attempt_is_told_at_its_claim_and_at_its_end(model, ending, action, status):
    job = model.objects.create(review_status=Status.waiting(0, 1))
    with heard() as events:
        attempt(model.objects, action, "review_status")
    task = events[0][1]["task"]
    assert type(task) is model
    assert task.pk == job.pk
    facts = {
        "sender": model,
        "pk": job.pk,
        "field": "review_status",
        "using": "default",
        "queue": None,
        "task": task,
    }
    assert events == [
        ("task_claimed", {**facts, "status": Status.working(STAMP, 1), "before": None}),
        ("task_finished", {**facts, "status": status, "outcome": ending, "error": raised_by(action)}),
    ]
    assert stored(job, "review_status") == status


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_alias_of_the_queryset_is_told():
    Task.objects.using("other").create(status=Status.waiting(0))
    Task.objects.using("other").create(status=EXPIRED)
    with heard() as events:
        run(Task.objects.using("other"), "status", succeed)
    assert [(name, event["using"]) for name, event in events] == [
        ("task_recovered", "other"),
        ("task_claimed", "other"),
        ("task_finished", "other"),
    ]


def test_row_that_can_not_be_loaded_is_told_without_a_task():
    paper = PickyPaper.objects.create(title="unreadable", status=Status.waiting(0))
    with heard() as events, pytest.raises(ValueError, match="can not be read") as caught:
        run(PickyPaper.objects, "status", succeed)
    facts = {
        "sender": PickyPaper,
        "pk": paper.pk,
        "field": "status",
        "using": "default",
        "queue": None,
        "task": None,
    }
    end = {"status": Status.waiting(STAMP, 1), "outcome": "fail", "error": caught.value}
    assert events == [("task_finished", {**facts, **end})]


def test_task_that_its_action_deletes_has_finished():
    job = Job.objects.create(status=Status.waiting(0))
    with heard() as events:
        run(Job.objects, "status", lambda task: task.delete())
    assert [(name, event["pk"]) for name, event in events] == [
        ("task_claimed", job.pk),
        ("task_finished", job.pk),
    ]


def test_nothing_due_is_not_told():
    with heard() as events:
        assert run(Job.objects, "status", succeed) is None
    assert events == []


@pytest.mark.parametrize("model", [Paper, StampedPaper], ids=["by update", "by save"])
def test_receivers_are_called_when_the_row_is_written(model):
    paper = model.objects.create()
    seen = []

    def receive(sender, status, **facts):
        seen.append((stored(paper) == status, connection.in_atomic_block))

    for signal in (signals.task_claimed, signals.task_finished, signals.task_recovered):
        signal.connect(receive)
    try:
        run(model.objects, "status", succeed)
        model.objects.update(status=EXPIRED)
        recover(model.objects)
    finally:
        for signal in (signals.task_claimed, signals.task_finished, signals.task_recovered):
            signal.disconnect(receive)
    assert seen == [(True, False)] * 3


# Recovered


@pytest.mark.parametrize(("retry", "status"), [(3, Status.waiting(NOW, 2)), (1, Status.canceled(NOW, 2))])
def test_recovery_is_told(retry, status):
    job = PrintJob.objects.create(review_status=EXPIRED)
    with heard() as events:
        recover(PrintJob.objects, "review_status", retry=retry)
    facts = {"sender": PrintJob, "pk": job.pk, "field": "review_status", "using": "default", "queue": None}
    assert events == [("task_recovered", {**facts, "lease": EXPIRED, "status": status, "error": None})]


def test_each_recovered_task_is_told():
    tasks = Task.objects.bulk_create([Task(status=EXPIRED) for _ in range(30)])
    with heard() as events:
        recover(Task.objects)
    assert [event["pk"] for _, event in events] == [task.pk for task in tasks]


# Lost

INTERFERENCES = {
    "canceled": (lambda task: Job.objects.update(review_status=Status.canceled(5)), Status.canceled(5)),
    "taken out": (lambda task: Job.objects.update(review_status=None), None),
    "deleted": (lambda task: Job.objects.all().delete(), None),
    "claimed": (lambda task: Job.objects.update(review_status=EXPIRED), EXPIRED),
}


@pytest.mark.parametrize(("interfere", "status"), INTERFERENCES.values(), ids=INTERFERENCES)
@pytest.mark.parametrize(
    ("ending", "end"), [("finish", succeed), ("retry", raising(Retry())), ("fail", raising(failure))]
)
def test_lost_lease_is_told_with_what_is_dropped(interfere, status, ending, end):
    job = Job.objects.create(review_status=Status.waiting(0, 1))

    def action(task):
        interfere(task)
        end(task)

    with heard("task_finished", "lease_lost") as events:
        attempt(Job.objects, action, "review_status")
    [(name, event)] = events
    assert event.pop("task").pk == job.pk
    assert (name, event) == (
        "lease_lost",
        {
            "sender": Job,
            "pk": job.pk,
            "field": "review_status",
            "using": "default",
            "queue": None,
            "lease": Status.working(STAMP, 1),
            "status": status,
            "outcome": ending,
            "error": raised_by(end),
        },
    )


# Receivers that raise


@pytest.fixture
def broken_receivers():
    """Receivers that raise, connected before all others of the test."""

    def receive(sender, **facts):
        raise RuntimeError("a broken receiver")

    for name in signals.__all__:
        getattr(signals, name).connect(receive)
    yield
    for name in signals.__all__:
        getattr(signals, name).disconnect(receive)


@endings
def test_receiver_that_raises_changes_no_outcome(broken_receivers, ending, action, status):
    job = Job.objects.create(review_status=Status.waiting(0, 1))
    error = raised_by(action)
    with heard() as events:
        if ending in ("fail", "release"):
            with pytest.raises(type(error)) as caught:
                run(Job.objects, "review_status", action)
            assert caught.value is error
        else:
            assert run(Job.objects, "review_status", action) == job
    assert stored(job, "review_status") == status
    assert [name for name, _ in events] == ["task_claimed", "task_finished"]


def test_receiver_that_raises_changes_no_recovery(broken_receivers, caplog):
    Task.objects.bulk_create([Task(status=EXPIRED) for _ in range(3)])
    assert recover(Task.objects) == 3
    assert set(Task.objects.values_list("status", flat=True)) == {Status.waiting(NOW, 2)}
    logged = [record for record in caplog.records if record.name == "django.dispatch"]
    assert [record.exc_info[0] for record in logged] == [RuntimeError] * 3


def test_receiver_that_raises_changes_nothing_about_a_lost_lease(broken_receivers):
    job = Job.objects.create(status=Status.waiting(0))
    canceled = Status.canceled(5)
    run(Job.objects, "status", lambda task: Job.objects.update(status=canceled))
    assert stored(job) == canceled


# The log

KEYS = ("event", "queue", "model", "pk", "field", "using", "state", "attempts", "outcome")


def lines(caplog):
    """Level, and the facts by their keys, of each line."""
    return [
        (record.levelname, {key: getattr(record, key) for key in KEYS})
        for record in caplog.records
        if record.name == "modelqueue"
    ]


def text(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "modelqueue"]


LEVELS = {
    "finish": "DEBUG",
    "assign": "DEBUG",
    "assign None": "DEBUG",
    "retry": "DEBUG",
    "abort": "WARNING",
    "cancel": "ERROR",
    "fail": "WARNING",
    "fail leaving": "WARNING",
    "release": "DEBUG",
}


@pytest.mark.parametrize(("name", "level"), LEVELS.items())
def test_line_of_an_attempt(caplog, name, level):
    action, status = ENDINGS[name]
    job = Job.objects.create(review_status=Status.waiting(0, 1))
    with caplog.at_level(logging.DEBUG, "modelqueue"):
        attempt(Job.objects, action, "review_status")
    facts = {
        "model": "testapp.Job",
        "pk": job.pk,
        "field": "review_status",
        "using": "default",
        "queue": None,
    }
    end = {"state": status and status.state.name, "attempts": None if status is None else status.attempts}
    assert lines(caplog) == [
        (
            "DEBUG",
            {**facts, "event": "task_claimed", "state": "working", "attempts": 1, "outcome": None},
        ),
        (level, {**facts, "event": "task_finished", **end, "outcome": name.split()[0]}),
    ]


@pytest.mark.parametrize("error", [failure, Abort()])
def test_task_that_is_given_up_is_an_error(caplog, error):
    Job.objects.create(status=Status.waiting(0))
    attempt(Job.objects, raising(error), retry=0)
    [(level, facts)] = lines(caplog)
    assert (level, facts["state"], facts["attempts"]) == ("ERROR", "canceled", 1)


@pytest.mark.parametrize(("retry", "level", "state"), [(3, "WARNING", "waiting"), (1, "ERROR", "canceled")])
def test_line_of_a_recovery(caplog, retry, level, state):
    task = Task.objects.create(status=EXPIRED)
    recover(Task.objects, retry=retry)
    facts = {"model": "testapp.Task", "pk": task.pk, "field": "status", "using": "default", "queue": None}
    end = {"event": "task_recovered", "state": state, "attempts": 2, "outcome": None}
    assert lines(caplog) == [(level, {**facts, **end})]


@pytest.mark.parametrize("name", INTERFERENCES)
def test_line_of_a_lost_lease(caplog, name):
    interfere, status = INTERFERENCES[name]
    job = Job.objects.create(review_status=Status.waiting(0))
    run(Job.objects, "review_status", interfere)
    facts = {
        "model": "testapp.Job",
        "pk": job.pk,
        "field": "review_status",
        "using": "default",
        "queue": None,
    }
    end = {"state": status and status.state.name, "attempts": None if status is None else status.attempts}
    assert lines(caplog) == [("WARNING", {**facts, "event": "lease_lost", **end, "outcome": "finish"})]


def test_message_names_the_task_and_the_first_line_of_its_error(caplog):
    job = Job.objects.create(status=Status.waiting(0))
    attempt(Job.objects, raising(failure))
    assert text(caplog) == [
        f"testapp.Job {job.pk} status: outcome fail (builtins.ValueError: no such file) [waiting, 1 attempt]"
    ]


def test_line_names_the_queue_and_how_long_the_task_waits(caplog, declare):
    task = Task.objects.create(status=Status.waiting(0))
    declare(Task, "status", name="errands", delay=90 * SECOND)(raising(failure)).drain()
    [(level, facts)] = lines(caplog)
    assert (level, facts["queue"], facts["pk"]) == ("WARNING", "errands", task.pk)
    [record] = [record for record in caplog.records if record.name == "modelqueue"]
    assert record.due == stored(task).parse()[1]
    assert record.getMessage().startswith(f"errands, testapp.Task {task.pk} status: outcome fail")
    assert record.getMessage().endswith(
        ("[waiting for 1m 30s, 1 attempt]", "[waiting for 1m 29s, 1 attempt]")
    )


def test_line_of_a_recovery_names_the_queue(caplog, declare):
    work = declare(Task, "status", name="errands")(succeed)
    Task.objects.create(status=EXPIRED)
    verbs.recover(work.source(), work.recovery())
    [(_, facts)] = lines(caplog)
    assert (facts["event"], facts["queue"]) == ("task_recovered", "errands")


def test_line_of_a_failure_has_its_traceback_and_that_of_a_cancel_none(caplog):
    for action in (raising(failure), raising(Cancel("no more"))):
        Job.objects.create(status=Status.waiting(0))
        attempt(Job.objects, action)
    traces = [
        record.exc_info and record.exc_info[1] for record in caplog.records if record.levelname != "DEBUG"
    ]
    assert traces[0] is failure
    assert traces[-1] is None


def test_message_of_a_row_that_is_gone(caplog):
    Job.objects.create(status=Status.waiting(0))
    run(Job.objects, "status", lambda task: Job.objects.all().delete())
    [line] = text(caplog)
    assert line.endswith("its row was deleted, or left the queue, meanwhile [gone]")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status.canceled(5), "it was canceled meanwhile [canceled, 0 attempts]"),
        (Status.waiting(5, 2), "or somebody has changed the status [waiting, 2 attempts]"),
        (Status.finished(5, 1), "by somebody or by the action [finished, 1 attempt]"),
    ],
)
def test_line_of_a_lost_lease_says_what_came_between(status, words, caplog):
    Job.objects.create(status=Status.waiting(0))
    run(Job.objects, "status", lambda task: Job.objects.update(status=status))
    [line] = text(caplog)
    assert line.endswith(words)


def test_row_that_can_not_be_loaded_has_its_line(caplog):
    paper = PickyPaper.objects.create(title="unreadable", status=Status.waiting(0))
    attempt(PickyPaper.objects, succeed)
    [(level, facts)] = lines(caplog)
    assert (level, facts["pk"], facts["outcome"]) == ("WARNING", paper.pk, "fail")


class UnprintableError(ValueError):
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UnprintableError(), ".UnprintableError: <its message can not be shown: RuntimeError>)"),
        (ValueError("half \ud800 of it"), "builtins.ValueError: half \\ud800 of it)"),
        (ValueError(""), "(builtins.ValueError)"),
        (ValueError("\n"), "(builtins.ValueError: )"),
        (ValueError("100% %s %(pk)s"), "builtins.ValueError: 100% %s %(pk)s)"),
        (ValueError("a\x00b"), "builtins.ValueError: a\\x00b)"),
    ],
    ids=["raises", "half a surrogate pair", "empty", "line break", "percent", "NUL"],
)
def test_error_of_any_text_has_its_line(caplog, error, reason):
    task = Task.objects.create(status=Status.waiting(0))
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (its text may be none)
        run(Task.objects, "status", raising(error))
    assert caught.value is error
    [line] = text(caplog)
    assert reason in line
    assert line.encode()
    assert stored(task).attempts == 1


def test_delay_that_can_not_be_computed_is_logged_with_its_traceback(caplog):
    task = Task.objects.create(status=EXPIRED)
    recover(Task.objects, delay=lambda attempts: 1 / 0)
    error, recovery = (record for record in caplog.records if record.name == "modelqueue")
    assert (error.levelname, error.exc_info[0]) == ("ERROR", ZeroDivisionError)
    assert error.getMessage() == "The delay of a recovered task can not be computed, it is zero."
    assert not any(hasattr(error, key) for key in KEYS)
    assert (recovery.event, recovery.pk) == ("task_recovered", task.pk)
    assert stored(task) == Status.waiting(NOW, 2)


def test_event_that_can_not_be_logged_changes_no_outcome(caplog, monkeypatch):
    def fail(model, **facts):
        raise ValueError("no")

    monkeypatch.setitem(signals._observers, signals.task_finished, fail)
    monkeypatch.setitem(signals._wants, signals.task_finished, lambda outcome: True)
    task = Task.objects.create()
    with heard("task_finished") as events:
        assert run(Task.objects.all(), "status", succeed) == task
    assert len(events) == 1
    assert stored(task).state == State.finished
    assert f"testapp.Task {task.pk}: what has become of it can not be logged." in caplog.text
    assert "ValueError: no" in caplog.text


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (logging.DEBUG, ["DEBUG", "WARNING", "DEBUG", "ERROR", "WARNING"]),
        (logging.WARNING, ["WARNING", "ERROR", "WARNING"]),
        (logging.ERROR, ["ERROR"]),
        (logging.CRITICAL, []),
    ],
)
def test_only_lines_of_enabled_levels_are_made(caplog, level, expected):
    Task.objects.bulk_create([Task(status=Status.waiting(number)) for number in range(2)])
    with caplog.at_level(level, "modelqueue"):
        attempt(Task.objects, raising(Abort()))
        attempt(Task.objects, raising(Cancel()))
        Task.objects.filter(status__state="waiting").update(status=EXPIRED)
        recover(Task.objects)
    assert [record.levelname for record in caplog.records if record.name == "modelqueue"] == expected
