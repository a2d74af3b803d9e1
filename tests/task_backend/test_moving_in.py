"""Moving in from django-tasks-db, with its own backend and worker: nothing is lost or runs twice."""

import datetime as dt
import io
import re
import time
import uuid

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, connections, models
from django.db.models.query import QuerySet
from django.test.utils import isolate_apps, override_settings

from modelqueue import State, Status, now
from modelqueue.management.progress import Progress
from modelqueue.task_backend import moving_in
from modelqueue.task_backend.models import QueuedTask
from modelqueue.task_backend.moving_in import MovingIn
from modelqueue.task_backend.priorities import in_band
from modelqueue.task_backend.queues import task_queues
from modelqueue.testing import drain, run_until
from tests.processes import wait_until
from tests.testapp.models import Ledger

pytest.importorskip("django_tasks_db", reason="needs django-tasks-db, for Django from 5.2 on")

from django_tasks_db.management.commands.db_worker import Worker
from django_tasks_db.models import DBTaskResult

pytestmark = pytest.mark.django_db(transaction=True)

QUEUES = ["default", "mail"]
THEIRS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend", "QUEUES": QUEUES}}
BACKEND = "modelqueue.task_backend.ModelQueueBackend"
OURS = {"default": {"BACKEND": BACKEND, "QUEUES": QUEUES, "OPTIONS": {"retry": 2}}}
SECOND = dt.timedelta(seconds=1)


@pytest.fixture
def chores(settings):
    """Tasks that are enqueued with django-tasks-db."""
    settings.TASKS = THEIRS
    from tests.task_backend import chores

    return chores


@pytest.fixture
def move_in(settings):
    """Change the project's backend, and run the command; return its exit code and what it has written."""

    def run(*arguments, backends=OURS):
        settings.TASKS = backends
        out, err = io.StringIO(), io.StringIO()
        code = 0
        try:
            call_command("import_django_tasks_db", *arguments, stdout=out, stderr=err)
        except SystemExit as end:
            code = end.code
        return code, out.getvalue() + err.getvalue()

    return run


def run_theirs(worker_id="theirs", batch=True):
    """Have django-tasks-db's own worker run what is ready."""
    Worker(
        queue_names=["*"],
        interval=0.01,
        batch=batch,
        backend_name="default",
        startup_delay=False,
        max_tasks=None,
        worker_id=worker_id,
        excluded_queue_names=[],
    ).run()


def in_milliseconds(moment):
    return moment and moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def facts(result):
    """Everything that a result says."""
    task = result.task
    return {
        "id": result.id,
        "task": (task.module_path, task.priority, task.queue_name, task.backend, task.run_after),
        "status": result.status.name,
        "times": (result.enqueued_at, result.started_at, result.last_attempted_at),
        "finished_at": in_milliseconds(result.finished_at),
        "arguments": (list(result.args), result.kwargs),
        "errors": [(error.exception_class_path, error.traceback) for error in result.errors],
        "worker_ids": result.worker_ids,
        "attempts": result.attempts,
        "return_value": result._return_value,
    }


def state_of(result):
    return QueuedTask.objects.get(result_id=result.id).status.state.name


def both_tables():
    """The ids in their table, and in ours."""
    theirs = [str(pk) for pk in DBTaskResult.objects.values_list("pk", flat=True)]
    return sorted(theirs), sorted(QueuedTask.objects.values_list("result_id", flat=True))


def effects():
    return sorted(Ledger.objects.values_list("task", flat=True))


# What rows become


