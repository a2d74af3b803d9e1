"""Models of the test suite. Their tables are made without migrations."""

from django.db import models

import modelqueue


class Task(models.Model):
    data = models.TextField(blank=True)
    status = modelqueue.StatusField()
