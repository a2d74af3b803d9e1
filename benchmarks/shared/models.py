"""One table of tasks."""

from __future__ import annotations

from django.db import models

import modelqueue


class Task(models.Model):
    queue = models.IntegerField(default=0)
    status = modelqueue.StatusField()
