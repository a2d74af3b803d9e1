"""Many workers on one queue: each task is run once, and no error of the database reaches a caller.

The proof is a ledger in a table of its own, into which the action inserts a row.
"""

import asyncio
import os
import threading
import time
import traceback
from collections import Counter

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections
from django.db.models import F
from django.db.models.signals import pre_save

import modelqueue
from modelqueue import Status, conf, verbs
from modelqueue.outcomes import Policy
from modelqueue.source import Source
from tests.actions import write_down
from tests.pace import within
from tests.testapp.models import Ledger, Paper, PrintJob, Task

WORKERS = 8
#: For processes. The portable engine takes several times as long for each.
MANY = 5000 if conf.get("ENGINE") == "auto" else 1000
#: For threads and coroutines, which take turns; MODELQUEUE_TEST_TASKS=5000 makes it a long run.
TASKS = int(os.environ.get("MODELQUEUE_TEST_TASKS", "800"))


def is_left(using):
    return Task.objects.using(using).filter(status__state__in=["waiting", "working"]).exists()


def drain(using):
    """Run tasks until none is left; return what `run` raised."""
    errors = []
    while True:
        try:
            task = modelqueue.run(Task.objects.using(using), "status", write_down)
        except Exception as error:
            traceback.print_exc()
            errors.append(repr(error))
            continue
        if task is None and not is_left(using):
            return errors


def fill(using, count):
    Task.objects.using(using).bulk_create([Task() for _ in range(count)])


def assert_each_ran_once(using, count):
    ran = Counter(Ledger.objects.using(using).values_list("task", flat=True))
    assert len(ran) == count
    assert set(ran.values()) == {1}
    statuses = Task.objects.using(using).values_list("status__state", "status__attempts")
    assert set(statuses) == {(modelqueue.State.finished, 1)}


@pytest.mark.timeout(900)
@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize(
    "using",
    [
        "default",  # on SQLite: Django's own options
        pytest.param("other", marks=pytest.mark.vendor("sqlite")),  # WAL and IMMEDIATE
    ],
)
def test_eight_processes_run_each_of_thousands_of_tasks_once(processes, using):
    fill(using, MANY)
    workers = [processes.start(drain, using) for _ in range(WORKERS)]
    try:
        assert [worker.result(600) for worker in workers] == [[]] * WORKERS
    except TimeoutError as error:
        counts = Status.tally(Task.objects.using(using), "status")
        raise TimeoutError(f"{counts}\n{error}") from None
    assert_each_ran_once(using, MANY)


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize("using", ["default", pytest.param("other", marks=pytest.mark.vendor("sqlite"))])
def test_eight_threads_run_each_task_once(using):
    fill(using, TASKS)
    errors = []

    def work():
        try:
            errors.extend(drain(using))
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(280)
    assert errors == []
    assert_each_ran_once(using, TASKS)


@pytest.mark.django_db(transaction=True)
def test_eight_coroutines_run_each_task_once():
    fill("default", TASKS)

    async def write_down_async(task):
        await sync_to_async(write_down)(task)

    async def work(run, action, **options):
        while await run(Task.objects.all(), "status", action, **options):
            pass

    async def main():
        await asyncio.gather(
            *(work(sync_to_async(modelqueue.run), write_down) for _ in range(WORKERS // 4)),
            *(work(modelqueue.arun, write_down_async) for _ in range(WORKERS // 4)),
            *(work(modelqueue.arun, write_down) for _ in range(WORKERS // 4)),
            *(work(modelqueue.arun, write_down, atomic=True) for _ in range(WORKERS // 4)),
        )

    async_to_sync(main)()
    assert_each_ran_once("default", TASKS)


def in_threads(work, count=4):
    """Call a function in several threads; return what it returned and raised."""
    results = []

    def call():
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


@pytest.mark.django_db(transaction=True)
def test_edits_of_others_and_changes_of_actions_are_all_kept():
    papers = Paper.objects.bulk_create([Paper() for _ in range(20)])
    edits = []

    def count(paper):
        write_down(paper)
        paper.pages = F("pages") + 1
        if paper.pk % 3 == 0 and Ledger.objects.filter(task=paper.pk).count() < 5:
            raise modelqueue.Retry

    def work():
        while modelqueue.run(Paper.objects.all(), "status", count) or is_left():
            pass

    def is_left():
        return Paper.objects.filter(status__state__in=["waiting", "working"]).exists()

    def edit():
        for number in range(1, 6):
            for paper in papers:
                modelqueue.enqueue(Paper.objects.filter(pk=paper.pk), "status")
                Paper.objects.filter(pk=paper.pk).update(facts={"edit": number})

    editor = threading.Thread(target=lambda: edits.extend(in_threads(edit, 1)))
    editor.start()
    assert in_threads(work) == [None] * 4
    editor.join(120)
    assert edits == [None]
    assert in_threads(work, 1) == [None]
    runs = Counter(Ledger.objects.values_list("task", flat=True))
    for paper in Paper.objects.all():
        assert (paper.pages, paper.facts) == (runs[paper.pk], {"edit": 5})
        assert paper.status.state == modelqueue.State.finished


@pytest.mark.django_db(transaction=True)
def test_expired_tasks_are_recovered_once_each_by_all_who_see_them():
    Task.objects.bulk_create([Task(status=Status.working(number)) for number in range(500)])
    source = Source.of(Task.objects.all(), "status")
    before = time.monotonic()

    def work():
        count = 0
        while Task.objects.filter(status__state="working").exists():
            count += verbs.recover(source, Policy())
        return count

    assert sum(in_threads(work)) == 500
    assert time.monotonic() - before < within(30)
    assert {task.status.attempts for task in Task.objects.all()} == {1}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("model", [Paper, PrintJob])
def test_edit_while_the_changes_are_saved_comes_after_them(model):
    """Between reading the newest row and saving it nobody edits it, in none of its tables."""
    task = model.objects.create(pages=1)
    edits = []
    editor = threading.Thread(
        target=lambda: edits.extend(in_threads(lambda: model.objects.filter(pk=task.pk).update(pages=9), 1))
    )

    def edit(sender, **arguments):
        editor.start()
        editor.join(0.3)  # as long as it would take if nothing held it up

    def change(task):
        task.title = "b"

    pre_save.connect(edit, sender=model)
    try:
        modelqueue.run(model.objects, "status", change)
    finally:
        pre_save.disconnect(edit, sender=model)
    editor.join(60)
    assert edits == [1]
    task = model.objects.get()
    assert (task.title, task.pages, task.status.state) == ("b", 9, modelqueue.State.finished)
