"""Models of the test suite. Their tables are made without migrations."""

import uuid
from typing import Any

from django.db import models

import modelqueue


class Task(models.Model):
    data = models.TextField(blank=True)
    status = modelqueue.StatusField()


class Errand(models.Model):
    """Has the declared queues of `tests.testapp.queues`: `run` refuses its fields."""

    title = models.CharField(max_length=100, blank=True)
    log = models.JSONField(default=list)
    status = modelqueue.StatusField()
    review_status = modelqueue.StatusField(null=True, blank=True)
    error = modelqueue.ErrorField()


class Project(models.Model):
    name = models.CharField(max_length=100, blank=True)


class Milestone(Project):
    """The status is in the table of the child, the name in that of the parent."""

    status = modelqueue.StatusField()


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


class NumberedJob(Job):
    """A child with a primary key of its own, which is another number than that of its parent's row."""

    number = models.BigAutoField(primary_key=True)
    job = models.OneToOneField(Job, models.CASCADE, parent_link=True)
    remark = modelqueue.ErrorField()


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


class AbstractPaper(models.Model):
    """What an action can change; every subclass is written in another way."""

    title = models.CharField(max_length=100, blank=True)
    pages = models.IntegerField(default=0)
    facts = models.JSONField(default=dict)
    project = models.ForeignKey(Project, models.SET_NULL, null=True, blank=True)
    status = modelqueue.StatusField()
    error = modelqueue.ErrorField()

    class Meta:
        abstract = True


class Paper(AbstractPaper):
    """A plain UPDATE of its status is as good as a save()."""

    scan = models.FileField(null=True, blank=True)
    score = models.FloatField(null=True, blank=True)


class StampedPaper(AbstractPaper):
    edited = models.DateTimeField(auto_now=True)


class ShoutingPaper(AbstractPaper):
    """Its own save() computes a column, and refuses some rows."""

    shout = models.CharField(max_length=100, blank=True)

    def save(self, *args: Any, **kwargs: Any) -> None:
        if self.title == "unsavable":
            raise RuntimeError("this row can not be saved")
        self.shout = self.title.upper()
        super().save(*args, **kwargs)


class PickyField(models.CharField):  # type: ignore[type-arg]
    """A column with a value that can not be loaded, one that can not be copied, and one not compared."""

    def from_db_value(self, value: str, *args: Any) -> str:
        if value == "unreadable":
            raise ValueError("this value can not be read")
        kinds: dict[str, type[str]] = {"single": Single, "array": Array}
        return kinds.get(value, str)(value)


class Single(str):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there is but one")


class Array(str):
    """As those of NumPy."""

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        raise ValueError("the truth value of an array is ambiguous")

    def __add__(self, other: str) -> str:
        return Array(str.__add__(self, other))


class PickyPaper(models.Model):
    title = PickyField(max_length=100, blank=True)
    status = modelqueue.StatusField()
    error = modelqueue.ErrorField()


class PickyReference(models.Model):
    """Its own columns can be read; those of the paper it refers to, perhaps not."""

    paper = models.ForeignKey(PickyPaper, models.CASCADE)
    status = modelqueue.StatusField()


class ExclusiveTask(models.Model):
    """At most one per group is working, and one per group is waiting."""

    group = models.IntegerField()
    status = modelqueue.StatusField()
    error = modelqueue.ErrorField()

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["group"],
                condition=models.Q(**modelqueue.Status.filter("status", state)),
                name=f"one_{state}_per_group",
            )
            for state in ("waiting", "working")
        ]


class Attachment(models.Model):
    """A child row: its foreign key takes a lock on the paper."""

    paper = models.ForeignKey(Paper, models.CASCADE, related_name="attachments")
    name = models.CharField(max_length=100, blank=True)


class Receipt(models.Model):
    """Its paper can not be deleted."""

    paper = models.ForeignKey(Paper, models.PROTECT)


class Quotation(models.Model):
    """Its paper can be deleted only with it, by way of something else that both belong to."""

    paper = models.ForeignKey(Paper, models.RESTRICT)


class ReviewedTask(Task):
    """The text of a failure is in the table of the child, the status in that of the parent."""

    verdict = models.CharField(max_length=100, blank=True)
    error = modelqueue.ErrorField()


class UuidTask(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    status = modelqueue.StatusField()


class TextTask(models.Model):
    name = models.CharField(max_length=100, primary_key=True)
    status = modelqueue.StatusField()


class Shift(models.Model):
    """A task in which its claims are entered: by which worker, and since when."""

    worker = models.CharField(max_length=20, blank=True)
    began = models.DateTimeField(null=True)
    facts = models.JSONField(default=dict)
    badge = models.BinaryField(default=b"")
    project = models.ForeignKey(Project, models.SET_NULL, null=True)
    status = modelqueue.StatusField()
    error = modelqueue.ErrorField()


class NightShift(Shift):
    """What its claims set is in the table of the parent, as the status is."""

    lamps = models.IntegerField(default=0)


class Delivery(models.Model):
    """Each has its own terms: how often it is tried again, and the options that a hook makes of a column."""

    title = models.CharField(max_length=100, blank=True)
    retries = models.SmallIntegerField(null=True, blank=True, default=1)
    options = models.JSONField(default=dict)
    log = models.JSONField(default=list)
    status = modelqueue.StatusField()
    error = modelqueue.ErrorField()


class ExpressDelivery(Delivery):
    """What it may cost stands in another table than the status."""

    price = models.IntegerField(default=0)


if hasattr(models, "CompositePrimaryKey"):  # Django 5.2

    class CompositeTask(models.Model):
        pk = models.CompositePrimaryKey("tenant", "number")
        tenant = models.IntegerField()
        number = models.IntegerField()
        title = models.CharField(max_length=100, blank=True)
        status = modelqueue.StatusField()


class Archive(models.Model):
    """Has each kind of index. Not managed, so that a test need not fill it anew: its history stays."""

    whole = modelqueue.StatusField()
    whole_nullable = modelqueue.StatusField(null=True)
    live = modelqueue.StatusField(db_index=False)
    live_nullable = modelqueue.StatusField(db_index=False, null=True)

    class Meta:
        managed = False
        indexes = [
            modelqueue.QueueIndex("live", name="archive_live"),
            modelqueue.QueueIndex("live_nullable", name="archive_live_nullable"),
        ]


class Ledger(models.Model):
    """Each run of an action adds a row: who ran which task."""

    task = models.BigIntegerField()
    worker = models.CharField(max_length=100, blank=True)
