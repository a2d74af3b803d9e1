"""The queue, whose action is what the benchmark says: as an ordinary function, or an asynchronous one."""

from __future__ import annotations

import os

import modelqueue
from benchmarks.actions import action, async_action
from benchmarks.project.models import Task

if slots := int(os.environ.get("BENCHMARK_SLOTS", "0")):
    act_async = async_action()

    @modelqueue.queue(Task, "status", name="task", slots=slots)
    async def work_async(task: Task) -> None:
        await act_async(task.pk)

else:
    act = action()

    @modelqueue.queue(Task, "status", name="task")
    def work(task: Task) -> None:
        act(task.pk)