def test_results_say_the_same_as_before_under_the_same_ids(chores, move_in):
    ended = [
        chores.sweep.using(priority=7).enqueue(1),
        chores.water.using(queue_name="mail").enqueue(plant="fern"),
        chores.drop.enqueue("vase"),
        chores.stumble.enqueue(),
    ]
    run_theirs()
    waiting = [
        chores.sweep.using(priority=-100).enqueue(2, seconds=0),
        chores.sweep.using(run_after=now() + 3600 * SECOND, priority=100).enqueue(3),
    ]
    backend = chores.sweep.get_backend()
    before = [facts(backend.get_result(result.id)) for result in [*ended, *waiting]]
    assert [one["status"] for one in before] == ["SUCCESSFUL"] * 2 + ["FAILED"] * 2 + ["READY"] * 2

    code, printed = move_in()
    assert (code, printed) == (0, "6 tasks (2 waiting, 2 finished, 2 canceled) moved in.\n")
    assert not DBTaskResult.objects.exists()
    backend = chores.sweep.get_backend()
    assert [facts(backend.get_result(result.id)) for result in [*ended, *waiting]] == before
    assert QueuedTask.objects.get(function__endswith=".drop").error.startswith(
        "builtins.ValueError: the vase is broken:\nTraceback"
    )
    assert QueuedTask.objects.get(function__endswith=".stumble").error.startswith(
        "tests.task_backend.chores.MishapError\nTraceback"
    )


def test_moved_tasks_run_by_priority_and_then_in_the_order_of_enqueueing(chores, move_in):
    for number, priority in enumerate([0, 50, 0, -50, 50, 0, 0]):
        chores.sweep.using(priority=priority).enqueue(number)
    move_in("--batch", "3")
    chores.sweep.using(priority=50).enqueue(7)
    drain(*task_queues())
    assert list(Ledger.objects.order_by("pk").values_list("task", flat=True)) == [1, 4, 7, 0, 2, 5, 6, 3]


def test_deferred_task_waits_under_its_time(chores, move_in):
    at = in_milliseconds(now() + 3600 * SECOND)
    deferred = chores.sweep.using(run_after=at).enqueue(1)
    past = chores.sweep.using(run_after=now() - 3600 * SECOND, priority=1).enqueue(2)
    move_in()
    assert QueuedTask.objects.get(result_id=deferred.id).status == Status.waiting(at)
    assert QueuedTask.objects.get(result_id=past.id).status.priority == in_band(1, past.task.run_after)
    drain(*task_queues())
    assert effects() == [2]
    run_until(at + SECOND, *task_queues())
    assert effects() == [1, 2]


def test_task_is_retried_as_its_policy_or_its_backend_says(chores, move_in):
    chores.water.enqueue(plant="fern")
    chores.sweep.enqueue(1)
    DBTaskResult.objects.create(
        task_path="tests.task_backend.chores.moved_away", args_kwargs={"args": [], "kwargs": {}},
        backend_name="default", exception_class_path="", traceback="",
    )  # fmt: skip
    assert move_in()[0] == 0
    retries = dict(QueuedTask.objects.values_list("function", "retry"))
    assert {path.rpartition(".")[2]: retry for path, retry in retries.items()} == {
        "water": 5, "sweep": 2, "moved_away": 2
    }  # fmt: skip


def test_failed_task_can_be_retried_and_keeps_its_error(chores, move_in):
    result = chores.drop.enqueue("vase")
    run_theirs()
    move_in()
    backend = chores.drop.get_backend()
    assert backend.retry(result.id)
    drain(*task_queues(), raises=False)
    result = backend.get_result(result.id)
    assert result.status.name == "FAILED"
    assert len(result.errors) == 4
    assert result.worker_ids[0] == "theirs"
    assert all("the vase is broken" in error.traceback for error in result.errors)


@pytest.mark.parametrize("status", ["SUCCESSFUL", "FAILED"])
def test_rows_of_older_versions_lack_workers_and_times(status, chores, move_in):
    result = chores.sweep.enqueue(1)
    DBTaskResult.objects.update(status=status)
    assert move_in()[0] == 0
    moved = chores.sweep.get_backend().get_result(result.id)
    assert moved.status.name == status
    assert moved.worker_ids == ["unknown"]
    assert moved.finished_at == in_milliseconds(result.enqueued_at)
    assert [error.traceback for error in moved.errors] == ([""] if status == "FAILED" else [])


def test_times_without_a_zone_stay_what_they_are(chores, move_in, settings):
    settings.USE_TZ = False
    result = chores.sweep.enqueue(1)
    run_theirs()
    at = in_milliseconds(dt.datetime.now() + 3600 * SECOND)
    deferred = chores.sweep.using(run_after=at).enqueue(2)
    before = facts(chores.sweep.get_backend().get_result(result.id))
    assert move_in()[0] == 0
    backend = chores.sweep.get_backend()
    assert facts(backend.get_result(result.id)) == before
    assert backend.get_result(deferred.id).task.run_after == at
    assert QueuedTask.objects.get(result_id=deferred.id).status == Status.waiting(at.astimezone())
    drain(*task_queues())
    assert effects() == [1]


