"""The page of the tasks in Django's admin."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from modelqueue import verbs
from modelqueue.admin import admin_list_filter
from modelqueue.source import on_write_database
from modelqueue.task_backend.models import QueuedTask
from modelqueue.task_backend.receivers import record_canceled

__all__ = ["QueuedTaskAdmin"]


@admin.register(QueuedTask)
class QueuedTaskAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    list_display = [
        "number",
        "result_id",
        "function",
        "state",
        "attempts",
        "queue_name",
        "task_priority",
        "enqueued_at",
    ]
    list_filter = [admin_list_filter("status"), "backend_name", "queue_name"]
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

    @admin.display(description=_("state"), ordering="status")
    def state(self, row: QueuedTask) -> str:
        return "" if row.status is None else row.status.state.name

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
