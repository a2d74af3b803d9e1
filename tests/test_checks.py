"""The system checks: what each warns of, and what it leaves in peace."""

import django
import pytest
from django.core import checks
from django.core.checks import registry
from django.db import connection, models
from django.db.utils import ConnectionHandler
from django.test import override_settings
from django.test.utils import isolate_apps

import modelqueue.checks
from modelqueue import State, Status, StatusField
from tests.actions import SECOND, succeed
from tests.testapp.models import Job, Task

ALWAYS = {"condition" if django.VERSION >= (5, 1) else "check": models.Q(pk__gt=0)}


@isolate_apps("tests.testapp")
def warnings(field, **options):
    """The ids and texts of the warnings of a model with this field."""
    names = {"app_label": "testapp", **options}
    attributes = {"__module__": __name__, "status": field, "other": models.IntegerField()}
    model = type("Task", (models.Model,), {**attributes, "Meta": type("Meta", (), names)})
    found = model._meta.get_field("status").check()
    assert all(isinstance(message, checks.Warning) and message.hint for message in found)
    assert all(message.obj is model._meta.get_field("status") for message in found)
    return {message.id: f"{message.msg} {message.hint}" for message in found}


# Declared queues


def queue_warnings():
    found = modelqueue.checks.check_queues()
    assert all(message.hint for message in found)
    return {message.id: message.msg for message in found}


def test_queues_that_share_no_task_get_no_warning(declare):
    declare(Task.objects.filter(data="a"), "status", name="a", delay=SECOND, retry=None)(succeed)
    declare(Task.objects.filter(data="b"), "status", name="b")(succeed)
    declare(Job, "status", name="jobs")(succeed)
    declare(Job, "review_status", name="reviews")(succeed)
    assert queue_warnings() == {}


def test_queue_that_tries_without_end_and_pause_is_w008(declare):
    declare(Task, "status", name="endless", retry=None)(succeed)
    [(identity, text)] = queue_warnings().items()
    assert identity == "modelqueue.W008"
    assert text.startswith("The queue 'endless' (")
    assert "without a pause" in text


def test_two_queues_of_the_same_tasks_are_w009(declare):
    declare(Task, "status", name="one")(succeed)
    declare(Task.objects, "status", name="two")(succeed)
    [(identity, text)] = queue_warnings().items()
    assert identity == "modelqueue.W009"
    assert text.startswith("The queues 'one' (")
    assert "both have all tasks of testapp.Task.status" in text


def test_queue_whose_tasks_can_not_be_asked_for_any_more_is_w010(declare):
    answers = [Task.objects.all(), Task.objects.all(), None]
    declare(lambda: answers.pop(0), "status", name="broken")(succeed)
    while len(answers) > 1:
        answers.pop(0)
    [(identity, text)] = queue_warnings().items()
    assert identity == "modelqueue.W010"
    assert text.startswith("The queue 'broken' (")
    assert "None" in text


FULL = models.Index(fields=["status"], name="full")
LIVE = modelqueue.QueueIndex("status", name="live")
SOME = models.Index(fields=["status"], name="some", condition=models.Q(other=1))


def index_warnings(declare, field, *indexes, where=models.Q(), **options):  # noqa: B008
    """The ids and texts of the warnings of a queue over a model with this field and these indexes."""
    with isolate_apps("tests.testapp"):
        meta = type("Meta", (), {"app_label": "testapp", "indexes": list(indexes), **options})
        attributes = {"__module__": __name__, "status": field, "other": models.IntegerField(), "Meta": meta}
        model = type("Crate", (models.Model,), attributes)
    declare(model.objects.filter(where), "status", name="crates")(succeed)
    return queue_warnings()


@pytest.mark.parametrize(
    ("field", "indexes"),
    [
        (StatusField(), []),
        (StatusField(db_index=False), [LIVE]),
        (StatusField(db_index=False), [SOME, LIVE]),
        (StatusField(db_index=False), [FULL, LIVE]),
        (StatusField(), [modelqueue.QueueIndex("other", name="other")]),
        (StatusField(db_index=False), []),  # W001 warns of it
    ],
)
def test_queue_whose_field_is_in_one_index_gets_no_warning(field, indexes, declare):
    assert index_warnings(declare, field.clone(), *indexes) == {}


def test_queue_without_the_condition_of_the_only_index_is_w011(declare):
    [(identity, text)] = index_warnings(declare, StatusField(db_index=False), SOME).items()
    assert identity == "modelqueue.W011"
    assert text.startswith("testapp.Crate.status is only in indexes with a condition, or behind other fields")
    assert " the queue 'crates' (" in text


