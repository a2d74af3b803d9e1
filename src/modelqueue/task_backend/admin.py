"""The page of the tasks in Django's admin."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Any

from django.contrib import admin, messages
from django.db.models import Q
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from modelqueue import verbs
from modelqueue.source import on_write_database
from modelqueue.status import Status
from modelqueue.task_backend.models import QueuedTask
from modelqueue.task_backend.receivers import record_canceled
from modelqueue.task_backend.results import READY, STATES

__all__ = ["QueuedTaskAdmin"]


class ResultStatusFilter(admin.SimpleListFilter):
    title = _("status")
    parameter_name = "result_status"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(name, name) for name in dict.fromkeys(STATES.values())]

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        chosen = self.value()
        if chosen is None:
            return queryset
        if chosen == READY:  # also what has no state at all
            return queryset.exclude(_in_states(name for name in STATES.values() if name != READY))
        return queryset.filter(_in_states([chosen]))


def _in_states(names: Iterable[str]) -> Q:
    """Return the condition that a result has one of these statuses; that nobody has the others."""
    chosen = set(names)
    in_one = [Q(**Status.filter("status", state)) for state, name in STATES.items() if name in chosen]
    return reduce(or_, in_one, Q(pk__in=[]))


@admin.register(QueuedTask)
class QueuedTaskAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    list_display = [
        "number",
        "result_id",
        "function",
        "result_status",
        "attempts",
        "queue_name",
        "task_priority",
        "enqueued_at",
    ]
    list_filter = [ResultStatusFilter, "backend_name", "queue_name"]
    search_fields = ["result_id", "function"]
    ordering = ["-pk"]
    actions = ["retry_tasks", "cancel_tasks"]
    show_full_result_count = False  # which would count all of the table for each page

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def save_model(self, *args: Any) -> None:
        """Save nothing: no field can be changed here, and a worker may have changed them meanwhile."""

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return [field.name for field in QueuedTask._meta.fields]

    @admin.display(description=_("number"), ordering="pk")
    def number(self, row: QueuedTask) -> int:
        """By which the command line names it."""
        return row.pk

    @admin.display(description=_("status"), ordering="status")
    def result_status(self, row: QueuedTask) -> str:
        """In the words of the task API."""
        return READY if row.status is None else STATES.get(row.status.state, READY)

    @admin.display(description=_("attempts"))
    def attempts(self, row: QueuedTask) -> int | None:
        return None if row.status is None else row.status.attempts

    @admin.action(description=_("Retry selected failed tasks"), permissions=["change"])
    def retry_tasks(self, request: HttpRequest, queryset: Any) -> None:
        count = verbs.retry(queryset, "status")
        self.message_user(request, f"{count} waiting again.", messages.SUCCESS)

    @admin.action(description=_("Cancel selected tasks"), permissions=["change"])
    def cancel_tasks(self, request: HttpRequest, queryset: Any) -> None:
        rows = on_write_database(queryset)
        # By their keys, as the list may be of those that run, and these do so no more then.
        running = list(rows.filter(status__state="working").values_list("pk", flat=True))
        count = verbs.cancel(rows, "status")
        # Now, as they may be retried before their workers hear of it.
        record_canceled(QueuedTask.objects.using(rows.db).filter(pk__in=running))
        self.message_user(request, f"{count} canceled.", messages.SUCCESS)
