"""Enqueueing: in the transaction of the caller, one or many, and nothing where an argument is wrong."""

import asyncio
import datetime as dt
import re
from functools import partial
from itertools import pairwise

import pytest
from asgiref.sync import async_to_sync
from django.db import IntegrityError, connection, transaction
from django.db.models.signals import post_save
from django.utils import timezone

from modelqueue import State, Status
from modelqueue.task_backend import backend as backend_module
from modelqueue.task_backend import insertion
from modelqueue.task_backend.models import QueuedTask
from tests.task_backend.backends import States, api, backend, row_of, run_all, setting, tasks

pytestmark = pytest.mark.django_db(transaction=True)


def seen_by_others():
    """How many tasks another session sees."""
    other = connection.copy()
    try:
        with other.cursor() as cursor:
            cursor.execute("SELECT COUNT(*) FROM modelqueue_tasks_queuedtask")
            return cursor.fetchone()[0]
    finally:
        other.close()


ENQUEUE = {
    "enqueue": tasks.add.enqueue,
    "aenqueue": async_to_sync(tasks.add.aenqueue),
    "enqueue_many": lambda *args: backend().enqueue_many([(tasks.add, args, {})])[0],
    "aenqueue_many": lambda *args: async_to_sync(backend().aenqueue_many)([(tasks.add, args, {})])[0],
}


@pytest.fixture(params=ENQUEUE)
def enqueue(request):
    return ENQUEUE[request.param]


def test_task_is_seen_by_others_when_the_caller_commits(enqueue):
    with transaction.atomic():
        result = enqueue(1, 2)
        assert (result.status, seen_by_others()) == (States.READY, 0)
    assert seen_by_others() == 1
    assert run_all() == [result.id]


def test_task_is_gone_when_the_caller_rolls_back(enqueue):
    with pytest.raises(KeyError), transaction.atomic():  # noqa: PT012
        result = enqueue(1, 2)
        assert QueuedTask.objects.count() == 1
        raise KeyError
    assert QueuedTask.objects.count() == 0
    with pytest.raises(api.TaskResultDoesNotExist):
        backend().get_result(result.id)


def test_task_is_committed_at_once_where_there_is_no_transaction(enqueue):
    enqueue(1, 2)
    assert seen_by_others() == 1


def test_result_says_what_was_enqueued():
    result = tasks.add.enqueue(1, b=[2, {"c": None}])
    assert result.task == tasks.add
    assert (result.args, result.kwargs, result.backend) == ([1], {"b": [2, {"c": None}]}, "default")
    assert (result.status, result.attempts, result.errors, result.worker_ids) == (States.READY, 0, [], [])
    assert (result.started_at, result.last_attempted_at, result.finished_at) == (None, None, None)
    assert abs(dt.datetime.now(dt.timezone.utc) - result.enqueued_at) < dt.timedelta(seconds=60)
    row = row_of(result)
    assert (row.backend_name, row.queue_name, row.function) == (
        "default",
        "default",
        "tests.task_backend.tasks.add",
    )
    assert (row.status.state, row.status.attempts, row.task_priority) == (State.waiting, 0, 0)
    assert str(row) == f"tests.task_backend.tasks.add {result.id}"


def test_caller_keeps_its_arguments():
    numbers = [1]
    result = tasks.add.enqueue(numbers)
    numbers.append(2)
    assert result.args == row_of(result).arguments["args"] == [[1]]


def stored_values(result):
    own = ("id", "result_id", "status", "enqueued_at")
    [values] = QueuedTask.objects.filter(result_id=result.id).values()
    return {name: value for name, value in values.items() if name not in own}


def saved_by_a_listener(monkeypatch):
    """As where somebody listens: then it is saved by `save()`, which sends the signals."""
    monkeypatch.setattr(post_save, "receivers", [])
    post_save.connect(lambda **facts: saved.append(facts), sender=QueuedTask, weak=False)
    saved = []
    return saved


def test_row_is_the_one_that_save_would_write(settings, monkeypatch):
    """Its own statement, which is compiled once, is for speed alone."""
    tomorrow = timezone.now() + dt.timedelta(days=1)
    settings.TASKS = setting(retry=None)
    task = tasks.add.using(priority=-7, run_after=tomorrow, queue_name="urgent")
    given = ([1, None, {"ü": ["\\", "%s"]}], {"b": "'"})
    by_statement = backend().enqueue(task, *given)
    saved = saved_by_a_listener(monkeypatch)
    by_save = backend().enqueue(task, *given)
    assert stored_values(by_statement) == stored_values(by_save)
    assert [facts["instance"].result_id for facts in saved] == [by_save.id]
    assert saved[0]["created"]


