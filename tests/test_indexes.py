"""`QueueIndex`: what may be declared, what migrations see of it, and what the database makes of it."""

import pytest
from django.contrib.postgres.operations import AddIndexConcurrently
from django.core import checks
from django.db import connection, migrations, models
from django.db.migrations.autodetector import MigrationAutodetector
from django.db.migrations.graph import MigrationGraph
from django.db.migrations.state import ModelState, ProjectState
from django.db.migrations.writer import MigrationWriter
from django.test.utils import isolate_apps

import modelqueue
from modelqueue import QueueIndex, StatusField
from tests.testapp.models import Archive


@isolate_apps("tests.testapp")
def declared(index, name="Crate", **options):
    """A model with this index."""
    meta = type("Meta", (), {"app_label": "testapp", "indexes": [index], **options})
    attributes = {"status": StatusField(db_index=False), "label": models.TextField(), "Meta": meta}
    return type(name, (models.Model,), {"__module__": __name__, **attributes})


# Declaration


@pytest.mark.parametrize("field", [None, 5, ["status"], models.F("status"), StatusField()])
def test_field_that_is_no_name_is_refused(field):
    with pytest.raises(TypeError, match="QueueIndex takes the name of a status field, a str, not "):
        QueueIndex(field, name="crates")


@pytest.mark.parametrize("field", ["", "-status", "status, label", "crate.status"])
def test_name_of_no_field_is_refused(field):
    with pytest.raises(
        ValueError, match=r"is no name of a status field. Give for example QueueIndex\('status'\)"
    ):
        QueueIndex(field, name="crates")


def test_name_is_made_where_none_is_given():
    index, ordinary = QueueIndex("status"), models.Index(fields=["status"])
    model = declared(index)
    [made] = model._meta.indexes
    assert made.name.startswith("testapp_cra_status_")
    assert made.name.endswith("_mq")
    ordinary.set_name_with_model(model)
    assert ordinary.name != made.name


def test_children_of_an_abstract_model_have_each_an_index():
    parent = declared(QueueIndex("status", name="%(class)s_queue"), "Parent", abstract=True)
    with isolate_apps("tests.testapp"):
        meta = type("Meta", (parent.Meta,), {"app_label": "testapp"})
        child = type("Child", (parent,), {"__module__": __name__, "Meta": meta})
    [index] = child._meta.indexes
    assert index == QueueIndex("status", name="child_queue")
    assert index != models.Index(fields=["status"], name="child_queue")


@pytest.mark.django_db
def test_model_with_it_passes_the_checks_of_every_database():
    model = declared(QueueIndex("status", name="crates"))
    assert model.check(databases=["default"]) == []


def test_field_that_is_not_there_is_an_error_of_the_checks():
    found = declared(QueueIndex("state", name="crates")).check()
    assert [message.id for message in found if message.level >= checks.ERROR] == ["models.E012"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("wrong", ["label", "id"])
def test_field_that_is_no_status_field_is_refused_when_it_is_created(wrong):
    index = QueueIndex(wrong, name="crates")
    with (
        connection.schema_editor(collect_sql=True) as editor,
        pytest.raises(TypeError, match=rf"Crate.{wrong} is a \w+, not a modelqueue.StatusField"),
    ):
        index.create_sql(declared(index), editor)


# Migrations


def state_with(*indexes):
    fields = [("id", models.BigAutoField(primary_key=True)), ("status", models.BigIntegerField())]
    state = ProjectState()
    state.add_model(ModelState("app", "Crate", fields, {"indexes": list(indexes)}))
    return state


def operations(old, new):
    graph = MigrationGraph()
    graph.add_node(("app", "0001_initial"), None)
    changes = MigrationAutodetector(old, new).changes(graph)
    if not changes:
        return []
    [migration] = changes["app"]
    text = MigrationWriter(migration).as_string()
    names = {}
    exec(text, names)
    return text, names["Migration"].operations


def test_migration_that_adds_it_says_so_in_its_own_words():
    index = QueueIndex("status", name="crates")
    text, [operation] = operations(state_with(), state_with(index))
    assert isinstance(operation, migrations.AddIndex)
    assert operation.index == index
    assert "import modelqueue\n" in text
    assert "modelqueue.QueueIndex('status', name='crates')" in text
    assert operations(state_with(index), state_with(index.clone())) == []


def test_index_is_renamed_and_not_made_anew():
    _, [operation] = operations(
        state_with(QueueIndex("status", name="crates")), state_with(QueueIndex("status", name="boxes"))
    )
    assert isinstance(operation, migrations.RenameIndex)


def test_ordinary_index_of_the_same_name_is_replaced():
    old = models.Index(fields=["status"], name="crates")
    _, made = operations(state_with(old), state_with(QueueIndex("status", name="crates")))
    assert [type(operation) for operation in made] == [migrations.RemoveIndex, migrations.AddIndex]


# On the database


@pytest.fixture
def crates(table):
    return table(declared(QueueIndex("status", name="crates")))


def indexes(model):
    with connection.cursor() as cursor:
        found = connection.introspection.get_constraints(cursor, model._meta.db_table)
    return {name: one["columns"] for name, one in found.items() if one["index"] and not one["primary_key"]}


@pytest.mark.django_db(transaction=True)
def test_it_is_there_on_every_database(crates):
    assert indexes(crates) == {"crates": ["status"]}
    [index] = crates._meta.indexes
    with connection.schema_editor() as editor:
        editor.remove_index(crates, index)
    assert indexes(crates) == {}
    with connection.schema_editor() as editor:
        editor.add_index(crates, index)
    assert indexes(crates) == {"crates": ["status"]}


@pytest.mark.django_db(transaction=True)
def test_it_has_the_waiting_and_the_working_tasks_alone_where_the_database_can():
    [index, _] = Archive._meta.indexes
    with connection.schema_editor(collect_sql=True) as editor:
        sql = str(index.create_sql(Archive, editor))
    _, _, condition = sql.partition(" WHERE ")
    if connection.features.supports_partial_indexes:
        assert condition == '("live" >= 2000000000000000000 AND "live" < 4000000000000000000)'
    else:
        assert condition == ""
    assert modelqueue.Status.minimum("waiting") == 2 * 10**18
    assert modelqueue.Status.maximum("working") < 4 * 10**18


@pytest.mark.vendor("postgresql")
@pytest.mark.django_db(transaction=True)
def test_it_can_be_made_while_others_write(crates):
    [index] = crates._meta.indexes
    with connection.schema_editor() as editor:
        editor.remove_index(crates, index)
    state = ProjectState()
    state.add_model(ModelState.from_model(crates))
    operation = AddIndexConcurrently("crate", index)
    with connection.schema_editor(atomic=False) as editor:
        operation.database_forwards("testapp", editor, state, state)
    assert indexes(crates) == {"crates": ["status"]}
