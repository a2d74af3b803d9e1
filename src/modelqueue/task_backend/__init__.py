"""A backend for Django's task API: ``"BACKEND": "modelqueue.task_backend.ModelQueueBackend"``.

An app, to be put into INSTALLED_APPS beside ``modelqueue``. Nothing here touches a model before it is used,
as backends are built while modules with tasks are imported.
"""

from modelqueue.task_backend.backend import ModelQueueBackend
from modelqueue.task_backend.policies import policy

__all__ = ["ModelQueueBackend", "policy"]
