"""The admin parts, as a browser uses them: seven actions, the filter by state, and the forms."""

import datetime as dt

import pytest
from django.apps import apps
from django.contrib import admin
from django.contrib.auth.management import create_permissions
from django.contrib.auth.models import Permission, User
from django.test import override_settings
from django.urls import reverse

import modelqueue
from modelqueue import Status, clock
from tests.html import form_data
from tests.testapp.models import Job, PlainJob, PrintJob, Project, ProxyJob, Task

pytestmark = pytest.mark.django_db

STATES = ["created", "waiting", "working", "finished", "canceled"]
NOW = dt.datetime(2027, 3, 26, 14, 43, 25, 759999, dt.timezone.utc)

# The digits that floating point, rounding division or 32 bits would lose.
STATUSES = sorted(
    state * 10**18 + rest
    for state in range(1, 6)
    for rest in (0, 1, 9, 10, 202703261443257591, *(10**18 - less for less in (11, 10, 9, 2, 1)))
)
FOREIGN = [0, 1, -1, 10**18 - 1, 6 * 10**18, -(3 * 10**18), 2**63 - 1, -(2**63)]


def url(model, page, *arguments):
    return reverse(f"admin:testapp_{model._meta.model_name}_{page}", args=arguments)


def texts(response):
    return [str(message) for message in response.context["messages"]]


@pytest.fixture
def act(admin_client):
    """Select rows of a model in the admin, run an action on them, and return what the page then says."""

    def act(name, model=Job, rows=None):
        keys = (model.objects if rows is None else rows).values_list("pk", flat=True)
        data = {"action": name, "_selected_action": list(keys)}
        with clock.use(lambda: NOW):
            response = admin_client.post(url(model, "changelist"), data, follow=True)
        assert response.status_code == 200
        return texts(response)

    return act


# Actions


def test_actions_are_seven_of_these_names_and_descriptions():
    actions = modelqueue.admin_actions("review_status")
    assert {action.__name__: action.short_description for action in actions} == {
        "make_review_status_state_created": "Change review status state to created",
        "make_review_status_state_waiting": "Change review status state to waiting",
        "make_review_status_state_working": "Change review status state to working",
        "make_review_status_state_finished": "Change review status state to finished",
        "make_review_status_state_canceled": "Change review status state to canceled",
        "make_review_status_priority_now": "Change review status priority to now",
        "make_review_status_attempts_zero": "Change review status attempts to zero",
    }
    assert len(actions) == 7


EXPECTED = {
    **{
        f"make_status_state_{name}": lambda number, digit=digit: digit * 10**18 + number % 10**18
        for digit, name in enumerate(STATES, 1)
    },
    "make_status_priority_now": lambda number: number // 10**18 * 10**18 + 202703261443257590 + number % 10,
    "make_status_attempts_zero": lambda number: number // 10 * 10,
}


@pytest.mark.parametrize("model", [Job, PlainJob])
@pytest.mark.parametrize("name", EXPECTED)
def test_action_changes_its_digits_and_keeps_all_others(act, name, model):
    model.objects.bulk_create([model(title=str(number), status=number) for number in STATUSES])
    description = name.removeprefix("make_").replace("_", " ")
    for word in ("state", "priority", "attempts"):
        description = description.replace(f"{word} ", f"{word} to ")
    assert act(name, model) == [f"Change {description}: {len(STATUSES)} changed."]
    found = {int(title): int(status) for title, status in model.objects.values_list("title", "status")}
    assert found == {number: EXPECTED[name](number) for number in STATUSES}


@pytest.mark.parametrize("name", EXPECTED)
def test_action_leaves_foreign_numbers_and_null_alone_and_counts_them(act, name):
    numbers = [*FOREIGN, None]
    Job.objects.bulk_create([Job(title=str(number), review_status=number) for number in numbers])
    Job.objects.create(title="one", review_status=Status.waiting(5))
    [text] = act(name.replace("_status_", "_review_status_"))
    assert text.endswith(f": 1 changed. {len(numbers)} left alone, as they hold no status.")
    found = Job.objects.exclude(title="one").values_list("title", "review_status")
    assert dict(found) == {str(number): number for number in numbers}


