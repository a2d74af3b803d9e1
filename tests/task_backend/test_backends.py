"""Backends: several aliases and their queues, each of their options, checks, databases and routers."""

import datetime as dt
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.db import connections

import modelqueue
from modelqueue import testing
from modelqueue.checks import check_settings
from modelqueue.task_backend import ModelQueueBackend, apis
from modelqueue.task_backend import backend as backend_module
from modelqueue.task_backend.backend import backport_backend
from modelqueue.task_backend.models import QueuedTask
from modelqueue.task_backend.options import OPTIONS, Options
from modelqueue.task_backend.queues import task_queues
from tests.actions import SECOND
from tests.processes import ROOT, environment
from tests.task_backend.backends import (
    BACKEND,
    TASKS,
    States,
    api,
    backend,
    handler,
    queue_of,
    refreshed,
    row_of,
    run_all,
    setting,
    tasks,
)

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])


def test_all_that_the_api_has_is_supported():
    one = backend()
    assert isinstance(one, ModelQueueBackend)
    assert one.supports_defer
    assert one.supports_async_task
    assert one.supports_get_result
    assert one.supports_priority


# Aliases and queues


def test_queues_are_called_as_in_the_setting():
    assert sorted(queue.name for queue in task_queues()) == ["default", "other:blue", "other:red"]


def test_queues_of_the_default_alias_are_called_without_it(settings):
    settings.TASKS = {
        "default": {"BACKEND": BACKEND, "QUEUES": ["mail", "default"]},
        "bulk": {"BACKEND": BACKEND},
    }
    assert sorted(queue.name for queue in task_queues()) == ["bulk:default", "default", "mail"]
    assert {queue.name for queue in modelqueue.declared_queues()} >= {"bulk:default", "default", "mail"}


def test_queues_of_a_setting_are_gone_with_it(settings):
    settings.TASKS = {}
    assert task_queues() == []
    assert not {queue.name for queue in modelqueue.declared_queues()} & {"default", "other:red"}


def test_backends_of_others_have_no_queues(settings):
    settings.TASKS = {
        "default": {"BACKEND": f"{api.package}.backends.dummy.DummyBackend"},
        "immediate": {"BACKEND": f"{api.package}.backends.immediate.ImmediateBackend"},
        "gone": {"BACKEND": "nowhere.Backend"},
        "none": {"BACKEND": "os.path.join"},
        "ours": {"BACKEND": BACKEND},
    }
    assert [queue.name for queue in task_queues()] == ["ours:default"]


def test_backend_of_a_project_may_be_derived_from_ours(settings):
    settings.TASKS = {"default": {"BACKEND": "tests.task_backend.test_backends.Derived"}}
    assert [queue.name for queue in task_queues()] == ["default"]
    assert type(backend()) is Derived
    result = tasks.add.enqueue(1)
    assert run_all() == [result.id]


class Derived(ModelQueueBackend):
    pass


def test_each_queue_runs_its_own_tasks():
    first = tasks.add.enqueue(1)
    red, blue = [tasks.note_elsewhere.using(queue_name=name).enqueue(name) for name in ("red", "blue")]
    assert run_all("other:blue") == [blue.id]
    assert run_all("default") == [first.id]
    assert run_all("other:red") == [red.id]


def test_backend_that_names_no_queues_takes_any():
    result = tasks.add.using(queue_name="as you like it").enqueue(1)
    assert row_of(result).queue_name == "as you like it"
    assert run_all("default") == [result.id]
    assert refreshed(result).task.queue_name == "as you like it"


def test_ids_of_one_alias_are_not_known_to_another():
    result = tasks.note_elsewhere.enqueue("a")
    assert backend("other").cancel(result.id)
    for ask in (backend().get_result, backend().cancel, backend().retry):
        with pytest.raises(api.TaskResultDoesNotExist):
            ask(result.id)


# Databases


@pytest.mark.parametrize("how", ["option", "router"])
def test_tasks_are_in_the_database_that_is_named(how, settings):
    if how == "option":
        settings.TASKS = setting(database="other")
    else:
        settings.DATABASE_ROUTERS = [Elsewhere()]
    result = tasks.add.enqueue(1, 2)
    many = backend().enqueue_many([(tasks.add, [1, 3], {})])[0]
    assert not QueuedTask.objects.using("default").exists()
    assert row_of(result, "other").function == "tests.task_backend.tasks.add"
    assert queue_of().using == "other"
    assert run_all("default") == [result.id, many.id]
    assert [refreshed(one).return_value for one in (result, many)] == [3, 4]
    assert backend().retry(result.id) is False


