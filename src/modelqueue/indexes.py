"""`QueueIndex`: an index of the tasks that a worker looks for, and of no other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.db import models
from django.db.models import Q

from modelqueue.source import status_field
from modelqueue.status import END_OF_LIVE, FIRST_LIVE

if TYPE_CHECKING:
    from django.db.backends.base.schema import BaseDatabaseSchemaEditor
    from django.db.backends.ddl_references import Statement

__all__ = ["QueueIndex"]


class QueueIndex(models.Index):
    """An index for ``Meta.indexes``, of the waiting and the working tasks alone where the database can.

    It stays small however many tasks have been finished, as these are not in it. A database without partial
    indexes (MariaDB, MySQL) gets an ordinary index of the field. The field needs none of its own then::

        class Photo(models.Model):
            status = modelqueue.StatusField(db_index=False)

            class Meta:
                indexes = [modelqueue.QueueIndex("status", name="photo_queue")]

    Args:
        field: the name of the status field.
        name: of the index, 30 characters at most; None: Django makes one. In an abstract model with
            ``%(class)s`` in it, as its children need different ones.

    Raises:
        TypeError: `field` is no str; when it is created, also: it is no status field.
        ValueError: `field` is no name of a field.
    """

    suffix = "mq"  # of a name that Django makes, lest it is that of an ordinary index of the field

    def __init__(self, field: str, *, name: str | None = None) -> None:
        if not isinstance(field, str):
            raise TypeError(f"QueueIndex takes the name of a status field, a str, not {field!r}.")
        if not field.isidentifier():
            raise ValueError(
                f"{field!r} is no name of a status field. Give for example QueueIndex('status'): one field, "
                "in the order in which tasks run."
            )
        super().__init__(fields=[field], name=name)

    def deconstruct(self) -> tuple[str, tuple[str], dict[str, Any]]:
        return "modelqueue.QueueIndex", (self.fields[0],), {"name": self.name}

    def create_sql(
        self,
        model: type[models.Model],
        schema_editor: BaseDatabaseSchemaEditor,
        using: str = "",
        **kwargs: Any,
    ) -> Statement:
        name = status_field(model, self.fields[0]).name
        # Not by `condition` of this one: where the database has no such thing, Django would warn of it.
        condition = None
        if schema_editor.connection.features.supports_partial_indexes:
            condition = Q(**{f"{name}__gte": FIRST_LIVE, f"{name}__lt": END_OF_LIVE})
        index = models.Index(fields=[name], name=self.name, condition=condition)
        return index.create_sql(model, schema_editor, using, **kwargs)