def test_action_changes_its_own_field_of_the_selected_rows(act):
    jobs = [Job.objects.create(status=Status.waiting(5), review_status=Status.waiting(5)) for _ in range(3)]
    assert act("make_review_status_state_canceled", rows=Job.objects.filter(pk=jobs[1].pk)) == [
        "Change review status state to canceled: 1 changed."
    ]
    canceled = Status.canceled(5)
    assert list(Job.objects.order_by("pk").values_list("review_status", flat=True)) == [
        *(Status.waiting(5), canceled, Status.waiting(5))
    ]
    assert not Job.objects.filter(status=canceled).exists()


def test_action_on_inherited_rows_out_of_joins_changes_each_once(act):
    project = Project.objects.create()
    for number in (Status.working(5), Status.waiting(7, 3), None, 0):
        PrintJob.objects.create(project=project, review_status=number)
    lonely = PrintJob.objects.create(review_status=Status.waiting(9))  # not among the rows of this admin
    assert act("make_review_status_state_finished", PrintJob) == [
        "Change review status state to finished: 2 changed. 2 left alone, as they hold no status."
    ]
    found = PrintJob.objects.order_by("pk").values_list("review_status", flat=True)
    assert list(found) == [Status.finished(5), Status.finished(7, 3), None, 0, Status.waiting(9)]
    assert lonely.review_status == Status.waiting(9)


def test_action_on_more_rows_than_go_into_one_statement(act, monkeypatch):
    monkeypatch.setattr("modelqueue.source._CHUNK", 2)
    project = Project.objects.create()
    for number in (*[Status.waiting(5)] * 4, 0, 0, 0):
        PrintJob.objects.create(project=project, status=number)
    assert act("make_status_state_created", PrintJob) == [
        "Change status state to created: 4 changed. 3 left alone, as they hold no status."
    ]
    assert set(Job.objects.values_list("status", flat=True)) == {Status.created(5), 0}


class WriteRouter:
    def db_for_write(self, model, **hints):
        return "other"


@pytest.mark.django_db(databases=["default", "other"])
def test_action_counts_on_the_database_that_it_writes_to():
    class Messages:
        def message_user(self, request, text, level):
            self.text = text

    Task.objects.using("other").bulk_create([Task(status=Status.waiting(5)), Task(status=0)])
    page = Messages()
    with override_settings(DATABASE_ROUTERS=[WriteRouter()]):
        modelqueue.admin_actions("status")[4](page, None, Task.objects.all())
    assert page.text.endswith("canceled: 1 changed. 1 left alone, as they hold no status.")
    assert Task.objects.using("other").filter(status=Status.canceled(5)).count() == 1


def test_action_takes_a_working_task_from_its_worker(act):
    def cancel_by_hand(task):
        act("make_status_state_canceled")

    Job.objects.create(status=Status.waiting(5))
    job = modelqueue.run(Job.objects, "status", cancel_by_hand)
    assert job.status.state.name == "canceled"
    assert Job.objects.get().status == job.status


@pytest.mark.parametrize("part", [modelqueue.admin_actions, modelqueue.admin_list_filter])
def test_field_that_is_no_name_is_refused(part):
    with pytest.raises(TypeError, match="takes the name of a status field, such as 'status', not <"):
        part(Job.status)


@pytest.fixture
def viewer(client):
    """The client of a user who may look and not change."""
    user = User.objects.create_user("viewer", is_staff=True)
    create_permissions(apps.get_app_config("testapp"))  # a flush leaves none, see conftest
    user.user_permissions.set(Permission.objects.filter(codename__in=["view_job", "delete_job"]))
    client.force_login(user)
    return client


def test_actions_ask_for_the_change_permission(viewer):
    job = Job.objects.create(status=Status.waiting(5))
    page = viewer.get(url(Job, "changelist"))
    offered = page.context["action_form"].fields["action"].choices
    assert [name for name, _ in offered] == ["", "delete_selected"]
    data = {"action": "make_status_state_finished", "_selected_action": [job.pk]}
    assert "make_status_state_finished" not in page.content.decode()
    assert viewer.post(url(Job, "changelist"), data, follow=True).status_code == 200
    assert Job.objects.get().status == Status.waiting(5)


