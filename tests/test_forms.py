"""Forms show all 19 digits, and a page from before the outcome changes nothing when it is posted."""

import pytest
from django import forms
from django.test import override_settings

from modelqueue import Status, StatusField
from modelqueue.forms import StatusFormField
from tests.html import form_data
from tests.testapp.models import Job, PrintJob, Project

pytestmark = pytest.mark.django_db

WAITING = 2202703261443257591
FINISHED = 4202703261443999992
CANCELED = 5999999999999999999


class JobForm(forms.ModelForm):
    class Meta:
        model = Job
        fields = ["title", "status", "review_status"]


@pytest.fixture
def job():
    return Job.objects.create(title="a", status=WAITING)


def rendered(job, form_class=JobForm, **options):
    """What the browser holds after it has been shown the form of a job."""
    return form_data(form_class(instance=Job.objects.get(pk=job.pk), **options).as_div())


def post(job, data, form_class=JobForm, **options):
    """Post to the form of the job as it is now; return the saved form."""
    form = form_class(data, instance=Job.objects.get(pk=job.pk), **options)
    assert form.is_valid(), form.errors
    form.save()
    return form


def stored():
    return Job.objects.values_list("status", "review_status").get()


def test_form_shows_all_digits(job):
    assert rendered(job) == {
        "title": "a",
        "status": "2202703261443257591",
        "initial-status": "2202703261443257591",
        "review_status": "",
        "initial-review_status": "",
    }


@pytest.mark.parametrize("number", [Status.minimum("created"), CANCELED, 0, -1, 2**63 - 1, -(2**63)])
def test_digits_survive_the_way_through_a_form(job, number):
    data = rendered(job) | {"status": str(number), "review_status": str(number)}
    post(job, data)
    assert stored() == (number, number)
    assert rendered(job)["status"] == str(number)


# Posted after the outcome


def test_untouched_form_changes_nothing_after_the_outcome(job):
    data = rendered(job)
    Job.objects.update(status=FINISHED, review_status=FINISHED)
    form = post(job, data | {"title": "b"})
    assert stored() == (FINISHED, FINISHED)
    assert Job.objects.get().title == "b"
    assert form.changed_data == ["title"]
    assert form.cleaned_data["status"] == FINISHED


def test_untouched_form_leaves_null_that_was_written_meanwhile(job):
    Job.objects.update(review_status=WAITING)
    data = rendered(job)
    Job.objects.update(review_status=None)
    post(job, data)
    assert stored() == (WAITING, None)


def test_untouched_form_leaves_an_outcome_between_its_load_and_its_save(job):
    data = rendered(job)
    form = JobForm(data, instance=Job.objects.get())
    assert form.is_valid()
    Job.objects.update(status=FINISHED, review_status=FINISHED)
    form.save()
    assert stored() == (FINISHED, FINISHED)


def test_edited_status_is_written_after_the_outcome(job):
    data = rendered(job)
    Job.objects.update(status=FINISHED, review_status=FINISHED)
    form = post(job, data | {"status": str(CANCELED), "review_status": str(WAITING)})
    assert stored() == (CANCELED, WAITING)
    assert form.changed_data == ["status", "review_status"]
    assert type(form.instance.status) is Status


def test_edited_status_is_written_even_where_the_row_holds_it_already(job):
    data = rendered(job)
    Job.objects.update(status=CANCELED)
    post(job, data | {"status": str(CANCELED)})
    assert stored() == (CANCELED, None)


def test_cleared_status_takes_the_row_out_of_the_queue(job):
    Job.objects.update(review_status=WAITING)
    data = rendered(job)
    Job.objects.update(review_status=FINISHED)
    post(job, data | {"review_status": ""})
    assert stored() == (WAITING, None)


def test_form_that_is_shown_again_with_errors_still_knows_what_it_was_rendered_with(job):
    data = rendered(job)
    Job.objects.update(status=FINISHED)
    refused = JobForm(data | {"review_status": "soon"}, instance=Job.objects.get())
    assert list(refused.errors) == ["review_status"]
    again = form_data(refused.as_div())
    assert again["initial-status"] == again["status"] == str(WAITING)
    post(job, again | {"review_status": str(CANCELED)})
    assert stored() == (FINISHED, CANCELED)


def test_prefixed_forms_of_one_page_are_told_apart(job):
    other = Job.objects.create(status=WAITING)
    data = rendered(job, prefix="one") | rendered(other, prefix="two")
    Job.objects.update(status=FINISHED)
    post(job, data, prefix="one")
    post(other, data | {"two-status": str(CANCELED)}, prefix="two")
    assert list(Job.objects.order_by("pk").values_list("status", flat=True)) == [FINISHED, CANCELED]


def test_formset_changes_what_was_edited(job):
    project = Project.objects.create()
    Job.objects.update(project=project)
    Job.objects.create(project=project, status=WAITING)
    formset = forms.inlineformset_factory(Project, Job, fields=["title", "status", "review_status"], extra=0)
    data = form_data(formset(instance=project).as_div())
    Job.objects.update(status=FINISHED, review_status=FINISHED)
    bound = formset(data | {"job_set-1-status": str(CANCELED)}, instance=project)
    assert bound.is_valid(), bound.errors
    bound.save()
    rows = Job.objects.order_by("pk").values_list("status", "review_status")
    assert list(rows) == [(FINISHED, FINISHED), (CANCELED, FINISHED)]


