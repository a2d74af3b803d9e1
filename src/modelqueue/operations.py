"""Operations for the migrations of a project. Each of them leaves the state of its models as it is."""

from __future__ import annotations

from typing import Any

from django.db import models, router
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.operations.base import Operation
from django.db.migrations.state import ProjectState

from modelqueue.engines import engine_for
from modelqueue.source import owner_of, status_field

__all__ = ["AddNotifyTrigger"]


class AddNotifyTrigger(Operation):
    """Have PostgreSQL tell the workers at once when a task becomes due by a commit.

    Adds a trigger to the table that has the status field, also if Django does not manage that; migrating
    backwards drops it. Does nothing on other databases, and where the router does not let the model migrate.

    Args:
        model_name: the model, of the app whose migration this is. It may inherit the field.
        field_name: its status field.

    Raises:
        ValueError: when it is applied: at this point of the migrations the app has no such model, or the
            model no such field.
        TypeError: one of the two is no str, or, when it is applied, the field is no status field.
    """

    reversible = True

    def __init__(self, model_name: str, field_name: str) -> None:
        for name in (model_name, field_name):
            if not isinstance(name, str):
                raise TypeError(f"AddNotifyTrigger takes the names of a model and of a field, not {name!r}.")
        self.model_name = model_name
        self.field_name = field_name

    def state_forwards(self, app_label: str, state: ProjectState) -> None:
        """Change nothing: a trigger is no part of a model."""

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        self._execute("create_notify_trigger", app_label, schema_editor, to_state)

    def database_backwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        self._execute("drop_notify_trigger", app_label, schema_editor, to_state)

    def _execute(
        self, verb: str, app_label: str, schema_editor: BaseDatabaseSchemaEditor, state: ProjectState
    ) -> None:
        field, alias = self._field(app_label, state), schema_editor.connection.alias
        owner = owner_of(field)
        # Not self.allow_migrate_model(), which refuses tables that Django does not manage.
        if router.allow_migrate_model(alias, owner) and not owner._meta.swapped:
            statements = getattr(engine_for(alias), verb)
            for sql in statements(owner._meta.db_table, str(field.column)):
                schema_editor.execute(sql, params=None)

    def _field(self, app_label: str, state: ProjectState) -> models.Field[Any, Any]:
        try:
            model = state.apps.get_model(app_label, self.model_name)
        except LookupError:
            raise ValueError(
                f"AddNotifyTrigger: the app {app_label!r} has no model {self.model_name!r} at this point of "
                "its migrations. Put it after the operation that creates the model."
            ) from None
        return status_field(model, self.field_name)

    def describe(self) -> str:
        return f"Tell workers at once of due tasks of {self.model_name}.{self.field_name}"

    @property
    def migration_name_fragment(self) -> str:
        return f"{self.model_name.lower()}_{self.field_name.lower()}_notify"