# What is left alone


def make_running(*results):
    DBTaskResult.objects.filter(pk__in=[result.id for result in results]).update(
        status="RUNNING", started_at=now(), worker_ids=["gone"]
    )


def test_running_task_is_left_to_its_worker(chores, move_in):
    running, waiting = chores.sweep.enqueue(1), chores.sweep.enqueue(2)
    make_running(running)
    code, printed = move_in()
    assert code == 1
    assert "1 task (1 waiting, 0 finished, 0 canceled) moved in.\n" in printed
    assert "Left alone, as they are running: 1 row." in printed
    assert both_tables() == ([running.id], [waiting.id])


def test_running_task_whose_worker_is_gone_is_tried_once_more(chores, move_in):
    running = chores.sweep.enqueue(1)
    make_running(running)
    assert move_in("--running")[0] == 0
    result = chores.sweep.get_backend().get_result(running.id)
    assert (result.status.name, result.attempts, result.worker_ids) == ("READY", 1, ["gone"])
    assert result.started_at is not None
    assert [error.exception_class_path for error in result.errors] == ["modelqueue.exceptions.WorkerDied"]
    drain(*task_queues())
    result.refresh()
    assert (result.status.name, result.attempts) == ("SUCCESSFUL", 2)
    assert effects() == [1]


def test_dry_run_changes_nothing(chores, move_in):
    running, waiting = chores.sweep.enqueue(1), chores.sweep.enqueue(2)
    make_running(running)
    code, printed = move_in("--dry-run")
    assert code == 1
    assert "1 task (1 waiting, 0 finished, 0 canceled) would be moved in." in printed
    assert "Left alone, as they are running: 1 row." in printed
    code, printed = move_in("--dry-run", "--running")
    assert (code, printed) == (0, "2 tasks (2 waiting, 0 finished, 0 canceled) would be moved in.\n")
    assert both_tables() == (sorted([running.id, waiting.id]), [])


def test_a_second_run_finds_nothing(chores, move_in):
    chores.sweep.enqueue(1)
    move_in("--backend", "default=default")
    before = list(QueuedTask.objects.values())
    code, printed = move_in("--backend", "default=default")
    assert (code, printed) == (0, "0 tasks (0 waiting, 0 finished, 0 canceled) moved in.\n")
    assert list(QueuedTask.objects.values()) == before


@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_row_that_somebody_has_locked_is_passed_over(chores, move_in, bystander):
    results = [chores.sweep.enqueue(number) for number in range(3)]
    with bystander.cursor() as cursor:
        key = DBTaskResult._meta.pk.get_db_prep_value(uuid.UUID(results[1].id), bystander)
        cursor.execute(f"SELECT id FROM {DBTaskResult._meta.db_table} WHERE id = %s FOR UPDATE", [key])
        assert cursor.fetchone()
    code, printed = move_in()
    assert code == 1
    assert "Left alone, as somebody has locked or added them meanwhile: 1 row. Run it again." in printed
    assert both_tables() == ([results[1].id], sorted([results[0].id, results[2].id]))
    bystander.rollback()
    assert move_in()[0] == 0
    assert both_tables() == ([], sorted(result.id for result in results))


def test_task_that_is_here_already_is_not_added_again(chores, move_in):
    twice, once = chores.sweep.enqueue(1), chores.sweep.enqueue(2)
    rows = list(DBTaskResult.objects.all())
    move_in()
    DBTaskResult.objects.bulk_create(rows)  # from a backup, perhaps
    QueuedTask.objects.filter(result_id=once.id).delete()
    code, printed = move_in()
    assert code == 1
    assert "1 task (1 waiting, 0 finished, 0 canceled) moved in.\n" in printed
    assert printed.count("Left alone") == 1
    assert "Left alone, as there is a task with that id already: 1 row." in printed
    assert both_tables() == ([twice.id], sorted([twice.id, once.id]))