# Kinds of forms


def test_form_of_a_new_row_writes_the_default_that_it_showed():
    data = form_data(JobForm().as_div())
    form = JobForm(data | {"title": "new"})
    assert form.is_valid(), form.errors
    form.save()
    assert stored() == (int(data["status"]), None)
    assert Job.objects.get().status.state.name == "waiting"


@pytest.mark.parametrize("initial", [WAITING, Status(WAITING), lambda: Status(WAITING)])
def test_initial_may_be_a_status_or_its_number(initial):
    data = form_data(JobForm(initial={"status": initial}).as_div())
    assert data["status"] == data["initial-status"] == str(WAITING)
    form = JobForm(data)
    assert form.is_valid(), form.errors
    assert form.save().status == WAITING
    assert stored() == (WAITING, None)


def test_disabled_field_changes_nothing(job):
    class DisabledForm(JobForm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.fields["status"].disabled = True

    data = rendered(job, DisabledForm)
    assert "status" not in data
    forged = {"status": str(CANCELED), "initial-status": str(FINISHED)}
    form = DisabledForm(data | forged | {"title": "b"}, instance=Job.objects.get())
    assert form.is_valid(), form.errors
    Job.objects.update(status=FINISHED)
    form.save()
    assert stored() == (FINISHED, None)
    assert form.changed_data == ["title"]
    for initial in (WAITING, Status(WAITING)):
        new = DisabledForm({"title": "new"}, initial={"status": initial})
        assert new.is_valid(), new.errors
        assert new.save().status == WAITING


def test_input_that_the_page_lacks_changes_nothing(job):
    Job.objects.update(review_status=FINISHED)
    post(job, {"title": "b", "status": str(WAITING)})
    assert stored() == (WAITING, FINISHED)


def test_template_without_the_hidden_input_writes_what_differs_from_the_row(job):
    data = {name: value for name, value in rendered(job).items() if not name.startswith("initial-")}
    form = JobForm(data, instance=Job.objects.get())
    assert form.is_valid()
    Job.objects.update(status=FINISHED, review_status=FINISHED)
    form.save()
    assert stored() == (FINISHED, FINISHED)
    post(job, data | {"status": str(CANCELED), "review_status": str(WAITING)})
    assert stored() == (CANCELED, WAITING)


@pytest.mark.parametrize("has_hidden_input", [True, False])
def test_localized_form_loses_no_digit(job, has_hidden_input):
    class LocalizedForm(JobForm):
        class Meta(JobForm.Meta):
            localized_fields = "__all__"

    with override_settings(USE_THOUSAND_SEPARATOR=True, LANGUAGE_CODE="en"):
        data = rendered(job, LocalizedForm)
        assert data["status"] == data["initial-status"] == "2,202,703,261,443,257,591"
        if not has_hidden_input:
            del data["initial-status"], data["initial-review_status"]
        form = LocalizedForm(data, instance=Job.objects.get())
        assert form.is_valid(), form.errors
        Job.objects.update(status=FINISHED)
        form.save()
        assert stored() == (FINISHED, None)
        post(job, data | {"status": "5,999,999,999,999,999,999"}, LocalizedForm)
        assert stored() == (CANCELED, None)


@override_settings(USE_THOUSAND_SEPARATOR=True, LANGUAGE_CODE="en")
def test_thousand_separators_do_not_touch_an_ordinary_form(job):
    data = rendered(job)
    assert data["status"] == data["initial-status"] == "2202703261443257591"
    Job.objects.update(status=FINISHED)
    post(job, data)
    assert stored() == (FINISHED, None)


def test_form_without_the_field_changes_nothing(job):
    class TitleForm(JobForm):
        class Meta(JobForm.Meta):
            fields = ["title"]

    form = TitleForm({"title": "b"}, instance=Job.objects.get())
    Job.objects.update(status=FINISHED)
    form.save()
    assert Job.objects.values_list("title", "status").get() == ("b", FINISHED)


def test_form_of_an_inherited_model_changes_nothing_when_untouched():
    class PrintForm(JobForm):
        class Meta(JobForm.Meta):
            model = PrintJob

    job = PrintJob.objects.create(status=WAITING)
    data = form_data(PrintForm(instance=job).as_div())
    PrintJob.objects.update(status=FINISHED)
    PrintForm(data, instance=PrintJob.objects.get()).save()
    assert stored() == (FINISHED, None)


def test_form_field_stands_alone():
    class PlainForm(forms.Form):
        status = StatusFormField(required=False, show_hidden_initial=False)

    form = PlainForm({"status": "2202703261443257591"})
    assert form.is_valid()
    assert type(form.cleaned_data["status"]) is Status
    assert PlainForm({"status": ""}).fields["status"].clean("") is None
    assert form_data(PlainForm(initial={"status": Status(WAITING)}).as_div())["initial-status"] == str(
        WAITING
    )


def test_field_with_choices_makes_an_ordinary_choice_field():
    field = StatusField(choices=[(WAITING, "soon")]).formfield()
    assert isinstance(field, forms.TypedChoiceField)
    assert field.clean(str(WAITING)) == WAITING


@pytest.mark.parametrize("wrong", ["soon", "2202703261443257591.5", "9223372036854775808", ""])
def test_what_is_no_status_is_an_error_of_the_form(job, wrong):
    form = JobForm(rendered(job) | {"status": wrong}, instance=job)
    assert list(form.errors) == ["status"]
