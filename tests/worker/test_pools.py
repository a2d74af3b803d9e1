"""Connection pools that are too small for a worker are told with what to set."""

import pytest
from django.db import connections

from modelqueue.worker.options import Options
from modelqueue.worker.pools import too_small_pools
from tests.testapp.queues import do_errand, review


@pytest.mark.parametrize(
    ("pool", "queues", "texts"),
    [
        (None, [do_errand, review], []),
        (False, [do_errand], []),
        (
            True,
            [do_errand],
            ["gives a process 4 connections. Where all actions use the database it takes 7,"],
        ),
        ({"min_size": 2, "max_size": 6}, [do_errand], ["a process 6 connections"]),
        ({"min_size": 6}, [do_errand], ["a process 6 connections"]),
        ({"max_size": 7}, [do_errand], []),
        ({"max_size": 7}, [do_errand, review], ["Set max_size of the pool to 207,"]),
    ],
)
def test_pool_that_is_too_small_is_told(pool, queues, texts, monkeypatch):
    monkeypatch.setitem(connections["default"].settings_dict["OPTIONS"], "pool", pool)
    found = too_small_pools(queues, Options(names=()))
    assert len(found) == len(texts)
    assert all(text in one for text, one in zip(texts, found, strict=True))


def test_queue_whose_callable_fails_is_left_out(monkeypatch):
    def away():
        raise LookupError("away")

    monkeypatch.setattr(do_errand, "source", away)
    monkeypatch.setitem(connections["default"].settings_dict["OPTIONS"], "pool", {"max_size": 7})
    found = too_small_pools([do_errand, review], Options(names=()))
    assert ["Set max_size of the pool to 207," in text for text in found] == [True]
