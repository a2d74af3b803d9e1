"""A fixture for pytest: ``pytest_plugins = ["modelqueue.testing.plugin"]`` in the topmost ``conftest.py``.

It is asked for by that line, and not by an entry point of the package: pytest would load that in every
project of the environment, before anybody has configured Django or begun to measure coverage.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from modelqueue.testing.travel import MovableClock, travel

__all__ = ["modelqueue_clock"]


@pytest.fixture
def modelqueue_clock() -> Iterator[MovableClock]:
    """The clock that the library asks during this test: move it, or let `run_until` do so."""
    with travel() as clock:
        yield clock
