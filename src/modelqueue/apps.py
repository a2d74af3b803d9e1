"""The app ``modelqueue``: put it in INSTALLED_APPS for the worker and the system checks. It has no models."""

from __future__ import annotations

from django.apps import AppConfig


class ModelQueueConfig(AppConfig):
    name = "modelqueue"
    verbose_name = "ModelQueue"

    def ready(self) -> None:
        from modelqueue import checks  # noqa: F401  (registers them)
        from modelqueue.queues import discover

        discover()
