"""The two task APIs, which are alike: Django's own, from 6.0 on, and ``django-tasks`` for those before it.

Each has classes of its own, and a project may use both at once, as a package that it uses may import the
second. So everything that is made of a task is made with the classes of that task's API.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from django.core.exceptions import ImproperlyConfigured

__all__ = ["BACKPORT", "DJANGO", "Api", "api", "api_of", "default", "in_use", "is_result"]

DJANGO, BACKPORT = "django.tasks", "django_tasks"


class Api:
    """The classes and the signals of one of them."""

    def __init__(self, package: str) -> None:
        self.package = package
        base: Any = import_module(f"{package}.base")
        exceptions: Any = import_module(f"{package}.exceptions")
        self.Task: Any = base.Task
        self.TaskContext: Any = base.TaskContext
        self.TaskError: Any = base.TaskError
        self.TaskResult: Any = base.TaskResult
        self.TaskResultStatus: Any = base.TaskResultStatus
        self.TaskResultDoesNotExist: Any = exceptions.TaskResultDoesNotExist
        self.InvalidTask: Any = _either(exceptions, "InvalidTask", "InvalidTaskError")
        self.InvalidTaskBackend: Any = _either(exceptions, "InvalidTaskBackend", "InvalidTaskBackendError")
        self.BaseTaskBackend: Any = import_module(f"{package}.backends.base").BaseTaskBackend
        self.signals: Any = import_module(f"{package}.signals")
        place = "django.utils.json" if package == DJANGO else f"{package}.utils"
        self.normalize_json: Any = import_module(place).normalize_json

    def __repr__(self) -> str:
        return f"<Api {self.package}>"


def _either(module: Any, *names: str) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


@functools.cache
def api(package: str) -> Api:
    """Return the API of a package, which is imported."""
    return Api(package)


def default() -> Api:
    """Return Django's own API, or the other one where Django has none.

    Raises:
        ImproperlyConfigured: there is neither.
    """
    for package in (DJANGO, BACKPORT):
        if find_spec(package) is not None:
            return api(package)
    raise ImproperlyConfigured(
        "modelqueue.task_backend needs Django 6.0 or later, or the package django-tasks with an earlier one: "
        "pip install modelqueue[tasks]"
    )


def in_use() -> Iterator[Api]:
    """Yield those APIs of which a backend has been built, or that a task was declared with."""
    import sys

    for package in (DJANGO, BACKPORT):
        if f"{package}.base" in sys.modules:
            yield api(package)


def is_result(value: object) -> bool:
    """Say whether an object is a result of one of them."""
    return any(isinstance(value, one.TaskResult) for one in in_use())


def api_of(task: object) -> Api | None:
    """Return the API that an object is a task of; None: it is none."""
    kind: Any = type(task)
    return _api_of_class(kind)


@functools.lru_cache(maxsize=100)
def _api_of_class(kind: type) -> Api | None:
    return next((one for one in in_use() if issubclass(kind, one.Task)), None)