# The filter


@pytest.mark.parametrize(
    ("field", "title"),
    [
        ("status", "queue status"),
        ("review_status", "review queue status"),
        ("first_review_status", "first review queue status"),
        ("state", "state queue status"),
        ("status_of_review", "status of review queue status"),
        ("laststatus", "last queue status"),
    ],
)
def test_filter_is_named_after_its_field(field, title):
    queue_filter = modelqueue.admin_list_filter(field)
    assert (queue_filter.title, queue_filter.parameter_name) == (title, f"{field}_queue")


@pytest.fixture
def rows():
    """Of each state one row more than its number, the same by both fields; and others."""
    for digit, name in enumerate(STATES, 1):
        numbers = [Status.combine(name, priority, 0) for priority in range(digit)] + [Status.maximum(name)]
        Job.objects.bulk_create([Job(title=name, status=number, review_status=number) for number in numbers])
    Job.objects.bulk_create([Job(title="foreign", status=number, review_status=number) for number in FOREIGN])
    Job.objects.create(title="none", status=0, review_status=None)
    return Job.objects.count()


def listed(response):
    return [job.title for job in response.context["cl"].queryset]


def test_changelist_shows_rows_of_all_kinds(admin_client, rows):
    response = admin_client.get(url(Job, "changelist"))
    assert response.status_code == 200
    assert len(listed(response)) == rows
    page = response.content.decode()
    assert "unknown; 0 priority; 0 attempts" in page
    assert "canceled; 99999999999999999 priority; 9 attempts" in page


def test_filter_offers_all_and_the_five_states(admin_client, rows):
    response = admin_client.get(url(Job, "changelist"))
    first, second = response.context["cl"].filter_specs
    for spec, field in ((first, "status"), (second, "review_status")):
        choices = list(spec.choices(response.context["cl"]))
        assert [choice["display"] for choice in choices] == [
            *("All", "Created", "Waiting", "Working", "Finished", "Canceled")
        ]
        links = [f"?{field}_queue={name}" for name in STATES]
        assert [choice["query_string"] for choice in choices[1:]] == links


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("field", ["status", "review_status"])
def test_filter_keeps_the_rows_of_a_state(admin_client, rows, field, name):
    response = admin_client.get(url(Job, "changelist"), {f"{field}_queue": name})
    assert listed(response) == [name] * (STATES.index(name) + 2)
    spec = response.context["cl"].filter_specs[field == "review_status"]
    selected = [choice["display"] for choice in spec.choices(response.context["cl"]) if choice["selected"]]
    assert selected == [name.capitalize()]


def test_filters_of_two_fields_work_together(admin_client, rows):
    Job.objects.create(title="both", status=Status.waiting(5), review_status=Status.working(5))
    filters = {"status_queue": "waiting", "review_status_queue": "working"}
    assert listed(admin_client.get(url(Job, "changelist"), filters)) == ["both"]


@pytest.mark.parametrize("value", ["nonsense", "unknown", "2", "", "waiting'"])
def test_unknown_state_in_the_address_is_an_ordinary_page(admin_client, rows, value):
    response = admin_client.get(url(Job, "changelist"), {"status_queue": value})
    assert response.status_code == 200
    assert listed(response) == []


@pytest.mark.skipif(not hasattr(admin, "ShowFacets"), reason="Django 5.0 has facets")
def test_filter_counts_its_facets(admin_client, rows):
    response = admin_client.get(url(Job, "changelist"), {"_facets": "True"})
    choices = response.context["cl"].filter_specs[0].choices(response.context["cl"])
    assert [choice["display"] for choice in choices][1:] == [
        *("Created (2)", "Waiting (3)", "Working (4)", "Finished (5)", "Canceled (6)")
    ]


def test_filter_works_on_a_plain_integer_field(admin_client):
    numbers = [*STATUSES, *FOREIGN]
    PlainJob.objects.bulk_create([PlainJob(title=str(number), status=number) for number in numbers])
    response = admin_client.get(url(PlainJob, "changelist"), {"status_queue": "canceled"})
    assert sorted(map(int, listed(response))) == [number for number in STATUSES if number >= 5 * 10**18]


# Forms


