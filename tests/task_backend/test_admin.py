"""The page of the tasks in Django's admin: what it shows, what it allows, and to whom."""

import pytest
from django.contrib.auth.models import Permission, User
from django.urls import reverse

from modelqueue import State, Status
from modelqueue.task_backend.models import QueuedTask
from modelqueue.task_backend.results import STATES
from tests.task_backend.backends import queue_of, row_of, run_all, tasks

pytestmark = pytest.mark.django_db

LIST = "admin:modelqueue_tasks_queuedtask_changelist"


def page(row):
    return reverse("admin:modelqueue_tasks_queuedtask_change", args=[row.pk])


@pytest.fixture
def rows():
    """A task in each state."""
    made = {
        "waiting": tasks.note.enqueue("a"),
        "finished": tasks.add.using(priority=7).enqueue(1, 2),
        "canceled": tasks.fail.using(priority=6).enqueue("<so>"),
        "working": tasks.add.enqueue(3),
    }
    run_all()
    QueuedTask.objects.filter(result_id=made["waiting"].id).update(status=Status.waiting(5, 1))
    QueuedTask.objects.filter(result_id=made["working"].id).update(status=Status.working())
    return {name: row_of(result) for name, result in made.items()}


def test_list_shows_the_tasks_with_their_state(admin_client, rows):
    response = admin_client.get(reverse(LIST))
    text = response.content.decode()
    assert response.status_code == 200
    for row in rows.values():
        assert row.result_id in text
        assert f">{row.pk}</a></th>" in text  # by which the command line names it
        assert f'<td class="field-result_status">{STATES[row.status.state]}</td>' in text
    assert '<td class="field-attempts">1</td>' in text
    assert "tests.task_backend.tasks.fail" in text
    assert response.context["cl"].result_count == 4


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ("READY", ["waiting"]),
        ("RUNNING", ["working"]),
        ("SUCCESSFUL", ["finished"]),
        ("FAILED", ["canceled"]),
        ("failed", []),
    ],
)
def test_list_is_filtered_by_the_status_of_the_results(status, shown, admin_client, rows):
    response = admin_client.get(reverse(LIST), {"result_status": status})
    found = {row.pk for row in response.context["cl"].result_list}
    assert found == {rows[state].pk for state in shown}


def test_list_and_filter_call_ready_what_has_no_state_as_results_do(admin_client, rows):
    for number, row in zip((7, -1, Status.created()), rows.values(), strict=False):
        QueuedTask.objects.filter(pk=row.pk).update(status=number)
    response = admin_client.get(reverse(LIST), {"result_status": "READY"})
    assert response.context["cl"].result_count == 3
    assert response.content.decode().count('<td class="field-result_status">READY</td>') == 3


@pytest.mark.parametrize("state", ["waiting", "working", "finished", "canceled"])
def test_page_of_a_task_shows_all_of_it(state, admin_client, rows):
    row = rows[state]
    response = admin_client.get(page(row))
    text = response.content.decode()
    assert response.status_code == 200
    assert row.result_id in text
    assert row.function in text
    if state == "canceled":
        assert "&lt;so&gt;" in text
        assert "<so>" not in text


def test_nothing_of_a_task_can_be_edited(admin_client, rows):
    row = rows["waiting"]
    response = admin_client.get(page(row))
    fields = response.context["adminform"].form.fields
    assert list(fields) == []
    admin_client.post(page(row), {"function": "os.abort", "status": "1"})
    assert row_of(row_as_result(row)).function == row.function
    assert QueuedTask.objects.get(pk=row.pk).status == row.status


def row_as_result(row):
    class Result:
        id = row.result_id

    return Result


def test_task_that_is_canceled_while_it_runs_and_retried_keeps_that_attempt(admin_client):
    result = tasks.add.enqueue(1)
    queue_of().claim()
    for action, status in (("cancel_tasks", "RUNNING"), ("retry_tasks", "FAILED")):
        chosen = {"action": action, "_selected_action": [row_of(result).pk]}
        response = admin_client.post(f"{reverse(LIST)}?result_status={status}", chosen)
        assert response.status_code == 302
    result.refresh()
    assert (result.status.name, result.attempts, len(result.errors)) == ("READY", 1, 1)


class ReadsElsewhere:
    def db_for_read(self, model, **hints):
        return "other" if model is QueuedTask else None


@pytest.mark.django_db(databases=["default", "other"])
def test_cancel_writes_where_tasks_are_written_though_the_list_is_read_elsewhere(admin_client, settings):
    result = tasks.add.enqueue(1)
    queue_of().claim()
    row = row_of(result, "default")
    row.save(using="other", force_insert=True)
    settings.DATABASE_ROUTERS = [ReadsElsewhere()]
    chosen = {"action": "cancel_tasks", "_selected_action": [row.pk]}
    assert admin_client.post(reverse(LIST), chosen).status_code == 302
    assert len(row_of(result, "default").failures) == 1
    assert (row_of(result, "other").failures, row_of(result, "other").status) == (None, row.status)


