"""What holds in whatever order workers, humans and mishaps come: a search for an order in which it does not."""

import os

import pytest
from hypothesis import Phase

from tests.faults.laboratory import search

pytestmark = pytest.mark.django_db(transaction=True)

#: More than the suite can afford, each time others: MODELQUEUE_EXAMPLES=5000 on a database over night.
EXAMPLES = int(os.environ.get("MODELQUEUE_EXAMPLES", "0"))


@pytest.mark.timeout(300 + EXAMPLES)
def test_all_invariants_hold():
    search(
        EXAMPLES or 100,
        derandomize=not EXAMPLES,
        phases=[Phase.generate] if os.environ.get("NOSHRINK") else (Phase.generate, Phase.shrink),
    )
