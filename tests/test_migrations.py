"""What migrations see of the fields: plain columns, and nothing new for a project that used modelqueue 2."""

import django
import pytest
from django.db import connection, migrations, models
from django.db.migrations.autodetector import MigrationAutodetector
from django.db.migrations.graph import MigrationGraph
from django.db.migrations.state import ModelState, ProjectState
from django.db.migrations.writer import MigrationWriter
from django.test.utils import isolate_apps

from modelqueue import ErrorField, Status, StatusField

# As `makemigrations` wrote it for the declaration in the README of modelqueue 2.2.1, where StatusField was
# another name of BigIntegerField.
MIGRATION_OF_2_2_1 = """
from django.db import migrations, models
import modelqueue


class Migration(migrations.Migration):
    initial = True
    dependencies = []
    operations = [
        migrations.CreateModel(
            name="Task",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("field", models.BigIntegerField(db_index=True, default=modelqueue.Status.waiting)),
            ],
        ),
    ]
"""


def load(text):
    """The migration that a file with this text holds."""
    names = {}
    exec(text, names)
    return names["Migration"]("0001_initial", "app")


def state_of(field):
    """The state of a project whose migrations have made this field."""
    key = models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")
    state = ProjectState()
    state.add_model(ModelState("app", "Task", [("id", key), ("field", field)]))
    return state


def declared(field):
    """The state of a project whose models declare this field."""
    with isolate_apps("tests.testapp"):
        task = type("Task", (models.Model,), {"__module__": __name__, "Meta": Meta, "field": field.clone()})
    state = ProjectState()
    state.add_model(ModelState.from_model(task))
    return state


class Meta:
    app_label = "app"


def makemigrations(old, new):
    """The migration from one state to another, or None, as read back from the file that was written of it."""
    graph = MigrationGraph()
    graph.add_node(("app", "0001_initial"), None)
    changes = MigrationAutodetector(old, new).changes(graph)
    if not changes:
        return None
    [migration] = changes["app"]
    written = MigrationWriter(migration).as_string()
    assert "StatusField" not in written
    assert "ErrorField" not in written
    return load(written)


def test_changed_option_is_seen():
    migration = makemigrations(state_of(models.BigIntegerField()), declared(StatusField(db_index=False)))
    [change] = migration.operations
    assert isinstance(change, migrations.AlterField)
    assert type(change.field) is models.BigIntegerField
    assert change.field.default == Status.waiting


# No new migration


@pytest.mark.parametrize(
    ("old", "declaration"),
    [
        pytest.param(
            models.BigIntegerField(db_index=True, default=Status.waiting),
            StatusField(db_index=True, default=Status.waiting),
            id="README of 2.2.1",
        ),
        pytest.param(
            models.BigIntegerField(null=True, blank=True, db_index=True),
            StatusField(null=True, blank=True, db_index=True),
            id="nullable",
        ),
        pytest.param(
            models.BigIntegerField(db_index=True, default=Status.waiting), StatusField(), id="nothing said"
        ),
        pytest.param(
            models.BigIntegerField(
                db_index=True, default=Status.created, verbose_name="state", db_column="s"
            ),
            StatusField("state", db_index=True, default=Status.created, db_column="s"),
            id="other options",
        ),
        pytest.param(
            models.BigIntegerField(null=True, default=None),
            StatusField(null=True, default=None, db_index=False),
            id="no index, default None",
        ),
        pytest.param(models.TextField(blank=True, default="", editable=False), ErrorField(), id="ErrorField"),
        pytest.param(
            models.TextField(null=True, default=None),
            ErrorField(null=True, default=None, blank=False, editable=True),
            id="ErrorField of other options",
        ),
    ],
)
def test_declaration_that_says_the_same_needs_no_migration(old, declaration):
    assert makemigrations(state_of(old), declared(declaration)) is None


def test_migration_of_2_2_1_loads_and_needs_no_other():
    state = load(MIGRATION_OF_2_2_1).mutate_state(ProjectState())
    assert makemigrations(state, declared(StatusField(db_index=True, default=Status.waiting))) is None


# At most one