# Whoever dies, and whoever works beside it


def move_until_killed(point):
    """Move in three rows at a time, and hold still: after the second batch, or within the third one."""
    batches = 0
    insert = QuerySet.bulk_create

    def hold(self, *arguments, **options):
        made = insert(self, *arguments, **options)
        if point == "within" and batches == 2:
            Ledger.objects.using("other").create(task=0, worker="held")
            time.sleep(600)
        return made

    with override_settings(TASKS=OURS), pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuerySet, "bulk_create", hold)
        for _ in MovingIn().move(3):
            batches += 1
            if point == "between" and batches == 2:
                Ledger.objects.using("other").create(task=0, worker="held")
                time.sleep(600)


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize("point", ["between", "within"])
def test_nothing_is_lost_or_doubled_by_a_kill(point, chores, move_in, processes):
    results = [chores.sweep.enqueue(number) for number in range(10)]
    process = processes.start(move_until_killed, point)
    wait_until(lambda: not process.alive or Ledger.objects.using("other").exists())
    assert process.alive, process.errors
    process.kill()

    everything = sorted(result.id for result in results)
    # Until the database has noticed that its session is gone the third batch may be locked.
    wait_until(lambda: move_in()[0] == 0)
    assert both_tables() == ([], everything)
    drain(*task_queues())
    assert effects() == list(range(10))


def work_as_before():
    with override_settings(TASKS=THEIRS):
        from tests.task_backend import chores  # noqa: F401

        run_theirs(batch=False)


def test_no_task_is_run_twice_by_an_old_worker_beside_it(chores, move_in, processes):
    count = 60
    for number in range(count):
        chores.sweep.enqueue(number, seconds=0.02)
    old = [processes.start(work_as_before) for _ in range(2)]
    wait_until(lambda: Ledger.objects.count() >= 5 or not all(process.alive for process in old))
    assert all(process.alive for process in old), [process.errors for process in old]
    moved = 0
    while DBTaskResult.objects.exists():
        _, printed = move_in("--batch", "2")
        moved += int(re.search(r"\((\d+) waiting", printed)[1])
    assert moved > 0
    drain(*task_queues())
    assert effects() == list(range(count))
    assert QueuedTask.objects.count() == count
    assert state_counts() == {State.finished: count}


def state_counts():
    tally = Status.tally(QueuedTask.objects, "status")
    return {State.of(name): count for name, count in tally.items() if count}


def test_ctrl_c_ends_it_between_two_batches(chores, move_in, monkeypatch):
    for number in range(4):
        chores.sweep.enqueue(number)
    add = Progress.add

    def press(self, count):
        add(self, count)
        if self.count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "add", press)
    code, printed = move_in("--batch", "1")
    assert code == 1
    assert "Stopped by Ctrl-C. Run it again to move in the others." in printed
    theirs, ours = both_tables()
    assert (len(theirs), len(ours)) == (2, 2)
    monkeypatch.undo()
    assert move_in()[0] == 0
    assert len(both_tables()[1]) == 4


def test_batch_with_a_row_that_somebody_has_changed_is_rolled_back(chores, move_in, monkeypatch):
    """As on a database without locks of rows."""
    results = [chores.sweep.enqueue(number) for number in range(2)]
    insert = QuerySet.bulk_create

    def interfere(self, *arguments, **options):
        DBTaskResult.objects.filter(pk=results[0].id).update(status="RUNNING")
        return insert(self, *arguments, **options)

    monkeypatch.setattr(QuerySet, "bulk_create", interfere)
    with pytest.raises(RuntimeError, match="Of 2 rows of django-tasks-db that were moved in 1 were changed"):
        move_in()
    assert both_tables() == (sorted(result.id for result in results), [])


def test_many_rows_are_read_in_pages(chores, move_in, monkeypatch):
    monkeypatch.setattr(moving_in, "_PAGE", 4)
    for number in range(10):
        chores.sweep.enqueue(number)
    DBTaskResult.objects.update(enqueued_at=now())  # all at the same time, so that the key decides
    assert move_in("--batch", "3")[0] == 0
    assert len(both_tables()[1]) == 10