def test_no_task_can_be_added(admin_client):
    assert admin_client.get(reverse("admin:modelqueue_tasks_queuedtask_add")).status_code == 403


@pytest.mark.parametrize("odd", [0, 7, -1, 2**63 - 1])
def test_foreign_number_breaks_no_page(odd, admin_client, rows):
    QueuedTask.objects.filter(pk=rows["waiting"].pk).update(status=odd)
    assert admin_client.get(reverse(LIST)).status_code == 200
    assert admin_client.get(page(rows["waiting"])).status_code == 200


def test_task_whose_function_is_gone_breaks_no_page(admin_client, rows):
    QueuedTask.objects.update(function="nowhere.at.all")
    assert admin_client.get(reverse(LIST)).status_code == 200
    assert admin_client.get(page(rows["canceled"])).status_code == 200


def test_list_is_filtered_and_searched(admin_client, rows):
    for query, names in {
        "backend_name=default": {*rows},
        "queue_name=nothing": set(),
        f"q={rows['working'].result_id}": {"working"},
        "q=tasks.fail": {"canceled"},
        "status__state=working": {"working"},
    }.items():
        response = admin_client.get(f"{reverse(LIST)}?{query}")
        assert response.status_code == 200, query
        found = {row.pk for row in response.context["cl"].queryset}
        assert found == {rows[name].pk for name in names}, query


def test_list_takes_as_many_statements_for_many_tasks(admin_client, rows, django_assert_max_num_queries):
    for _ in range(30):
        tasks.add.enqueue(1)
    with django_assert_max_num_queries(10):
        admin_client.get(reverse(LIST))


# The actions


def act(client, action, rows):
    data = {"action": action, "_selected_action": [row.pk for row in rows]}
    response = client.post(reverse(LIST), data, follow=True)
    assert response.status_code == 200
    return [str(message) for message in response.context["messages"]]


def states(rows):
    stored = dict(QueuedTask.objects.values_list("pk", "status"))
    return {name: stored[row.pk].state for name, row in rows.items()}


def test_failed_tasks_are_retried(admin_client, rows):
    before = states(rows)
    assert act(admin_client, "retry_tasks", rows.values()) == ["1 waiting again."]
    assert states(rows) == before | {"canceled": State.waiting}
    assert QueuedTask.objects.get(pk=rows["canceled"].pk).status.attempts == 0


def test_tasks_are_canceled(admin_client, rows):
    assert act(admin_client, "cancel_tasks", rows.values()) == ["2 canceled."]
    assert states(rows) == {
        "waiting": State.canceled,
        "working": State.canceled,
        "canceled": State.canceled,
        "finished": State.finished,
    }


def test_task_that_is_not_selected_is_left_alone(admin_client, rows):
    act(admin_client, "cancel_tasks", [rows["waiting"]])
    assert states(rows)["working"] == State.working


# Who may


def client_of(client, *permissions):
    user = User.objects.create_user("somebody", password="secret", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client.force_login(user)
    return client


@pytest.fixture
def _permissions():
    """Their rows, which tests of others may have deleted."""
    from django.apps import apps
    from django.contrib.auth.management import create_permissions

    create_permissions(apps.get_app_config("modelqueue_tasks"), verbosity=0)


@pytest.mark.usefixtures("_permissions")
def test_who_may_see_tasks_may_not_change_them(client, rows):
    client = client_of(client, "view_queuedtask")
    before = states(rows)
    response = client.get(reverse(LIST))
    assert response.status_code == 200
    assert "retry_tasks" not in response.content.decode()
    assert "cancel_tasks" not in response.content.decode()
    act(client, "cancel_tasks", rows.values())
    act(client, "retry_tasks", rows.values())
    assert states(rows) == before
    assert client.get(page(rows["waiting"])).status_code == 200


@pytest.mark.usefixtures("_permissions")
def test_who_may_change_tasks_may_cancel_them(client, rows):
    client = client_of(client, "view_queuedtask", "change_queuedtask")
    assert act(client, "cancel_tasks", [rows["waiting"]]) == ["1 canceled."]


def test_who_may_nothing_sees_nothing(client, rows):
    client = client_of(client)
    assert client.get(reverse(LIST)).status_code == 403
    assert client.get(page(rows["waiting"])).status_code == 403
    assert (
        client.post(
            reverse(LIST), {"action": "cancel_tasks", "_selected_action": [rows["waiting"].pk]}
        ).status_code
        == 403
    )
    assert states(rows)["waiting"] == State.waiting


def test_saving_the_page_writes_nothing(admin_client, rows, monkeypatch):
    row = rows["waiting"]
    monkeypatch.setattr(QueuedTask, "save", None)
    assert admin_client.post(page(row), {}).status_code == 302
    assert row_of_pk(row.pk) == row.status


def row_of_pk(pk):
    return QueuedTask.objects.get(pk=pk).status
