"""Parts for a `ModelAdmin` of your own: actions that change statuses, and a filter by state.

The actions compute in the database, in integers, so that every digit that an action does not name
stays as it is. Rows that are in no queue (NULL) or hold a foreign number are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.db.models import F, Q
from django.utils.text import capfirst

from modelqueue.clock import now
from modelqueue.engines import engine_for
from modelqueue.source import on_write_database, owner_rows, status_field
from modelqueue.status import State, Status, datetime_to_int

if TYPE_CHECKING:
    from django.db.models import Model, QuerySet
    from django.db.models.expressions import Combinable
    from django.http import HttpRequest

    Action = Callable[["admin.ModelAdmin[Any]", HttpRequest, "QuerySet[Any]"], None]

__all__ = ["admin_actions", "admin_list_filter"]


def admin_actions(field: str) -> list[Action]:
    """Return the seven admin actions for a status field.

    Change the state to created, waiting, working, finished or canceled; the priority to now; the
    attempts to zero. For example::

        class TaskAdmin(admin.ModelAdmin):
            actions = [*modelqueue.admin_actions("status")]

    They ask for the change permission, and say how many rows they changed. Any change of a working task
    takes it away from its worker, whose outcome is then dropped.

    Args:
        field: the name of the `StatusField`.
    """
    _check_name("admin_actions", field)
    name = field.replace("_", " ")
    to_state = [
        _action(
            f"make_{field}_state_{state}",
            f"Change {name} state to {state}",
            field,
            partial(_to_state, state),
        )
        for state in Status.states
    ]
    return [
        *to_state,
        _action(f"make_{field}_priority_now", f"Change {name} priority to now", field, _to_priority_now),
        _action(f"make_{field}_attempts_zero", f"Change {name} attempts to zero", field, _to_attempts_zero),
    ]


def _to_state(state: State, status: F) -> Combinable:
    return status % Status.state_offset + int(state) * Status.state_offset


def _to_priority_now(status: F) -> Combinable:
    return status - status % Status.state_offset + datetime_to_int(now()) * 10 + status % 10


def _to_attempts_zero(status: F) -> Combinable:
    return status - status % 10


def _action(name: str, description: str, field: str, value: Callable[[F], Combinable]) -> Action:
    @admin.action(description=description, permissions=["change"])
    def change(modeladmin: admin.ModelAdmin[Any], request: HttpRequest, queryset: QuerySet[Any]) -> None:
        changed, foreign, locked = _update(queryset, field, value(F(field)))
        text = f"{description}: {changed} changed."
        if foreign:
            text += f" {foreign} left alone, as they hold no status."
        if locked:
            text += f" {locked} left alone, as a transaction works on them. Try again when it has ended."
        modeladmin.message_user(request, text, messages.WARNING if foreign or locked else messages.SUCCESS)

    change.__name__ = change.__qualname__ = name
    return change


def _update(queryset: QuerySet[Any], field: str, value: Combinable) -> tuple[int, int, int]:
    """Set the status of those rows that have one and that nobody has locked.

    Returns:
        How many were set, how many hold no status, and how many are locked.
    """
    rows = on_write_database(queryset)
    column = status_field(rows.model, field)
    first, last = Status.minimum(State.created), Status.maximum(State.canceled)
    engine = engine_for(rows.db)

    def update() -> tuple[int, int, int]:
        changed = with_status = total = 0
        with engine.transaction():
            engine.take_write_lock(column)
            for part in owner_rows(rows, column):
                total += part.count()
                part = part.filter(**{f"{field}__gte": first, f"{field}__lte": last})
                with_status += part.count()
                changed += sum(free.update(**{field: value}) for free in engine.unlocked(part))
        return changed, max(total - with_status, 0), max(with_status - changed, 0)

    return engine.patiently(update)


def admin_list_filter(field: str) -> type[admin.SimpleListFilter]:
    """Return an admin list filter by the state of a status field.

    For example::

        class TaskAdmin(admin.ModelAdmin):
            list_filter = [modelqueue.admin_list_filter("status")]

    Args:
        field: the name of the `StatusField`.
    """
    _check_name("admin_list_filter", field)
    about = field.removesuffix("status").replace("_", " ").strip()

    class QueueFilter(admin.SimpleListFilter):
        title = f"{about} queue status".strip()
        parameter_name = f"{field}_queue"

        def lookups(self, request: HttpRequest, model_admin: admin.ModelAdmin[Any]) -> list[tuple[str, str]]:
            return [(state.name, capfirst(state.name)) for state in Status.states]

        def queryset(self, request: HttpRequest, queryset: QuerySet[Model]) -> QuerySet[Model]:
            name = self.value()
            return queryset if name is None else _in_state(queryset, field, name)

    return QueueFilter


def _check_name(function: str, field: object) -> None:
    if not isinstance(field, str):
        raise TypeError(f"{function}() takes the name of a status field, such as 'status', not {field!r}.")


def _in_state(rows: QuerySet[Any], field: str, name: str) -> QuerySet[Any]:
    try:
        in_state = Q(**Status.filter(field, name))
    except ValueError:  # an address that somebody typed
        in_state = Q(pk__in=[])
    rows = rows.filter(in_state)
    return rows
