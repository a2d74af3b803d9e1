"""Models of the test suite. Their tables are made without migrations."""

from django.db import models

import modelqueue


class Task(models.Model):
    data = models.TextField(blank=True)
    status = modelqueue.StatusField()


class Project(models.Model):
    name = models.CharField(max_length=100, blank=True)


class Job(models.Model):
    """Two queues, the second optional, on a model that others inherit from and a page can be made of."""

    project = models.ForeignKey(Project, models.CASCADE, null=True, blank=True)
    title = models.CharField(max_length=100, blank=True)
    status = modelqueue.StatusField()
    review_status = modelqueue.StatusField(null=True, blank=True)
    error = modelqueue.ErrorField()


class PrintJob(Job):
    """The status column is in the table of the parent."""

    pages = models.IntegerField(default=1)


class ProxyJob(Job):
    class Meta:
        proxy = True


class AbstractJob(models.Model):
    title = models.CharField(max_length=100, blank=True)
    status = modelqueue.StatusField(null=True, blank=True)

    class Meta:
        abstract = True


class ConcreteJob(AbstractJob):
    pass


class PlainJob(models.Model):
    """As a project that uses modelqueue 2 without its field."""

    title = models.CharField(max_length=100, blank=True)
    status = models.BigIntegerField(null=True, blank=True, db_index=True)