def test_failed_attempts_are_noted_in_the_database_that_is_named(settings):
    settings.TASKS = setting(database="other")
    result = tasks.fail_at_first.enqueue("a")
    run_all("default")
    assert (refreshed(result).status, len(result.errors)) == (States.SUCCESSFUL, 1)


def test_option_is_above_the_router(settings):
    settings.DATABASE_ROUTERS = [Elsewhere()]
    settings.TASKS = setting(database="default")
    tasks.add.enqueue(1)
    assert QueuedTask.objects.using("default").count() == 1


class Elsewhere:
    def db_for_read(self, model, **hints):
        return "other" if model is QueuedTask else None

    db_for_write = db_for_read


# OPTIONS

WRONG = [
    (["retry"], r"OPTIONS is \['retry'\], not a dictionary. There are: database, retry"),
    (
        {"retries": 5},
        "there is no option 'retries'. Did you mean 'retry'[?] There are: database, retry, timeout, lease",
    ),
    ({"time_out": 5}, "Did you mean 'timeout'?"),
    ({"databse": "default"}, "Did you mean 'database'?"),
    ({"result_tll": 5}, "Did you mean 'result_ttl'?"),
    ({"id_func": 5}, "Did you mean 'id_function'?"),
    ({"nothing like it": 5}, "there is no option 'nothing like it'. There are: "),
    ({5: 5}, "there is no option 5"),
    ({"database": 5}, "database=5 is no alias of DATABASES"),
    ({"retry": 9}, "retry=9 is out of range"),
    ({"retry": "3"}, "retry is an int from 0 to 8"),
    ({"timeout": "60"}, "timeout is a number of seconds or a datetime.timedelta, not '60'"),
    ({"timeout": -60}, "timeout=.* is negative"),
    ({"timeout": None}, "timeout is a number of seconds"),
    ({"lease": 2}, "lease=0:00:02 is shorter than 3 s"),
    ({"lease": "long"}, "lease is a number of seconds"),
    ({"delay": -1}, "delay=.* is negative"),
    ({"delay": "nowhere.at_all"}, "delay='nowhere.at_all' can not be imported"),
    ({"delay": "os.sep"}, "delay='os.sep' is no callable"),
    ({"delay": [5]}, "delay is a number of seconds"),
    ({"result_ttl": -1}, "result_ttl=.* is negative. Give None to keep results for ever"),
    ({"result_ttl": "30d"}, "result_ttl is a number of seconds"),
    ({"id_function": "nowhere.at_all"}, "id_function='nowhere.at_all' can not be imported"),
    ({"id_function": "nodots"}, "id_function='nodots' can not be imported"),
    ({"id_function": 5}, "id_function=5 is no callable"),
]


@pytest.mark.parametrize(("options", "text"), WRONG, ids=[one[1] for one in WRONG])
def test_wrong_option_is_refused_with_its_place(options, text):
    with pytest.raises(api.InvalidTaskBackend, match=rf"TASKS\['mail'\]\['OPTIONS'\]: .*{text}"):
        ModelQueueBackend("mail", {"BACKEND": BACKEND, "OPTIONS": options})


def test_each_option_is_taken():
    given = {
        "database": "other",
        "retry": None,
        "timeout": 60,
        "lease": 5.5,
        "delay": "tests.task_backend.test_policies.in_two_hours",
        "result_ttl": dt.timedelta(days=30),
        "id_function": "uuid.uuid4",
    }
    assert list(given) == list(OPTIONS)
    made = ModelQueueBackend("mail", {"BACKEND": BACKEND, "OPTIONS": given}).parsed
    assert (made.database, made.retry, made.timeout, made.lease) == ("other", None, 60 * SECOND, 5.5 * SECOND)
    assert made.delay(1) == 7200 * SECOND
    assert (made.result_ttl, made.id_function().version) == (dt.timedelta(days=30), 4)


def test_without_options_those_of_a_queue_hold():
    assert Options.of({}) == Options()
    assert (Options().retry, Options().lease, Options().timeout) == (3, 30 * SECOND, 3600 * SECOND)


def test_queues_have_the_options_of_their_backend(settings):
    settings.TASKS = setting(timeout=60, lease=7, delay=8, retry=2)
    queue = queue_of()
    assert (queue.policy.timeout, queue.lease, queue.policy.delay) == (60 * SECOND, 7 * SECOND, 8 * SECOND)
    assert queue.retry_field == "retry"


# Checks


def test_nothing_is_wrong_with_the_backends_of_these_tests():
    assert [list(backend(alias).check()) for alias in ("default", "other")] == [[], []]
    call_command("check")