# What is refused before anything is written


def refused(move_in, *arguments, **options):
    with pytest.raises(CommandError) as caught:
        move_in(*arguments, **options)
    assert not QueuedTask.objects.exists()
    return str(caught.value), caught.value.returncode


def test_alias_that_is_not_ours_is_refused_and_can_be_mapped(chores, move_in):
    chores.sweep.enqueue(1)
    backends = {"tasks": OURS["default"], **THEIRS}
    text, code = refused(move_in, backends=backends)
    assert code == 1
    assert (
        "rows of the backend 'default', and TASKS has no backend 'default' of ModelQueue. It has: tasks."
        in text
    )
    assert "--backend default=ALIAS" in text
    assert move_in("--backend", "default=tasks", backends=backends)[0] == 0
    assert QueuedTask.objects.get().backend_name == "tasks"


def test_project_without_a_backend_of_ours_is_told_so(chores, move_in):
    chores.sweep.enqueue(1)
    text, _ = refused(move_in, backends=THEIRS)
    assert "It has none at all." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "default=nobody"], "default=nobody: TASKS has no backend 'nobody'"),
        (["--backend", "default=default", "--backend", "default=x"], "default=default: and default=x"),
        (["--backend", "default"], "'default' is not OLD=NEW"),
        (["--backend", "=default"], "'=default' is not OLD=NEW"),
        (["--batch", "0"], "'0' is no whole number from 1 to 400"),
        (["--batch", "401"], "'401' is no whole number"),
        (["--batch", "x"], "'x' is no whole number"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, chores, move_in):
    chores.sweep.enqueue(1)
    text, _ = refused(move_in, *arguments)
    assert message in text


def test_unknown_backend_is_wrong_usage(chores, move_in):
    assert refused(move_in, "--backend", "default=nobody")[1] == 2


def test_queue_that_nobody_would_serve_is_refused(chores, move_in):
    chores.sweep.using(queue_name="mail").enqueue(1)
    backends = {"default": {**OURS["default"], "QUEUES": ["default"]}}
    text, code = refused(move_in, backends=backends)
    assert code == 1
    assert "rows in the queue 'mail' of the backend 'default'" in text
    assert "has only default" in text
    assert move_in(backends={"default": {**OURS["default"], "QUEUES": []}})[0] == 0


def test_other_database_is_refused(chores, move_in):
    chores.sweep.enqueue(1)
    text, code = refused(move_in, backends={"default": {**OURS["default"], "OPTIONS": {"database": "other"}}})
    assert code == 1
    assert "are in the database 'default', and those of TASKS['default'] in 'other'" in text


def test_path_that_is_too_long_is_refused(chores, move_in):
    chores.sweep.enqueue(1)
    DBTaskResult.objects.update(task_path="x" * 501)
    assert "longer than 500 characters" in refused(move_in)[0]


def test_rows_that_others_refer_to_are_refused(chores, move_in):
    with isolate_apps("tests.testapp"):

        class Order(models.Model):
            result = models.ForeignKey(DBTaskResult, models.CASCADE)

            class Meta:
                app_label = "testapp"

        relation = Order._meta.get_field("result").remote_field
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(DBTaskResult._meta.__dict__, "related_objects", (relation,))
            text, _ = refused(move_in)
    assert "testapp.Order has a foreign key to the rows of django-tasks-db" in text


def test_project_without_django_tasks_db_is_told_so(chores, move_in, settings):
    settings.INSTALLED_APPS = [name for name in settings.INSTALLED_APPS if name != "django_tasks_db"]
    text, code = refused(move_in)
    assert code == 1
    assert "There is no app 'django_tasks_db' in INSTALLED_APPS" in text


def test_missing_table_is_told_with_what_to_look_at(chores, move_in):
    with connection.schema_editor() as editor:
        editor.delete_model(DBTaskResult)
    try:
        text, code = refused(move_in)
    finally:
        with connection.schema_editor() as editor:
            editor.create_model(DBTaskResult)
    assert code == 1
    assert "are all migrations applied" in text.replace("\n", " ")
    assert connections["default"].is_usable()
