"""The fixture of real workers."""

import pytest

from tests.worker.workers import Workers


@pytest.fixture
def workers(transactional_db):
    """Real workers on the database of this test; see `tests.worker.workers`."""
    with Workers() as started:
        yield started