@pytest.mark.parametrize("missing", ["modelqueue", "modelqueue.task_backend"])
def test_app_that_is_not_installed_is_told(missing, monkeypatch):
    monkeypatch.setattr(type(backend_module.installed), "is_installed", lambda self, name: name != missing)
    # Of the second one modelqueue's own checks tell: Django asks a backend only once its API was imported.
    ask = backend().check if missing == "modelqueue" else check_settings
    if missing != "modelqueue":
        assert not list(backend().check())
    error = next(iter(ask()))
    assert (error.id, error.level >= 40) == ("modelqueue.E002", True)
    assert error.msg == f"TASKS['default'] uses ModelQueueBackend, but {missing!r} is not in INSTALLED_APPS."
    assert error.hint.endswith(" there, and run migrate.")


def test_app_that_is_not_installed_is_told_of_a_backend_under_another_path(settings, monkeypatch):
    """Of a subclass, for example: for the checks of modelqueue it is somebody else's."""
    settings.TASKS = {"default": {"BACKEND": "tests.task_backend.test_backends.ModelQueueBackend"}}

    def is_installed(self, name):
        return name != "modelqueue.task_backend"

    monkeypatch.setattr(type(backend_module.installed), "is_installed", is_installed)
    assert not list(check_settings())
    assert [error.id for error in backend().check()] == ["modelqueue.E002"]


@pytest.mark.parametrize("wrong", [None, [], {"default": "path"}, {"default": None}])
def test_setting_that_can_not_be_is_left_to_others_to_tell(wrong, settings):
    settings.TASKS = wrong
    assert not list(check_settings())
    assert task_queues() == []


def test_option_beside_the_options_is_refused():
    with pytest.raises(api.InvalidTaskBackend, match=r"TASKS\['mail'\]\['timeout'\] has no effect there"):
        ModelQueueBackend("mail", {"BACKEND": BACKEND, "timeout": 5})


def test_result_in_place_of_its_id_is_told():
    with pytest.raises(TypeError, match=r"is a result; give its id, result\.id"):
        backend().cancel(tasks.add.enqueue(1))


def test_database_that_there_is_not_is_told():
    one = ModelQueueBackend("mail", {"BACKEND": BACKEND, "OPTIONS": {"database": "nowhere"}})
    (error,) = one.check()
    assert error.id == "modelqueue.E003"
    assert error.msg == "TASKS['mail']['OPTIONS']['database'] is 'nowhere', which is not in DATABASES."
    assert error.hint == f"There are: {', '.join(connections)}."


@pytest.mark.skipif(not hasattr(handler, "checks"), reason="the checks of this API are an app's of its own")
def test_checks_of_the_project_tell_it(settings):
    settings.TASKS = setting(database="nowhere")
    with pytest.raises(CommandError, match=r"modelqueue\.E003"):
        call_command("check")


# Both APIs


both = pytest.mark.skipif(
    api.package == apis.BACKPORT or find_spec(apis.BACKPORT) is None, reason="there is one API alone"
)


def add_by_backport(a, b):
    return a + b


@both
def test_tasks_of_both_apis_are_run_and_each_has_a_result_of_its_own():
    import django_tasks

    made = django_tasks.task(add_by_backport)
    plain, globals()["add_by_backport"] = add_by_backport, made
    try:
        results = [made.enqueue(1, 2), tasks.add.enqueue(3, 4)]
        run_all()
        for result in results:
            result.refresh()
    finally:
        globals()["add_by_backport"] = plain
    assert [result.return_value for result in results] == [3, 7]
    assert [type(result) for result in results] == [django_tasks.TaskResult, api.TaskResult]
    assert type(django_tasks.task_backends["default"]) is backport_backend()
    assert type(handler.task_backends["default"]) is ModelQueueBackend
    with pytest.raises(django_tasks.exceptions.TaskResultDoesNotExist):
        django_tasks.task_backends["default"].get_result("nobody")


# Built while modules are imported


