"""Running: what a function gets and gives, and that nothing but a Django task is ever called."""

import importlib
import sys
from threading import Thread

import pytest
from django.db import OperationalError, connections

from modelqueue import State
from modelqueue.task_backend import results
from modelqueue.task_backend.execution import execute
from modelqueue.task_backend.models import QueuedTask
from tests.task_backend.backends import States, backend, queue_of, refreshed, row_of, run_all, run_one, tasks
from tests.testapp.models import Ledger

pytestmark = pytest.mark.django_db(transaction=True)

PLACE = "tests.task_backend.tasks"


@pytest.mark.parametrize("task", [tasks.add, tasks.add_later], ids=["def", "async def"])
def test_function_is_called_with_its_arguments(task):
    results = [task.enqueue(1, 2), task.enqueue("a", b="b"), task.enqueue(a=[1], b=[2])]
    run_all()
    assert [refreshed(result).return_value for result in results] == [3, "ab", [1, 2]]


@pytest.mark.parametrize(("task", "error"), [(tasks.fail, ValueError), (tasks.fail_later, LookupError)])
def test_function_that_raises_has_failed(task, error):
    result = task.enqueue("so")
    run_all()
    assert refreshed(result).status == States.FAILED
    assert result.errors[0].exception_class is error
    assert "so" in result.errors[0].traceback


def test_function_may_take_the_context():
    result, later = tasks.tell.enqueue(1, [2], c=3), tasks.tell_later.enqueue()
    run_all()
    assert refreshed(result).return_value == {
        "id": result.id,
        "status": "RUNNING",
        "attempt": 1,
        "args": [1, [2]],
        "kwargs": {"c": 3},
        "workers": 1,
    }
    assert refreshed(later).return_value == later.id


@pytest.mark.parametrize("kind", ["nested", "none", "false"])
def test_value_that_json_has_is_returned(kind):
    result = tasks.give.enqueue(kind)
    run_all()
    assert refreshed(result).status == States.SUCCESSFUL
    assert (
        result.return_value
        == {
            "nested": {"list": [1, [2, {"three": 3}]], "none": None, "text": "ü\U0001f600"},
            "none": None,
            "false": False,
        }[kind]
    )


def test_value_is_returned_as_json_has_it():
    result = tasks.give.enqueue("tuple")
    run_all()
    assert refreshed(result).return_value == [1, 2]


@pytest.mark.parametrize("kind", ["object", "set", "time", "nan", "NUL", "itself"])
def test_value_that_json_has_not_is_a_failure(kind):
    result = tasks.give.enqueue(kind)
    run_all()
    assert refreshed(result).status == States.FAILED
    (error,) = result.errors  # another attempt would do all of it again
    assert error.exception_class is TypeError  # as in Django's own backends
    assert "tests.task_backend.tasks.give returned what is not JSON: " in error.traceback
    assert row_of(result).return_value is None


def test_thread_without_a_connection_opens_none_for_a_return_value(monkeypatch):
    """Else a success would be a failure while the server is full."""

    def refuse(*arguments):
        raise OperationalError("Too many connections")

    tasks.give.enqueue("nested")
    (row,) = queue_of().claim()
    monkeypatch.setattr(type(connections["default"]), "get_new_connection", refuse)
    thread = Thread(target=execute, args=[row])
    thread.start()
    thread.join()
    assert row.return_value["list"] == [1, [2, {"three": 3}]]


@pytest.mark.parametrize("levels", [31, 32])
def test_value_that_is_nested_more_deeply_than_mariadb_takes_is_a_failure_there(levels, vendor):
    result = tasks.nest.enqueue(levels)
    run_all()
    if vendor == "mysql" and levels > 31:
        assert refreshed(result).status == States.FAILED
        assert "nested 32 levels deep, and the database takes 31" in result.errors[0].traceback
    else:
        assert refreshed(result).status == States.SUCCESSFUL


def test_value_of_an_earlier_attempt_is_not_kept_after_a_failure():
    result = tasks.fail_at_first.enqueue("a")
    run_one()
    assert row_of(result).return_value is None
    run_one()
    assert row_of(result).return_value == "at last"


# Functions that are not there any more


@pytest.fixture
def store():
    """Enqueue a task, and let its row name another function."""

    def store(path, task=tasks.add, **values):
        result = task.enqueue(1, 2)
        QueuedTask.objects.filter(result_id=result.id).update(function=path, **values)
        return result

    return store


@pytest.mark.parametrize(
    "path",
    [
        f"{PLACE}.gone",
        "tests.task_backend.gone.add",
        "nowhere.at.all",
        "nodots",
        "",
        ".add",
        "tests..add",
        f"{PLACE}.add.func",
        f"{PLACE}.Plain.__call__",
    ],
)
def test_task_whose_function_is_not_there_fails_and_says_so(path, store, caplog):
    result, other = store(path, retry=0), tasks.add.enqueue(1, 2)
    run_all()
    row = row_of(result)
    assert (row.status.state, row.status.attempts) == (State.canceled, 1)
    text = f"builtins.ImportError: The task {path} can not be imported: "
    assert row.error.startswith(text)
    assert "Bring it back under that name, and retry the task." in row.error
    with pytest.raises(ImportError, match=r"can not be imported.*renamed, moved or removed"):
        result.refresh()
    assert f"Task id={result.id} path={path} state=FAILED: The task" in caplog.text
    assert refreshed(other).status == States.SUCCESSFUL


