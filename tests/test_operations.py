"""`AddNotifyTrigger`: what PostgreSQL tells and what it does not, and what the operation is to migrations."""

import pytest
from django.db import connection, migrations, models, transaction
from django.db.migrations.state import ProjectState
from django.db.migrations.writer import MigrationWriter

from modelqueue import Status, now
from modelqueue.engines.notify import Ear
from modelqueue.operations import AddNotifyTrigger
from tests.actions import SECOND
from tests.testapp.models import Job, PrintJob

pytestmark = pytest.mark.django_db(transaction=True)
on_postgresql = pytest.mark.vendor("postgresql")


def state_of_the_tests():
    from django.apps import apps

    return ProjectState.from_apps(apps)


def apply(operation, state, backwards=False, app_label="testapp"):
    verb = operation.database_backwards if backwards else operation.database_forwards
    with connection.schema_editor() as editor:
        verb(app_label, editor, state, state)


@pytest.fixture
def state():
    return state_of_the_tests()


@pytest.fixture
def install(state):
    """Apply the operation for a field of the test app; it is undone after the test."""
    done = []

    def install(model, field="status"):
        operation = AddNotifyTrigger(model, field)
        apply(operation, state)
        done.append(operation)
        return operation

    yield install
    for operation in done:
        apply(operation, state, backwards=True)


@pytest.fixture
def told():
    """Return of which tables something was told since; to be asked for once."""
    ear = Ear("default")
    ear.listen()
    yield lambda: ear.wait(0.5)
    ear.close()


def rows(sql):
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


def triggers():
    return rows(
        "SELECT relname, attname FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid "
        "JOIN pg_attribute ON attrelid = tgrelid AND attnum = ANY(tgattr) "
        "WHERE tgname LIKE 'modelqueue_%' ORDER BY 1, 2"
    )


def functions():
    return rows("SELECT proname FROM pg_proc WHERE proname = 'modelqueue_notify'")


# What is told


@on_postgresql
@pytest.mark.parametrize("priority", [None, 0, 5], ids=["now", "zero", "five"])
def test_new_task_is_told(priority, install, told):
    install("Job")
    Job.objects.create(**({} if priority is None else {"status": Status.waiting(priority)}))
    assert told() == {"testapp_job"}


@on_postgresql
def test_task_stamped_by_a_clock_that_is_a_little_ahead_is_told(install, told):
    install("Job")
    Job.objects.create(status=Status.waiting(now() + SECOND / 2))
    assert told() == {"testapp_job"}


@on_postgresql
def test_task_that_is_put_into_the_queue_is_told(install, told):
    job = Job.objects.create(status=Status.created())
    install("Job")
    Job.objects.filter(pk=job.pk).update(status=Status.waiting())
    assert told() == {"testapp_job"}


@on_postgresql
def test_tasks_that_are_copied_into_their_table_are_told(install, told):
    install("Task")
    with connection.cursor() as cursor, cursor.copy("COPY testapp_task (data, status) FROM STDIN") as copied:
        for _ in range(3):
            copied.write_row(("", int(Status.waiting())))
    assert told() == {"testapp_task"}


@on_postgresql
def test_nothing_is_told_of_claims_outcomes_later_tasks_and_other_fields(install, told):
    waiting = Job.objects.create()
    install("Job")
    Job.objects.filter(pk=waiting.pk).update(title="another")
    for status in (Status.working(), Status.finished(), Status.canceled(), Status.created(), 7, -7):
        Job.objects.filter(pk=waiting.pk).update(status=status)
    Job.objects.create(status=Status.waiting(now() + 60 * SECOND))
    Job.objects.create(status=Status.waiting(10**17 - 1))
    assert told() == set()


@on_postgresql
def test_nothing_is_told_of_what_is_rolled_back_or_of_no_queue(install, told):
    install("Job", "review_status")
    with transaction.atomic():
        Job.objects.create(review_status=Status.waiting())
        transaction.set_rollback(True)
    Job.objects.create()
    assert told() == set()


# Tables and fields


@on_postgresql
def test_trigger_is_on_the_table_that_has_the_field(install, told):
    install("PrintJob")
    assert triggers() == [("testapp_job", "status")]
    PrintJob.objects.create()
    assert told() == {"testapp_job"}


@on_postgresql
def test_two_fields_of_a_model_have_a_trigger_each_and_need_one_function(state):
    first, second = AddNotifyTrigger("job", "status"), AddNotifyTrigger("Job", "review_status")
    for operation in (first, second):
        apply(operation, state)
    assert triggers() == [("testapp_job", "review_status"), ("testapp_job", "status")]
    apply(first, state, backwards=True)
    assert triggers() == [("testapp_job", "review_status")]
    assert len(functions()) == 1
    apply(second, state, backwards=True)
    assert triggers() == functions() == []


LONG = "s" * 63