def test_index_with_a_condition_may_be_that_of_the_queue(declare):
    assert index_warnings(declare, StatusField(db_index=False), SOME, where=models.Q(other=1)) == {}


BEHIND = [
    {"indexes": [models.Index(fields=["other", "status"], name="one")]},
    {"unique_together": [("other", "status")]},
    {"constraints": [models.UniqueConstraint(fields=["other", "-status"], name="three")]},
]


@pytest.mark.parametrize("options", BEHIND)
def test_index_may_begin_with_what_the_queue_is_filtered_by(options, declare):
    assert index_warnings(declare, StatusField(db_index=False), **options, where=models.Q(other=1)) == {}
    assert warnings(StatusField(db_index=False), **options) == {}


@pytest.mark.parametrize(
    "where",
    [
        models.Q(),
        models.Q(other__gt=1),
        ~models.Q(other=1),
        models.Q(other=1) | models.Q(other=2),
        models.Q(status__state="waiting"),
    ],
)
@pytest.mark.parametrize("options", BEHIND)
def test_index_that_begins_with_something_else_is_w011(options, where, declare):
    [(identity, text)] = index_warnings(declare, StatusField(db_index=False), **options, where=where).items()
    assert identity == "modelqueue.W011"
    assert " the queue 'crates' (" in text


def test_field_with_two_indexes_is_w012(declare):
    [(identity, text)] = index_warnings(declare, StatusField(), LIVE).items()
    assert identity == "modelqueue.W012"
    assert text.startswith("testapp.Crate.status has an index of its own and a QueueIndex")
    declare(modelqueue.declared_queues()[-1].model, "status", name="again")(succeed)
    found = [message.id for message in modelqueue.checks.check_queues()]
    assert found.count("modelqueue.W012") == 1


# Fields


@pytest.mark.parametrize(
    ("field", "options"),
    [
        (StatusField(), {}),
        (StatusField(null=True), {}),
        (StatusField(default=Status.created), {}),
        (StatusField(default=Status.waiting(0)), {}),
        (StatusField(db_index=False), {"indexes": [models.Index(fields=["status"], name="one")]}),
        (StatusField(db_index=False), {"indexes": [models.Index(fields=["-status", "other"], name="two")]}),
        (StatusField(db_index=False), {"indexes": [modelqueue.QueueIndex("status", name="three")]}),
        (StatusField(db_index=False), {"unique_together": [("status", "other")]}),
        (
            StatusField(db_index=False),
            {"constraints": [models.UniqueConstraint(fields=["status", "other"], name="four")]},
        ),
    ],
)
def test_sound_declaration_gets_no_warning(field, options):
    assert warnings(field, **options) == {}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indexes": [models.Index(fields=["other"], name="one")]},
        {"indexes": [models.Index(models.F("other"), name="two")]},
        {"constraints": [models.UniqueConstraint(models.F("other"), name="four")]},
        {"constraints": [models.CheckConstraint(name="five", **ALWAYS)]},
    ],
)
def test_field_that_is_in_no_index_is_w001(options):
    [(identity, text)] = warnings(StatusField(db_index=False), **options).items()
    assert identity == "modelqueue.W001"
    assert text.startswith("testapp.Task.status has no index")
    assert "modelqueue.QueueIndex('status', name=...)" in text
    assert "an index in which 'status' follows what all queues on it are filtered by" in text


def test_default_of_one_moment_is_w002():
    [(identity, text)] = warnings(StatusField(default=Status.created())).items()
    assert identity == "modelqueue.W002"
    assert text.startswith("testapp.Task.status has the default Status(1")
    assert text.endswith("default=modelqueue.Status.created")


@pytest.mark.parametrize("default", [5, 0, -1, True, State.waiting, "waiting", 2.5, 6 * 10**18])
def test_default_that_is_no_status_is_w007(default):
    [(identity, text)] = warnings(StatusField(default=default)).items()
    assert identity == "modelqueue.W007"
    assert text.startswith(f"testapp.Task.status has the default {default!r}, which is no status")


@pytest.mark.parametrize(
    "default", [Status.waiting, Status.waiting(0), int(Status.created(0)), lambda: 5, models.NOT_PROVIDED]
)
def test_other_default_is_not_warned_of(default):
    assert warnings(StatusField(default=default)) == {}


def test_default_of_none_is_not_warned_of():
    assert warnings(StatusField(null=True, default=None)) == {}


@pytest.mark.parametrize("db_index", [True, False])
def test_unique_field_is_w003(db_index):
    [(identity, text)] = warnings(StatusField(unique=True, db_index=db_index)).items()
    assert identity == "modelqueue.W003"
    assert text.startswith("testapp.Task.status is unique")


