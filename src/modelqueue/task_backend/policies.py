"""How one Django task is tried: what its decorator says, or `policy`, or else the options of its backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from inspect import iscoroutinefunction
from typing import Any, TypeVar, overload

from modelqueue.outcomes import Policy
from modelqueue.task_backend import apis
from modelqueue.task_backend.options import Options, duration

__all__ = ["NOT_GIVEN", "OPTION_NAMES", "by_task", "check_options", "options_of", "policy", "task_class"]

T = TypeVar("T")

#: On the function of a task: what `policy` has said of it. There, as it is to hold for each task that is made
#: of the function, by `using` for example, whatever its class.
_GIVEN = "modelqueue_policy"
#: The names in this module of the classes that `task_class` makes.
_CLASSES = {apis.DJANGO: "ModelQueueTask", apis.BACKPORT: "BackportModelQueueTask"}
OPTION_NAMES = ("retry", "timeout", "delay", "atomic")


class _NotGiven:
    # No enum: a task is hashed for each of its calls, and so is this, by which an enum takes its time.
    def __repr__(self) -> str:
        return "NOT_GIVEN"

    def __reduce__(self) -> str:
        return "NOT_GIVEN"


NOT_GIVEN = _NotGiven()


@functools.cache
def task_class(api: apis.Api) -> Any:
    """Return the class of the tasks of our backends: ``@task`` takes the options of a policy (Django 6.1)."""

    @dataclass(frozen=True, kw_only=True)
    class ModelQueueTask(api.Task):  # type: ignore[misc,name-defined]
        retry: Any = NOT_GIVEN
        timeout: Any = NOT_GIVEN
        delay: Any = NOT_GIVEN
        atomic: Any = NOT_GIVEN

    ModelQueueTask.__name__ = ModelQueueTask.__qualname__ = _CLASSES[api.package]
    return ModelQueueTask


def __getattr__(name: str) -> Any:
    """Return the class of tasks by its name: pickled ones ask for it here, of Django 6.1 for example."""
    for package, class_name in _CLASSES.items():
        if name == class_name:
            return task_class(apis.api(package))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@overload
def policy(task: T, *, retry: Any = ..., timeout: Any = ..., delay: Any = ..., atomic: Any = ...) -> T: ...
@overload
def policy(
    *, retry: Any = ..., timeout: Any = ..., delay: Any = ..., atomic: Any = ...
) -> Callable[[T], T]: ...
def policy(task: Any = None, **options: Any) -> Any:
    """Say how a task is tried, whatever API and version it is of; also as a decorator above ``@task``.

    For example::

        @policy(retry=5, timeout=60)
        @task
        def send(address): ...

    With another backend, Django's immediate one for example, this changes nothing.

    Args:
        task: the task, as ``@task`` has made it.
        retry: how many attempts are allowed after the first that failed, 0 to 8; None for no limit.
        timeout: how long an attempt may take, in seconds or as a timedelta.
        delay: how long the task waits after a failed attempt: seconds, a timedelta, or a callable
            (attempts) -> timedelta, see `modelqueue.backoff`.
        atomic: whether the function and its outcome are one transaction, see `modelqueue.run`.

    Returns:
        The same task.

    Raises:
        TypeError, ValueError: it is no task, or an option is wrong.
    """
    if unknown := sorted(set(options) - set(OPTION_NAMES)):
        raise TypeError(f"policy() has no option {unknown[0]!r}. There are: {', '.join(OPTION_NAMES)}.")
    if task is None:
        return functools.partial(policy, **options)
    if apis.api_of(task) is None:
        raise TypeError(f"policy() takes a task, as @task makes it of a function, not {task!r}.")
    check_options(task, options)
    setattr(task.func, _GIVEN, {**getattr(task.func, _GIVEN, {}), **options})
    return task


def by_task(function: Any, task: Any, *further: Any) -> Any:
    """Call a function that keeps what it returns by its arguments, also where the task has no hash.

    That is where one of its options has none: a delay that is an instance of a dataclass, for example.
    """
    try:
        return function(task, *further)
    except TypeError:  # or one that comes once more
        return function.__wrapped__(task, *further)


def options_of(task: Any) -> Mapping[str, Any]:
    """Return what is said of a task itself, by its decorator above all.

    Raises:
        TypeError, ValueError: what is wrong with it, and what to do about it.
    """
    options: Mapping[str, Any] = by_task(_options_of, task, tuple(getattr(task.func, _GIVEN, {}).items()))
    return options


@functools.lru_cache(maxsize=1000)
def _options_of(task: Any, by_policy: tuple[tuple[str, Any], ...]) -> Mapping[str, Any]:
    # For each task that is enqueued or run: to check them takes longer than all else of a short one.
    check_options(task, {name: getattr(task, name) for name in OPTION_NAMES if hasattr(task, name)})
    given = dict(by_policy)
    known = {field.name for field in fields(task)}
    given |= {name: getattr(task, name) for name in OPTION_NAMES if name in known and _is_given(task, name)}
    return {name: _converted(name, value) for name, value in given.items()}


def _is_given(task: Any, name: str) -> bool:
    return getattr(task, name) is not NOT_GIVEN


def check_options(task: Any, options: dict[str, Any]) -> None:
    """Check the options of a policy.

    Raises:
        TypeError, ValueError: what is wrong with one, and what to do about it.
    """
    known = {name: _converted(name, value) for name, value in options.items() if value is not NOT_GIVEN}
    default = Options()
    Policy.of(
        known.get("retry", default.retry),
        known.get("timeout", default.timeout),
        known.get("delay", default.delay),
    )
    atomic = known.get("atomic", False)
    if not isinstance(atomic, bool):
        raise TypeError(f"atomic is True or False, not {atomic!r}.")
    if atomic and iscoroutinefunction(task.func):
        raise TypeError(
            f"atomic=True is for synchronous functions: a transaction belongs to a thread, and "
            f"{task.module_path} is async."
        )


def _converted(name: str, value: Any) -> Any:
    if name in ("timeout", "delay") and not callable(value) and value is not NOT_GIVEN:
        return duration(name, value)
    return value