@on_postgresql
@pytest.mark.parametrize("column", ["Status now", "order", LONG])
def test_migration_goes_forwards_backwards_and_forwards_whatever_names_are(column, told):
    """The trigger follows its table to another name."""

    class Migration(migrations.Migration):
        operations = [
            migrations.CreateModel(
                "Odd",
                [
                    ("id", models.BigAutoField(primary_key=True)),
                    ("status", models.BigIntegerField(db_column=column)),
                ],
                {"db_table": "Odd table"},
            ),
            AddNotifyTrigger("Odd", "status"),
        ]

    migration = Migration("0001_initial", "app")
    before, after = ProjectState(), migration.mutate_state(ProjectState())
    for _ in range(2):
        with connection.schema_editor() as editor:
            migration.apply(before.clone(), editor)
        assert triggers() == [("Odd table", column)]
        after.apps.get_model("app", "Odd").objects.create(status=Status.waiting())
        assert told() == {"Odd table"}
        with connection.schema_editor() as editor:
            migration.unapply(before.clone(), editor)
        assert triggers() == functions() == []


@on_postgresql
def test_trigger_is_added_to_a_table_that_django_does_not_manage(state):
    state.models["testapp", "job"].options["managed"] = False
    operation = AddNotifyTrigger("Job", "status")
    apply(operation, state)
    assert triggers() == [("testapp_job", "status")]
    apply(operation, state, backwards=True)
    assert triggers() == []


@on_postgresql
def test_trigger_follows_its_table_to_another_name(install, told):
    install("Job")
    with connection.schema_editor() as editor:
        editor.alter_db_table(Job, "testapp_job", "renamed")
    try:
        with connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO renamed (title, status, error) VALUES ('', %s, '')", [int(Status.waiting())]
            )
            assert told() == {"renamed"}
            cursor.execute("DELETE FROM renamed")
    finally:
        with connection.schema_editor() as editor:
            editor.alter_db_table(Job, "renamed", "testapp_job")


# As an operation


def test_nothing_is_done_where_the_router_does_not_migrate_the_model(state, settings):
    settings.DATABASE_ROUTERS = [f"{__name__}.Elsewhere"]
    assert statements(AddNotifyTrigger("Job", "status"), state) == []


class Elsewhere:
    def allow_migrate(self, db, app_label, model_name=None, **hints):
        return model_name != "job"


def statements(operation, state, backwards=False):
    """What `sqlmigrate` shows."""
    with connection.schema_editor(collect_sql=True) as editor:
        verb = operation.database_backwards if backwards else operation.database_forwards
        verb("testapp", editor, state, state)
    return editor.collected_sql


def test_sqlmigrate_shows_its_statements_on_postgresql_and_other_databases_need_none(state, vendor):
    operation = AddNotifyTrigger("Job", "status")
    forwards, backwards = statements(operation, state), statements(operation, state, backwards=True)
    if vendor != "postgresql":
        assert forwards == backwards == []
        return
    text = "\n".join(forwards)
    assert (
        'CREATE TRIGGER "modelqueue_notify_status" AFTER INSERT OR UPDATE OF "status" ON "testapp_job"'
        in text
    )
    assert "pg_notify('modelqueue', TG_TABLE_NAME)" in text
    assert all(sql.endswith(";") for sql in forwards + backwards)
    assert backwards[0] == 'DROP TRIGGER IF EXISTS "modelqueue_notify_status" ON "testapp_job";'
    assert triggers() == []


def test_operation_changes_no_state_and_says_what_it_does(state):
    operation = AddNotifyTrigger("Job", "status")
    before = state.models["testapp", "job"].clone()
    operation.state_forwards("testapp", state)
    assert state.models["testapp", "job"] == before
    assert operation.describe() == "Tell workers at once of due tasks of Job.status"
    assert operation.migration_name_fragment == "job_status_notify"
    assert operation.reversible


def test_operation_is_written_to_a_file_as_it_is():
    """As by `squashmigrations`."""
    migration = type(
        "Migration", (migrations.Migration,), {"operations": [AddNotifyTrigger("Job", "status")]}
    )
    text = MigrationWriter(migration("0002_squashed", "app")).as_string()
    assert "import modelqueue.operations" in text
    names = {}
    exec(text, names)
    (made,) = names["Migration"].operations
    assert made.deconstruct() == ("AddNotifyTrigger", (), {"model_name": "Job", "field_name": "status"})


@pytest.mark.parametrize(
    ("model", "field", "error", "words"),
    [
        ("Jib", "status", ValueError, "the app 'testapp' has no model 'Jib' at this point of its migrations"),
        ("Job", "state", ValueError, "Job has no field 'state', which should be a modelqueue.StatusField"),
        ("Job", "title", TypeError, "Job.title is a CharField, not a modelqueue.StatusField"),
        ("Job", "id", TypeError, "Job.id is a BigAutoField, not a modelqueue.StatusField"),
    ],
)
def test_what_is_no_status_field_is_refused_on_any_database(model, field, error, words, state):
    with pytest.raises(error, match=words):
        apply(AddNotifyTrigger(model, field), state)


@pytest.mark.parametrize("arguments", [(Job, "status"), ("Job", None)])
def test_names_are_given_as_text(arguments):
    with pytest.raises(TypeError, match="takes the names of a model and of a field, not "):
        AddNotifyTrigger(*arguments)
