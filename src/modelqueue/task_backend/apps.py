"""The app ``modelqueue.task_backend``: its tasks are rows of a table of its own."""

from __future__ import annotations

from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class TaskBackendConfig(AppConfig):
    name = "modelqueue.task_backend"
    label = "modelqueue_tasks"
    verbose_name = _("Tasks")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from modelqueue.task_backend.receivers import connect

        connect()