DECLARATIONS = [
    pytest.param(StatusField(), id="nothing said"),
    pytest.param(StatusField(db_index=False), id="no index"),
    pytest.param(StatusField(db_index=True), id="index"),
    pytest.param(StatusField(default=Status.waiting), id="default"),
    pytest.param(StatusField(default=Status.created, db_index=False), id="created, no index"),
    pytest.param(StatusField(default=int(Status.waiting(0))), id="number"),
    pytest.param(StatusField(default=Status.waiting(0)), id="status"),
    pytest.param(StatusField(default=None, db_index=False), id="no default, not null"),
    pytest.param(StatusField(null=True), id="null"),
    pytest.param(StatusField(null=True, default=None), id="null, default None"),
    pytest.param(StatusField(null=True, default=Status.waiting), id="null, default"),
    pytest.param(StatusField(null=True, blank=True, db_index=False), id="null, no index"),
    pytest.param(StatusField("state", editable=False, help_text="digits", unique=True), id="all sorts"),
    pytest.param(ErrorField(), id="ErrorField"),
    pytest.param(ErrorField(editable=True), id="ErrorField editable"),
    pytest.param(ErrorField("failure", blank=False, default="none yet"), id="ErrorField of other options"),
    pytest.param(ErrorField(null=True, default=None), id="ErrorField null"),
]
if django.VERSION >= (5, 0):
    DECLARATIONS += [
        pytest.param(StatusField(db_default=5), id="default of the database"),
        pytest.param(StatusField(db_default=Status.waiting(0)), id="status as default of the database"),
    ]


@pytest.mark.parametrize("declaration", DECLARATIONS)
def test_any_declaration_needs_one_migration_at_most(declaration):
    plain = models.TextField() if isinstance(declaration, ErrorField) else models.BigIntegerField(null=True)
    old, new = state_of(plain), declared(declaration)
    migration = makemigrations(old, new)
    assert migration is None or len(migration.operations) == 1
    after = migration.mutate_state(old) if migration else old
    assert makemigrations(after, new) is None


@pytest.mark.parametrize("declaration", DECLARATIONS)
def test_options_survive_a_clone_of_a_clone(declaration):
    twin = declaration.clone().clone()
    assert type(twin) is type(declaration)
    assert twin.deconstruct() == declaration.deconstruct()
    names = ("db_index", "null", "blank", "editable", "unique", "verbose_name", "default", "help_text")
    assert [getattr(twin, name) for name in names] == [getattr(declaration, name) for name in names]


def test_field_is_a_plain_column_to_migrations():
    _, path, args, options = StatusField().deconstruct()
    assert (path, args) == ("django.db.models.BigIntegerField", [])
    assert options == {"db_index": True, "default": Status.waiting}
    assert StatusField(null=True).deconstruct()[3] == {"db_index": True, "null": True}
    assert ErrorField().deconstruct()[1:] == (
        "django.db.models.TextField",
        [],
        {"blank": True, "default": "", "editable": False},
    )


# On the database


def tables():
    with connection.cursor() as cursor:
        return connection.introspection.table_names(cursor)


@pytest.fixture
def apply(transactional_db):
    """Apply a migration to the database and return the state after it; at the end the table is dropped."""

    def apply(migration, state):
        with connection.schema_editor() as editor:
            return migration.apply(state, editor)

    yield apply
    if "app_task" in tables():
        with connection.schema_editor() as editor:
            editor.delete_model(state_of(models.BigIntegerField()).apps.get_model("app", "Task"))


def columns_with_index():
    with connection.cursor() as cursor:
        constraints = connection.introspection.get_constraints(cursor, "app_task").values()
    return [
        name
        for found in constraints
        if found["index"] and not found["primary_key"]
        for name in found["columns"]
    ]


def test_migration_of_2_2_1_runs(apply):
    state = apply(load(MIGRATION_OF_2_2_1), ProjectState())
    task = state.apps.get_model("app", "Task").objects.create()
    assert Status(task.field).state.name == "waiting"
    assert columns_with_index() == ["field"]


def test_written_migration_runs_and_keeps_the_numbers(apply):
    before = load(MIGRATION_OF_2_2_1.replace("db_index=True, default=modelqueue.Status.waiting", ""))
    state = apply(before, ProjectState())
    number = Status.maximum("canceled")
    state.apps.get_model("app", "Task").objects.create(field=number)
    assert columns_with_index() == []

    with_index = makemigrations(state_of(models.BigIntegerField()), declared(StatusField()))
    state = apply(with_index, state)
    assert columns_with_index() == ["field"]
    rows = state.apps.get_model("app", "Task").objects
    assert rows.get().field == number
    assert Status(rows.create().field).state.name == "waiting"

    without = makemigrations(declared(StatusField()), declared(StatusField(db_index=False, null=True)))
    state = apply(without, state)
    assert columns_with_index() == []
    assert state.apps.get_model("app", "Task").objects.create().field is None