def test_backend_that_is_built_at_import_touches_no_model():
    script = """
import sys
import tests.task_backend.tasks as tasks
from django.apps import apps
assert type(tasks.add.get_backend()).__name__ == "ModelQueueBackend", tasks.add.get_backend()
assert tasks.fail.using(priority=5).get_backend().alias == "default"
assert not apps.models_ready
assert "modelqueue.task_backend.models" not in sys.modules
import django
django.setup()
from modelqueue.task_backend.models import QueuedTask
print("ready")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment() | {"MODELQUEUE_TEST_TASK_BACKENDS": json.dumps(TASKS)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ready\n"), done.stderr


# Without time zones


@pytest.fixture
def _naive(settings):
    settings.USE_TZ = False
    yield
    settings.USE_TZ = True


@pytest.mark.usefixtures("_naive")
def test_times_are_naive_and_local_where_the_project_has_no_zones():
    moment = dt.datetime.now().replace(microsecond=0)
    result = tasks.fail_at_first.enqueue("a")
    many = backend().enqueue_many([(tasks.add, [1], {})])[0]
    run_all()
    assert refreshed(many).status == States.SUCCESSFUL
    assert (refreshed(result).status, len(result.errors)) == (States.SUCCESSFUL, 1)
    for one in (result.enqueued_at, result.started_at, result.last_attempted_at, result.finished_at):
        assert one.tzinfo is None
        assert moment - SECOND <= one <= dt.datetime.now() + SECOND
    assert result.enqueued_at <= result.started_at < result.last_attempted_at


@pytest.mark.usefixtures("_naive")
def test_deferred_task_has_a_naive_time_where_the_project_has_no_zones():
    moment = dt.datetime.now().replace(microsecond=0) + dt.timedelta(hours=1)
    result = tasks.add.using(run_after=moment).enqueue(1)
    over = tasks.add.using(run_after=moment - dt.timedelta(hours=2)).enqueue(1)
    assert run_all() == [over.id]
    assert refreshed(result).task.run_after == moment
    with testing.travel(moment.astimezone() - SECOND):
        assert run_all() == []
    with testing.travel(moment.astimezone()):
        assert run_all() == [result.id]


@pytest.mark.usefixtures("_naive")
def test_zone_of_a_request_changes_no_time():
    from django.utils import timezone

    before = dt.datetime.now() - SECOND
    with timezone.override("Asia/Tokyo"):
        result = tasks.add.enqueue(1)
        run_all()
        result.refresh()
    for one in (result.enqueued_at, result.started_at, result.finished_at):
        assert before <= one <= dt.datetime.now() + SECOND


@pytest.mark.usefixtures("_naive")
def test_task_may_be_deferred_to_a_time_with_a_zone_where_the_project_has_none():
    moment = dt.datetime(2126, 1, 2, tzinfo=dt.timezone.utc)
    result = tasks.add.using(run_after=moment).enqueue(1)
    assert backend().get_result(result.id).task.run_after == moment.astimezone().replace(tzinfo=None)


def test_time_beyond_the_calendar_is_refused():
    moment = dt.datetime.max.replace(tzinfo=dt.timezone(dt.timedelta(hours=-5)))
    with pytest.raises(api.InvalidTask, match="beyond the calendar"):
        tasks.add.using(run_after=moment).enqueue(1)


@pytest.mark.parametrize(
    "both",
    [
        {"default": {"QUEUES": ["default", "reports"]}, "reports": {"QUEUES": []}},
        {"default": {"QUEUES": ["x:default"]}, "x": {}},
        {"default": {"QUEUES": ["mail", "Mail"]}},
        {"default": {"QUEUES": ["a b", "a_b"]}},
    ],
)
def test_queues_that_the_worker_would_call_alike_are_refused(both, settings):
    before = [queue.name for queue in modelqueue.declared_queues()]
    with pytest.raises(ImproperlyConfigured, match=r"TASKS\[.* and .*TASKS\[.* would both call"):
        settings.TASKS = {alias: {"BACKEND": BACKEND, **one} for alias, one in both.items()}
    assert [queue.name for queue in modelqueue.declared_queues()] == before


def test_queue_that_is_called_like_another_one_of_the_project_is_refused(settings):
    before = [queue.name for queue in modelqueue.declared_queues()]
    with pytest.raises(ValueError, match=r"two queues of the name 'testapp.review'"):
        settings.TASKS = {"default": {"BACKEND": BACKEND, "QUEUES": ["a", "testapp.review", "z"]}}
    assert [queue.name for queue in modelqueue.declared_queues()] == before


def test_queue_that_the_command_line_can_not_take_has_underscores_there(settings):
    settings.TASKS = {"default": {"BACKEND": BACKEND, "QUEUES": ["high priority", "mails/bulk"]}}
    result = tasks.add.using(queue_name="high priority").enqueue(1)
    assert run_all("high_priority") == [result.id]
    assert {queue.name for queue in task_queues()} == {"high_priority", "mails_bulk"}


def test_queue_that_is_named_twice_is_one(settings):
    settings.TASKS = {"default": {"BACKEND": BACKEND, "QUEUES": ["mail", "mail"]}}
    assert [queue.name for queue in task_queues()] == ["mail"]


def test_queues_that_are_a_text_are_refused(settings):
    with pytest.raises(ImproperlyConfigured, match=r"'mail', each letter of which would be a queue"):
        settings.TASKS = {"default": {"BACKEND": BACKEND, "QUEUES": "mail"}}
