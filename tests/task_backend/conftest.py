"""All tests of this package have the backends of `tests.task_backend.backends`."""

import pytest

import modelqueue.task_backend.queues  # noqa: F401  (follows the setting from here on)
from tests.task_backend.backends import TASKS


@pytest.fixture(autouse=True)
def _backends(settings):
    settings.TASKS = TASKS
