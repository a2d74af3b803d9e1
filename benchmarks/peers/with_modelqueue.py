"""The tasks of `benchmarks.latency`, which a worker of this checkout serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import django


def enqueuer() -> Callable[[int], Any]:
    django.setup()

    from benchmarks.latency.models import Task

    return lambda number: Task.objects.create(queue=number)
