"""What an action saves itself counts as long as its transaction stands, and no longer."""

import pytest
from django.db import transaction

from modelqueue import State, Status, run
from tests.actions import heard, row, stored, succeed
from tests.testapp.models import Paper


class UndoError(Exception):
    pass


def save_and_roll_back(paper, **values):
    try:
        with transaction.atomic():
            for name, value in values.items():
                setattr(paper, name, value)
            paper.save()
            raise UndoError
    except UndoError:
        pass


pytestmark = pytest.mark.parametrize(
    "outer",
    [
        pytest.param(False, marks=pytest.mark.django_db(transaction=True), id="autocommit"),
        pytest.param(True, marks=pytest.mark.django_db, id="within a transaction"),
    ],
)


def test_field_whose_save_was_rolled_back_is_written_with_the_outcome(outer):
    Paper.objects.create(title="a")
    paper = run(Paper.objects, "status", lambda paper: save_and_roll_back(paper, title="b"))
    assert (paper.title, row(paper).title) == ("b", "b")
    assert stored(paper).state == State.finished


def test_status_whose_save_was_rolled_back_is_the_outcome_all_the_same(outer):
    Paper.objects.create()
    later = Status.created(5)
    paper = run(Paper.objects, "status", lambda paper: save_and_roll_back(paper, status=later))
    assert paper.status == stored(paper) == later


def test_failure_after_a_save_that_was_rolled_back_does_not_leave_the_task_working(outer):
    paper = Paper.objects.create()

    def action(paper):
        save_and_roll_back(paper, status=Status.canceled())
        raise ValueError

    with heard("task_finished", "lease_lost") as events, pytest.raises(ValueError):  # noqa: PT011
        run(Paper.objects, "status", action)
    assert [(name, facts["status"]) for name, facts in events] == [("task_finished", stored(paper))]
    assert (stored(paper).state, stored(paper).attempts) == (State.waiting, 1)


def test_assignment_whose_save_was_rolled_back_is_written_by_the_next_save(outer):
    paper = Paper.objects.create(status=Status.created())
    paper.refresh_from_db()
    save_and_roll_back(paper, status=Status.waiting(5))
    assert stored(paper).state == State.created
    paper.save()
    assert stored(paper) == Status.waiting(5)


def test_assignment_that_was_saved_is_not_written_again(outer):
    paper = Paper.objects.create(status=Status.created())
    with transaction.atomic():
        paper.status = Status.waiting(5)
        paper.save()
    run(Paper.objects, "status", succeed)
    paper.save()
    assert stored(paper).state == State.finished
