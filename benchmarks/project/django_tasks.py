"""The Django task of the benchmarks."""

from __future__ import annotations

from importlib import import_module

from benchmarks.actions import action
from benchmarks.project.settings_of_tasks import API

task = import_module(API).task
act = action()


@task
def work_on(number: int) -> None:
    act(number)
