"""What holds in whatever order workers, humans and mishaps come: a search for one in which it does not."""

import os

import pytest

from tests.faults.laboratory import search

pytestmark = pytest.mark.django_db(transaction=True)

#: More than the suite has time for, and others each time: MODELQUEUE_EXAMPLES=5000 overnight.
EXAMPLES = int(os.environ.get("MODELQUEUE_EXAMPLES", "0"))


@pytest.mark.timeout(600 + EXAMPLES)  # a failure is made smaller for up to five minutes
def test_all_invariants_hold():
    search(EXAMPLES or 60, derandomize=not EXAMPLES)
