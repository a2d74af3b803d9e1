"""What the laboratory has found and is told not to try: what does not hold, in the smallest form."""

import pytest
from django.db import OperationalError, connection

from modelqueue import Status, clock, verbs
from modelqueue.source import Source
from tests.actions import MILLISECOND, Clock
from tests.faults.operations import GOES_ON, IS_HELD_UP, Crew, Operation
from tests.testapp.models import Paper

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.db_feature("has_select_for_update_skip_locked"),
]


@pytest.fixture(autouse=True)
def _claims_at_once(settings):
    """The portable engine, slower, has neither limit."""
    settings.MODELQUEUE = {"ENGINE": "auto"}


@pytest.mark.xfail(reason="the moment of a claim is read before its statement is sent")
def test_claim_that_was_on_its_way_while_the_task_was_claimed_and_given_back_gets_a_lease_of_its_own():
    now = Clock()
    source = Source.of(Paper.objects, "status")
    with clock.use(now), Crew(1) as crew:
        paper = Paper.objects.create(status=Status.waiting(0))
        late = Operation("claim", lambda operation: verbs.claim(source), ("claim", "before the statement"))
        late.fate = IS_HELD_UP
        crew.workers[0].start(late)
        (first,) = verbs.claim(source)
        now.move(2 * MILLISECOND)  # `Attempt.keep_leases_unique` has waited
        Paper.objects.filter(pk=paper.pk).update(status=first.row.status)  # given back uncharged
        late.resume(GOES_ON)
        (second,) = late.result
    assert second.lease > first.lease


@pytest.mark.xfail(reason="the read of an index range locks the entry after its end", raises=OperationalError)
@pytest.mark.vendor("mysql")
def test_outcome_does_not_wait_for_an_open_claim_that_finds_less_than_it_wants():
    source = Source.of(Paper.objects, "status")
    with Crew(1) as crew:
        expired = Paper.objects.create(status=Status.working(0))  # comes next in the index
        Paper.objects.create(status=Status.waiting(0))
        late = Operation("claim", lambda operation: verbs.claim(source, 5), ("claim", "before the commit"))
        late.fate = IS_HELD_UP
        crew.workers[0].start(late)
        try:
            with connection.cursor() as cursor:
                cursor.execute("SET innodb_lock_wait_timeout = 1")
            Paper.objects.filter(pk=expired.pk).update(status=Status.finished())
        finally:
            late.resume(GOES_ON)
            connection.close()
