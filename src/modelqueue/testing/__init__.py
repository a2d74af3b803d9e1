"""Helpers for a user's own tests: run declared queues, move the clock, and look at what came of it.

Everything is done in the thread and the connection of the test, so it works inside a `TestCase`, whose
transaction is never committed: hooks of ``on_commit`` are called all the same, when they are in production.
The functions are for every test runner; a fixture of pytest is in `modelqueue.testing.plugin`, which alone
imports pytest.
"""

from __future__ import annotations

from modelqueue.testing.assertions import assert_state, assert_tally
from modelqueue.testing.running import Ran, drain, run_one, run_to_end, run_until
from modelqueue.testing.travel import MovableClock, travel

__all__ = [
    "MovableClock",
    "Ran",
    "assert_state",
    "assert_tally",
    "drain",
    "run_one",
    "run_to_end",
    "run_until",
    "travel",
]