def test_task_whose_function_is_not_there_is_tried_as_often_as_others(store):
    result = store(f"{PLACE}.gone", retry=2)
    run_all()
    row = row_of(result)
    assert (row.status.state, row.status.attempts) == (State.canceled, 3)
    assert len(row.failures) == 3


def test_task_is_retried_when_its_function_is_back(store, monkeypatch):
    result = store(f"{PLACE}.gone", retry=0)
    run_all()
    monkeypatch.setattr(tasks, "gone", tasks.add, raising=False)
    result.refresh()
    assert (result.status, result.errors[0].exception_class) == (States.FAILED, ImportError)
    assert backend().retry(result.id)
    run_all()
    assert (refreshed(result).status, result.return_value) == (States.SUCCESSFUL, 3)
    assert [error.exception_class for error in result.errors] == [ImportError]


BROKEN = {
    "syntax": ("def add(:", "SyntaxError"),
    "name": ("nothing", "NameError: name 'nothing' is not defined"),
    "import": ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_task_whose_module_does_not_import_any_more_fails_and_is_retried_when_it_does(
    kind, store, tmp_path, monkeypatch
):
    code, text = BROKEN[kind]
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / f"broken_by_{kind}.py"
    module.write_text(code)
    result = store(f"{module.stem}.add", retry=0)
    run_all()
    assert row_of(result).status.state == State.canceled
    assert text in row_of(result).error
    with pytest.raises(ImportError, match="can not be imported"):
        backend().get_result(result.id)
    module.write_text(f"from {PLACE} import add  # as it was before the last deploy\n")
    importlib.invalidate_caches()
    assert backend().retry(result.id)
    run_all()
    assert refreshed(result).return_value == 3
    sys.modules.pop(module.stem)


# No tasks


@pytest.mark.parametrize(
    "path",
    [
        f"{PLACE}.plain",
        f"{PLACE}.Plain",
        f"{PLACE}.Lookalike",
        f"{PLACE}.lookalike",
        f"{PLACE}.write_down",
        f"{PLACE}.task",
        f"{PLACE}.api",
        "os.abort",
        "builtins.exec",
        "tests.task_backend.tasks",
        "tests.testapp.queues.do_errand",
    ],
)
def test_what_is_no_task_is_never_called(path, store):
    result = store(path, retry=0)
    run_all()
    row = row_of(result)
    assert row.status.state == State.canceled
    assert f"{path} is no task, but " in row.error
    assert "so it is not called. Decorate it with @task." in row.error
    with pytest.raises(ImportError, match="is no task"):
        backend().get_result(result.id)
    assert not Ledger.objects.exists()


def test_function_that_is_no_task_any_more_is_retried_when_it_is_again(store, monkeypatch):
    monkeypatch.setattr(tasks, "changed", tasks.add.func, raising=False)
    result = store(f"{PLACE}.changed", retry=0)
    run_all()
    assert "is no task, but function" in row_of(result).error
    monkeypatch.setattr(tasks, "changed", tasks.add)
    backend().retry(result.id)
    run_all()
    assert refreshed(result).return_value == 3


def test_arguments_that_its_function_does_not_take_any_more_are_a_failure(store):
    result = store(f"{PLACE}.takes_nothing", retry=0)
    run_all()
    assert (
        "takes_nothing() takes 0 positional arguments but 2 were given"
        in refreshed(result).errors[0].traceback
    )


def test_queue_that_the_backend_has_no_more_is_in_nobodys_way(settings):
    """Its tasks wait until it is back."""
    result = tasks.note_elsewhere.enqueue("a")
    kept = tasks.note_elsewhere.using(queue_name="blue").enqueue("b")
    settings.TASKS = {**settings.TASKS, "other": {**settings.TASKS["other"], "QUEUES": ["blue"]}}
    assert run_all() == [kept.id]
    settings.TASKS = {**settings.TASKS, "other": {**settings.TASKS["other"], "QUEUES": ["blue", "red"]}}
    assert run_all() == [result.id]


def test_module_that_exits_fails_its_own_task_alone(store, monkeypatch):
    actual = results.import_string

    def leave(path):
        if path.endswith("exits.work"):
            raise SystemExit("SETTING is missing")
        return actual(path)

    result, other = store("tests.task_backend.exits.work", retry=0), tasks.add.enqueue(1)
    with monkeypatch.context() as patch:
        patch.setattr(results, "import_string", leave)
        run_all()
        with pytest.raises(ImportError, match="SystemExit: SETTING is missing"):
            backend().get_result(result.id)
    assert row_of(result).status.state == State.canceled
    assert refreshed(other).status == States.SUCCESSFUL


@pytest.mark.parametrize("name", ["cancel_inside", "cancel_inside_later"])
def test_cancellation_that_comes_from_within_is_a_failure(name):
    result = getattr(tasks, name).enqueue()
    run_all()
    assert (refreshed(result).status, result.attempts) == (States.FAILED, 1)
    assert "ended with asyncio.CancelledError, of its own" in result.errors[0].traceback


@pytest.mark.django_db(transaction=False)
def test_async_task_sees_what_is_in_the_transaction_of_a_test():
    tasks.write_down("a")
    result = tasks.count_later.enqueue("a")
    run_all()
    assert refreshed(result).return_value == 1
