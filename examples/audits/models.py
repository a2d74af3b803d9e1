"""What the page knows of an audit: how far it is, and under which id its result is found."""

from __future__ import annotations

from django.db import models


class Audit(models.Model):
    """The result itself is with the backend of the task."""

    result_id = models.CharField(max_length=64)
    total = models.PositiveIntegerField(default=0)
    done = models.PositiveIntegerField(default=0)
