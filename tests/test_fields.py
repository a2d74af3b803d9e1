"""StatusField and ErrorField as columns: what they take, what they give back, and serializers."""

import django
import pytest
from django.core import serializers
from django.core.exceptions import ValidationError
from django.db import models
from django.utils.module_loading import import_string

from modelqueue import ErrorField, State, Status, StatusField
from tests.testapp.models import Job, PrintJob

EXTREMES = [
    Status.minimum("created"),
    Status.maximum("canceled"),
    2202703261443257591,
    0,
    -1,
    2**63 - 1,
    -(2**63),
]


def serializer_formats():
    formats = ["python", "json", "jsonl", "xml"]
    try:
        import_string("yaml.safe_load")
    except ImportError:
        return formats
    return [*formats, "yaml"]


# Options


def test_field_alone_is_indexed_and_waiting_from_now():
    field = StatusField()
    assert field.db_index
    assert not field.null
    assert field.default == Status.waiting
    assert field.get_default().state.name == "waiting"


def test_nullable_field_alone_is_indexed_and_none():
    field = StatusField(null=True)
    assert field.db_index
    assert not field.has_default()
    assert field.get_default() is None


@pytest.mark.skipif(django.VERSION < (5, 0), reason="Django 5.0 has db_default")
def test_default_of_the_database_leaves_no_other():
    assert not StatusField(db_default=5).has_default()


def test_options_stand_as_given():
    field = StatusField("state of the job", db_index=False, default=Status.created, editable=False)
    assert (field.verbose_name, field.db_index, field.editable) == ("state of the job", False, False)
    assert field.get_default().state.name == "created"
    assert StatusField(null=True, default=Status.waiting).get_default().state.name == "waiting"
    assert StatusField(default=None).get_default() is None


@pytest.mark.parametrize("field", [StatusField, ErrorField])
def test_names_may_be_given_by_position(field):
    made = field("state of the job", "state")
    assert (made.verbose_name, made.name) == ("state of the job", "state")


def test_error_field_is_a_text_that_forms_leave_out():
    field = ErrorField()
    assert isinstance(field, models.TextField)
    assert (field.blank, field.null, field.editable, field.default) == (True, False, False, "")
    assert Job(status=0).error == ""
    own = ErrorField("failure", blank=False, null=True, editable=True, default=None)
    assert (own.verbose_name, own.blank, own.null, own.editable, own.default) == (
        "failure",
        False,
        True,
        True,
        None,
    )


def test_error_field_refuses_null_as_any_text_does():
    with pytest.raises(ValidationError, match="cannot be null"):
        ErrorField(editable=True).clean(None, None)


# Values


@pytest.mark.django_db
@pytest.mark.parametrize("number", EXTREMES)
@pytest.mark.parametrize("kind", [int, Status])
def test_every_64_bit_integer_is_stored_and_read_as_status(number, kind):
    job = Job.objects.create(status=kind(number), review_status=kind(number))
    found = Job.objects.get(status=kind(number))
    assert (found.status, found.review_status) == (number, number)
    assert type(found.status) is type(found.review_status) is type(job.status) is Status
    assert Job.objects.values_list("status", flat=True).get() == number
    assert Job.objects.aggregate(last=models.Max("status")) == {"last": number}


@pytest.mark.django_db
def test_null_is_read_as_none():
    Job.objects.create()
    assert Job.objects.get(review_status=None).review_status is None


@pytest.mark.django_db
@pytest.mark.parametrize("model", [Job, PrintJob])
def test_new_row_is_due_at_once(model):
    model.objects.create()
    job = model.objects.get()
    assert (job.status.state.name, job.status.attempts, job.error) == ("waiting", 0, "")
    assert job.status <= Status.waiting()


@pytest.mark.parametrize("value", [2202703261443257591, "2202703261443257591", Status(2202703261443257591)])
def test_clean_gives_a_status(value):
    cleaned = Job._meta.get_field("status").clean(value, None)
    assert (type(cleaned), cleaned) == (Status, 2202703261443257591)


@pytest.mark.parametrize("value", ["waiting", "2026-03-27", object()])
def test_clean_refuses_what_is_no_number(value):
    with pytest.raises(ValidationError, match="value must be an integer"):
        Job._meta.get_field("status").clean(value, None)


def test_nullable_field_cleans_none_to_none():
    job = Job(title="x", review_status=None)
    job.full_clean()
    assert job.review_status is None


def test_value_that_is_no_number_stays_for_the_validation():
    job = Job(status="waiting")
    assert job.status == "waiting"
    with pytest.raises(ValidationError, match="value must be an integer"):
        job.full_clean()


@pytest.mark.django_db
@pytest.mark.parametrize("wrong", [State.waiting, True, False])
def test_state_or_bool_is_no_status(wrong):
    """Both are integers, and as a status they would be foreign numbers, which no worker ever sees."""
    job = Job.objects.create()
    for use in (
        lambda: Job(status=wrong),
        lambda: setattr(job, "status", wrong),
        lambda: Job.objects.filter(status=wrong),
        lambda: Job._meta.get_field("status").get_prep_value(wrong),
    ):
        with pytest.raises(TypeError, match=r"testapp\.Job\.status takes a Status, not"):
            use()
    assert Job.objects.get().status.state == State.waiting


# Serializers


@pytest.mark.django_db
@pytest.mark.parametrize("name", serializer_formats())
def test_serializers_round_trip_every_digit(name):
    Job.objects.bulk_create([Job(status=number, review_status=number) for number in EXTREMES])
    Job.objects.create(status=Status.waiting(5))
    before = list(Job.objects.order_by("pk").values_list("pk", "status", "review_status"))
    text = serializers.serialize(name, Job.objects.all())
    assert "waiting" not in str(text)
    Job.objects.all().delete()
    for deserialized in serializers.deserialize(name, text):
        deserialized.save()
    assert list(Job.objects.order_by("pk").values_list("pk", "status", "review_status")) == before


@pytest.mark.django_db
def test_fixture_overwrites_the_status_of_its_row():
    job = Job.objects.create(status=Status.waiting(5))
    text = serializers.serialize("json", [job])
    Job.objects.update(status=Status.finished(5))
    for deserialized in serializers.deserialize("json", text):
        deserialized.save()
    assert Job.objects.get().status == Status.waiting(5)
