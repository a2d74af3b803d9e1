"""The record's page in the admin is the page of the task."""

from __future__ import annotations

from django.contrib import admin

import modelqueue
from documents.models import Document


@admin.register(Document)
class DocumentAdmin(admin.ModelAdmin):
    list_display = ["path", "state", "lines", "functions", "classes", "failure"]
    list_filter = [modelqueue.admin_list_filter("status")]
    search_fields = ["path", "error"]
    show_full_result_count = False

    actions = [*modelqueue.admin_actions("status")]
    readonly_fields = ["state", "error", "lines", "functions", "classes", "imports", "digest"]

    @admin.display(ordering="status")
    def state(self, document: Document) -> str:
        """Return the status in words: finished; 3 minutes ago; 1 attempt."""
        return str(document.status)

    @admin.display(description="error")
    def failure(self, document: Document) -> str:
        """Return the first line of the error."""
        return document.error.partition("\n")[0]
