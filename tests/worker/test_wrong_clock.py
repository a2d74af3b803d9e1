"""A worker whose machine has a wrong clock goes by that of the database, and takes nobody's task."""

import pytest

from modelqueue import State, Status
from tests.actions import stored
from tests.faults.clocks import off_by
from tests.processes import wait_until
from tests.testapp.models import Errand, Ledger
from tests.testapp.queues import LEASE

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.vendor("postgresql", "mysql")  # SQLite has the clock of the machine
def test_worker_with_a_wrong_clock_neither_takes_a_live_task_nor_loses_one(workers):
    tasks = [Errand.objects.create(title="stay", status=Status.waiting(n)) for n in range(3)]
    right = workers.start("--threads", 1)
    ahead, behind = [workers.start("--threads", 1, variables=off_by(seconds)) for seconds in (300, -300)]
    wait_until(lambda: Ledger.objects.count() == 3)  # each has one, as none has another thread
    begun = [stored(task) for task in tasks]
    wait_until(lambda: all(age(task, one) > 1.5 * LEASE for task, one in zip(tasks, begun, strict=True)))
    Errand.objects.update(title="")
    wait_until(lambda: all(stored(task).state == State.finished for task in tasks))
    assert sorted(Ledger.objects.values_list("task", flat=True)) == [task.pk for task in tasks]
    assert [stored(task).attempts for task in tasks] == [1, 1, 1]
    assert len(set(Ledger.objects.values_list("worker", flat=True))) == 3
    assert "300.0 s ahead of" in ahead.output
    assert "300.0 s behind" in behind.output
    assert [worker.stop()[0] for worker in (right, ahead, behind)] == [0, 0, 0]


def age(task, earlier):
    """For how long a task has been renewed since."""
    return stored(task).parse()[1] - earlier.parse()[1]