@pytest.mark.parametrize("model", [Job, ProxyJob])
def test_add_form_takes_the_initial_data_as_number_or_status(admin_client, model):
    data = form_data(admin_client.get(url(model, "add")).content.decode())
    assert data["status"] == data["initial-status"] == str(int(Status.waiting(5)))
    assert admin_client.post(url(model, "add"), data).status_code == 302
    assert model.objects.get().status == Status.waiting(5)


def test_change_form_that_was_open_during_the_outcome_changes_nothing(admin_client):
    job = Job.objects.create(title="a", status=Status.waiting(5))
    change = url(Job, "change", job.pk)
    data = form_data(admin_client.get(change).content.decode())
    Job.objects.update(status=Status.finished(7), review_status=Status.waiting(7))
    assert admin_client.post(change, data | {"title": "b"}).status_code == 302
    found = Job.objects.get()
    assert (found.title, found.status, found.review_status) == ("b", Status.finished(7), Status.waiting(7))


def test_change_form_writes_an_edited_status(admin_client):
    job = Job.objects.create(status=Status.waiting(5))
    change = url(Job, "change", job.pk)
    data = form_data(admin_client.get(change).content.decode())
    Job.objects.update(status=Status.finished(7))
    assert admin_client.post(change, data | {"status": "5999999999999999999"}).status_code == 302
    assert Job.objects.get().status == 5999999999999999999


@pytest.mark.parametrize("number", FOREIGN)
def test_change_form_shows_foreign_numbers(admin_client, number):
    job = Job.objects.create(status=number, review_status=None, error="Traceback: it failed")
    page = admin_client.get(url(Job, "change", job.pk)).content.decode()
    assert form_data(page)["status"] == str(number)
    assert "Traceback: it failed" in page


def test_editable_list_that_was_open_during_the_outcome_changes_nothing(admin_client):
    for title in ("a", "b"):
        Job.objects.create(title=title, status=Status.waiting(5))
    data = form_data(admin_client.get(url(ProxyJob, "changelist")).content.decode())
    Job.objects.update(status=Status.finished(7), review_status=Status.waiting(7))
    edited = data | {"form-0-title": "c", "form-1-status": "5999999999999999999", "_save": "Save"}
    response = admin_client.post(url(ProxyJob, "changelist"), edited, follow=True)
    assert texts(response) == ["2 proxy jobs were changed successfully."]
    assert list(Job.objects.order_by("pk").values_list("title", "status", "review_status")) == [
        ("c", Status.finished(7), Status.waiting(7)),
        ("b", 5999999999999999999, Status.waiting(7)),
    ]


def test_inlines_that_were_open_during_the_outcome_change_nothing(admin_client):
    project = Project.objects.create(name="p")
    for title in ("a", "b"):
        Job.objects.create(project=project, title=title, status=Status.waiting(5))
    change = url(Project, "change", project.pk)
    data = form_data(admin_client.get(change).content.decode())
    Job.objects.update(status=Status.finished(7), review_status=Status.waiting(7))
    edited = data | {"job_set-0-title": "c", "job_set-1-status": "5999999999999999999"}
    assert admin_client.post(change, edited).status_code == 302
    assert list(Job.objects.order_by("pk").values_list("title", "status", "review_status")) == [
        ("c", Status.finished(7), Status.waiting(7)),
        ("b", 5999999999999999999, Status.waiting(7)),
    ]


def test_inline_adds_a_row_with_the_default_it_showed(admin_client):
    project = Project.objects.create(name="p")
    change = url(Project, "change", project.pk)
    data = form_data(admin_client.get(change).content.decode())
    assert admin_client.post(change, data | {"job_set-0-title": "new"}).status_code == 302
    assert Job.objects.get().status == int(data["job_set-0-status"])


@override_settings(USE_THOUSAND_SEPARATOR=True, LANGUAGE_CODE="en")
def test_thousand_separators_of_the_site_change_no_digit(admin_client):
    job = Job.objects.create(status=2202703261443257591)
    change = url(Job, "change", job.pk)
    data = form_data(admin_client.get(change).content.decode())
    assert data["status"] == "2202703261443257591"
    assert admin_client.post(change, data).status_code == 302
    assert Job.objects.get().status == 2202703261443257591