def test_row_is_saved_where_a_field_of_a_database_takes_more_than_a_value(monkeypatch):
    by_statement = tasks.add.enqueue(1)
    monkeypatch.setattr(insertion, "_statement", lambda *args: None)
    assert stored_values(tasks.add.enqueue(1)) == stored_values(by_statement)


def test_transaction_in_which_the_database_has_refused_one_can_only_be_rolled_back(settings):
    settings.TASKS = setting(id_function=lambda: "1")
    tasks.add.enqueue(1)
    with transaction.atomic():
        with pytest.raises(IntegrityError):
            tasks.add.enqueue(1)
        with pytest.raises(transaction.TransactionManagementError):
            QueuedTask.objects.count()
        transaction.set_rollback(True)


def test_ids_are_opaque_and_do_not_follow_from_each_other():
    ids = [result.id for result in backend().enqueue_many([(tasks.add, [1], {})] * 200)]
    assert len(set(ids)) == 200
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)
    ends = sorted(int(one[12:], 16) for one in ids)
    assert min(after - before for before, after in pairwise(ends)) > 1000


def test_some_are_enqueued_side_by_side():
    async def enqueue_five():
        return await asyncio.gather(*(tasks.add.aenqueue(number) for number in range(5)))

    assert [result.args for result in async_to_sync(enqueue_five)()] == [[number] for number in range(5)]
    assert QueuedTask.objects.count() == 5


# Many


def test_many_are_added_in_their_order(monkeypatch):
    monkeypatch.setattr(backend_module, "_BATCH", 10)
    calls = [(tasks.add, [number], {"b": 1}) for number in range(25)]
    results = backend().enqueue_many(iter(calls))
    assert [result.args for result in results] == [[number] for number in range(25)]
    stored = QueuedTask.objects.order_by("pk")
    assert [row.arguments["args"] for row in stored] == [result.args for result in results]
    assert [row.result_id for row in stored] == [result.id for result in results]
    assert run_all() == [result.id for result in results]
    assert backend().get_result(results[7].id).return_value == 8


def test_many_may_be_of_several_tasks_each_with_its_own_policy():
    calls = [(tasks.fail, [], {}), (tasks.add.using(priority=7, queue_name="urgent"), [1], {})]
    fail, add = [row_of(result) for result in backend().enqueue_many(calls)]
    assert (fail.function, fail.retry, fail.queue_name) == ("tests.task_backend.tasks.fail", 0, "default")
    assert (add.retry, add.queue_name, add.task_priority) == (3, "urgent", 7)


def test_none_is_none():
    assert backend().enqueue_many([]) == []


def failing(calls):
    yield from calls
    raise RuntimeError("no more")


@pytest.mark.parametrize(
    ("calls", "error"),
    [
        ([(tasks.add, [1], {}), (tasks.add, [object()], {})], TypeError),
        (failing([(tasks.add, [1], {})]), RuntimeError),
    ],
    ids=["argument", "calls"],
)
def test_none_of_many_is_added_where_one_is_wrong(calls, error):
    with pytest.raises(error):
        backend().enqueue_many(calls)
    assert QueuedTask.objects.count() == 0


def test_none_of_many_is_added_where_the_database_refuses_one(settings, monkeypatch):
    monkeypatch.setattr(backend_module, "_BATCH", 10)
    numbers = iter(["a"] + [str(number) for number in range(13)] + ["a"])
    settings.TASKS = setting(id_function=partial(next, numbers))
    with pytest.raises(IntegrityError):
        backend().enqueue_many([(tasks.add, [1], {})] * 15)
    assert QueuedTask.objects.count() == 0


# Wrong arguments


@pytest.mark.parametrize("enqueue_one", ["enqueue", "enqueue_many"])
@pytest.mark.parametrize(
    "wrong",
    [object(), {1, 2}, float("nan"), float("inf"), [Status.waiting], dt.datetime(2026, 1, 2)],
)
def test_argument_that_is_not_json_is_refused_with_what_to_do(wrong, enqueue_one):
    text = r"tests.task_backend.tasks.add can not be enqueued with these arguments.*JSON.*its primary key"
    with transaction.atomic():  # which goes on to be usable
        with pytest.raises((TypeError, ValueError), match=text):
            ENQUEUE[enqueue_one](wrong)
        assert QueuedTask.objects.count() == 0


