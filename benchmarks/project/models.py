"""One ordinary model, declared so that modelqueue 2.2.1 can do it, too."""

from __future__ import annotations

from django.db import models

import modelqueue


class Task(models.Model):
    data = models.TextField()
    status = modelqueue.StatusField(db_index=True, default=modelqueue.Status.waiting)
