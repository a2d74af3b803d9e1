"""A document: a Python file, what is known of it, and its place in the queue."""

from __future__ import annotations

from django.db import models

import modelqueue


class Document(models.Model):
    """The row is the task. The constraint on `path` keeps a file from being enqueued twice."""

    path = models.CharField(max_length=700, unique=True)
    status = modelqueue.StatusField()
    error = modelqueue.ErrorField()

    lines = models.PositiveIntegerField(null=True, editable=False)
    functions = models.PositiveIntegerField(null=True, editable=False)
    classes = models.PositiveIntegerField(null=True, editable=False)
    imports = models.JSONField(default=list, editable=False)
    digest = models.CharField(max_length=64, editable=False)

    def __str__(self) -> str:
        return self.path