itself = []
itself.append(itself)
NO_JSON = {
    "NUL": ("a\x00", "NUL or half of a surrogate pair"),
    "half a pair": ({"\ud800": 1}, "NUL or half of a surrogate pair"),
    "itself": (itself, "contains itself"),
}


@pytest.mark.parametrize("enqueue_one", ["enqueue", "enqueue_many"])
@pytest.mark.parametrize("name", NO_JSON)
def test_argument_that_not_every_database_keeps_is_refused(name, enqueue_one):
    wrong, text = NO_JSON[name]
    with transaction.atomic():
        with pytest.raises(ValueError, match=text):
            ENQUEUE[enqueue_one](wrong)
        assert QueuedTask.objects.count() == 0  # the transaction goes on


def nested(levels):
    """Lists and dictionaries in each other."""
    made = 1
    for level in range(levels):
        made = [made] if level % 2 else {"a": made, "b": 2}
    return made


@pytest.mark.parametrize("enqueue_one", ["enqueue", "enqueue_many"])
def test_argument_that_is_nested_more_deeply_than_mariadb_takes_is_refused_there(enqueue_one, vendor):
    """It is two levels deeper in what is stored: a list, in a dictionary."""
    ENQUEUE[enqueue_one](nested(29))
    with transaction.atomic():
        if vendor == "mysql":
            with pytest.raises(ValueError, match="nested 32 levels deep, and the database takes 31"):
                ENQUEUE[enqueue_one](nested(30))
        else:
            ENQUEUE[enqueue_one](nested(30))
        assert QueuedTask.objects.count() == 1 + (vendor != "mysql")  # the transaction goes on


def test_text_that_only_looks_as_if_a_database_did_not_keep_it_is_kept():
    given = ["\\u0000", "\\\\u0000", "ü\U0001f600"]
    assert row_of(tasks.add.enqueue(given)).arguments["args"] == [given]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"queue_name": "q" * 101}, "name of the queue 'q+' is longer than 100 characters"),
        ({"priority": 101}, "priority must be a whole number between -100 and 100"),
        ({"priority": 0.5}, "priority must be a whole number"),
        ({"run_after": dt.datetime(2026, 1, 2)}, "run_after must be an aware datetime"),
    ],
)
def test_task_that_can_not_be_is_refused(options, text):
    with pytest.raises(api.InvalidTask, match=text):
        tasks.add.using(**options)


def test_task_of_another_backend_is_refused(enqueue_with):
    with pytest.raises(
        api.InvalidTask, match=r"is a task of the backend 'default' of .*, and this is 'other'"
    ):
        enqueue_with(backend("other"), tasks.add.using(queue_name="red"))
    assert QueuedTask.objects.count() == 0


@pytest.fixture(params=["enqueue", "enqueue_many"])
def enqueue_with(request):
    ways = {
        "enqueue": lambda one, task: one.enqueue(task, [1], {}),
        "enqueue_many": lambda one, task: one.enqueue_many([(task, [1], {})]),
    }
    return ways[request.param]


def test_function_whose_path_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(tasks.add.func, "__qualname__", "a" * 500)
    with pytest.raises(
        api.InvalidTask, match=r"name of the function 'tests.*' is longer than 500 characters"
    ):
        tasks.add.enqueue(1)
    assert QueuedTask.objects.count() == 0


def test_queue_that_the_backend_has_not_is_refused():
    with pytest.raises(api.InvalidTask, match="'green' is not valid for backend"):
        tasks.note_elsewhere.using(queue_name="green")


# The id_function


@pytest.mark.parametrize("given", ["uuid.uuid4", lambda: 7], ids=["path", "callable"])
def test_ids_are_made_by_a_function_of_the_project(given, settings):
    settings.TASKS = setting(id_function=given)
    result = tasks.add.enqueue(1)
    assert re.fullmatch(r"7|[0-9a-f-]{36}", result.id)
    assert backend().get_result(result.id).args == [1]


@pytest.mark.parametrize("made", ["", "x" * 65])
def test_id_that_can_not_be_kept_is_refused(made, settings):
    settings.TASKS = setting(id_function=lambda: made)
    with pytest.raises(ValueError, match=rf"TASKS\['default'\] returned '{made}', of {len(made)} characters"):
        tasks.add.enqueue(1)
    assert QueuedTask.objects.count() == 0