def test_checks_of_the_column_run_too():
    with isolate_apps("tests.testapp"):
        meta = type("Meta", (), {"app_label": "testapp"})
        attributes = {"__module__": __name__, "Meta": meta, "bad_": StatusField(db_index=False)}
        model = type("Bad", (models.Model,), attributes)
    found = model._meta.get_field("bad_").check()
    assert [message.id for message in found] == ["fields.E001", "modelqueue.W001"]


def test_database_is_asked_about_the_column(monkeypatch):
    refusal = checks.Error("Not on this database.", id="tests.E001")
    monkeypatch.setattr(connection.validation, "check_field", lambda field, **options: [refusal])
    assert refusal in Task._meta.get_field("status").check(databases=["default"])


# Databases


@pytest.fixture
def database(tmp_path, monkeypatch, db):
    """Let the checks see one SQLite database, of these settings."""

    def database(name="queue.sqlite3", **options):
        name = name if name == ":memory:" else tmp_path / name
        settings = {"ENGINE": "django.db.backends.sqlite3", "NAME": name, "OPTIONS": options}
        handler = ConnectionHandler({"default": {}, "queue": settings})
        monkeypatch.setattr(modelqueue.checks, "connections", handler)
        handlers.append(handler)
        return handler["queue"]

    handlers = []
    yield database
    for handler in handlers:
        handler["queue"].close()


def database_warnings(*aliases):
    found = modelqueue.checks.check_databases(aliases)
    assert all(isinstance(message, checks.Warning) and message.hint for message in found)
    return {message.id: message.msg for message in found}


def write_ahead(connection):
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA journal_mode=WAL")


def test_sqlite_without_wal_is_w004(database):
    database()
    text = database_warnings("queue")["modelqueue.W004"]
    assert text.startswith("The SQLite database 'queue' has journal_mode=delete")


def test_sqlite_with_wal_is_sound(database):
    write_ahead(database())
    assert "modelqueue.W004" not in database_warnings("queue")


needs_transaction_mode = pytest.mark.skipif(
    django.VERSION < (5, 1), reason="Django 5.1 has the option transaction_mode"
)


@needs_transaction_mode
@pytest.mark.parametrize(
    ("options", "named"), [({}, "DEFERRED"), ({"transaction_mode": "EXCLUSIVE"}, "EXCLUSIVE")]
)
def test_sqlite_without_immediate_transactions_is_w005(database, options, named):
    write_ahead(database(**options))
    [(identity, text)] = database_warnings("queue").items()
    assert identity == "modelqueue.W005"
    assert text.startswith(f"The SQLite database 'queue' has transaction_mode={named}")


@needs_transaction_mode
def test_sqlite_as_recommended_is_sound(database):
    database(transaction_mode="IMMEDIATE", init_command="PRAGMA journal_mode=WAL")
    assert database_warnings("queue") == {}


@pytest.mark.skipif(django.VERSION >= (5, 1), reason="it can be set from Django 5.1")
def test_transaction_mode_that_can_not_be_set_is_no_warning(database):
    write_ahead(database())
    assert database_warnings("queue") == {}


def test_sqlite_in_memory_is_nobodys_production(database):
    database(":memory:")
    assert database_warnings("queue") == {}


class NowhereRouter:
    def allow_migrate(self, db, app_label, **hints):
        return False


@override_settings(DATABASE_ROUTERS=[NowhereRouter()])
def test_database_without_a_queue_is_not_looked_at(database):
    database()
    assert database_warnings("queue") == {}


def test_no_database_is_looked_at_unasked(django_assert_num_queries, db):
    with django_assert_num_queries(0):
        assert modelqueue.checks.check_databases(None) == []
        assert modelqueue.checks.check_databases() == []


@pytest.mark.vendor("postgresql", "mysql")
@pytest.mark.django_db
def test_database_without_skip_locked_is_w006(monkeypatch):
    monkeypatch.setattr(connection.features, "has_select_for_update_skip_locked", False)
    [(identity, text)] = database_warnings("default").items()
    assert identity == "modelqueue.W006"
    assert text.startswith("The database 'default' has no SKIP LOCKED")


@pytest.mark.django_db
@pytest.mark.db_feature("has_select_for_update_skip_locked")
def test_database_with_skip_locked_is_sound():
    assert database_warnings("default") == {}


def test_app_registers_the_check_under_its_tag():
    assert modelqueue.checks.check_databases in registry.registry.get_checks(include_deployment_checks=False)
    assert modelqueue.checks.check_databases.tags == (checks.Tags.database,)
