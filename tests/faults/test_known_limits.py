"""What the laboratory has found and is told not to try: what does not hold, in the smallest form."""

import pytest

from modelqueue import Status, clock, verbs
from modelqueue.source import Source
from tests.actions import MILLISECOND, Clock
from tests.faults.operations import GOES_ON, IS_HELD_UP, Crew, Operation
from tests.testapp.models import Paper

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _claims_at_once(settings):
    """The portable engine, slower, reads the clock when it has locked the row."""
    settings.MODELQUEUE = {"ENGINE": "auto"}


@pytest.mark.vendor("postgresql")
@pytest.mark.xfail(strict=True, reason="the moment of a claim is read before its statement is sent")
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
