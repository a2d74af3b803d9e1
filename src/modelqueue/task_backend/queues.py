"""The queues of the backends in the setting TASKS, declared as any others are: the worker serves them."""

from __future__ import annotations

import datetime as dt
import random
import re
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.dispatch import receiver
from django.utils.module_loading import import_string

from modelqueue import findings, verbs
from modelqueue.findings import Finding
from modelqueue.queues import Queue, queue, undeclare
from modelqueue.status import State
from modelqueue.task_backend.backend import ModelQueueBackend, is_id
from modelqueue.task_backend.execution import (
    ReturnValueError,
    claim_values,
    execute,
    next_priority,
    promote,
    task_options,
)
from modelqueue.task_backend.models import QueuedTask
from modelqueue.task_backend.options import Options, backends_of_setting
from modelqueue.task_backend.results import forget_senders
from modelqueue.task_backend.unserved import OutOfTime, Place, unserved

__all__ = ["queue_name", "task_queues"]

#: Seconds between two looks for results that are to be deleted.
_PRUNE_INTERVAL = 60.0
#: Seconds that they are deleted for at a time.
_PRUNE_SECONDS = 0.5


def queue_name(alias: str, name: str | None) -> str:
    """Return what the worker calls a queue of a backend: as QUEUES does, after an alias not the default.

    What the command line can not take, a space for example, is an underscore there.
    """
    called = alias if name is None else name if alias == "default" else f"{alias}:{name}"
    return re.sub(r"[^\w.:-]", "_", called) or "_"


#: Those that are declared, as the setting TASKS says just now: each with its backend and its name in QUEUES.
_queues: dict[Queue[QueuedTask], Place] = {}


def task_queues() -> list[Queue[QueuedTask]]:
    """Return the queues of the backends."""
    return list(_queues)


@receiver(setting_changed, dispatch_uid="modelqueue_tasks")
def _follow_setting(setting: str, **kwargs: Any) -> None:
    """Declare them anew when a test has another setting."""
    if setting == "TASKS":
        forget_senders()
        for one in _queues:
            undeclare(one)
        _queues.clear()
        _declare_all()


def _declare_all() -> None:
    """Declare the queues of all backends of ours that the setting TASKS has, once all of it is read."""
    for alias, name, options in _wanted():
        # One by one, so that those declared before an error are known, and go with the next setting.
        _queues[_declare(alias, name, options)] = alias, name


def _wanted() -> list[tuple[str, str | None, Options]]:
    """Return each queue's backend, its name in QUEUES, and the options of its backend."""
    found: list[tuple[str, str | None, Options]] = []
    places: dict[str, str] = {}
    for alias, params in backends_of_setting():
        if _is_ours(params.get("BACKEND")):
            options = _options(alias, params)
            given = params.get("QUEUES", ["default"])
            if isinstance(given, str):
                raise ImproperlyConfigured(
                    f"TASKS[{alias!r}]['QUEUES'] is {given!r}, each letter of which would be a queue. Give "
                    f"[{given!r}]."
                )
            names: list[str | None] = sorted(set(given)) or [None]
            for name in names:
                _note_place(alias, name, places)
                found.append((alias, name, options))
    return found


def _note_place(alias: str, name: str | None, places: dict[str, str]) -> None:
    """Refuse a queue that is called as another one: the worker would serve one of them alone."""
    called = queue_name(alias, name)
    here = f"TASKS[{alias!r}]" if name is None else f"{name!r} in TASKS[{alias!r}]['QUEUES']"
    # MySQL and MariaDB do not tell a from A: two would have the same tasks.
    other = places.setdefault(called.casefold(), here)
    if other is not here:
        raise ImproperlyConfigured(
            f"{here} and {other} are queues that the worker would both call {called!r}. Give one of them, or "
            "its backend, another name; capital and small letters make no difference."
        )


def _options(alias: str, params: Any) -> Options:
    try:
        return Options.of(params.get("OPTIONS", {}))
    except (TypeError, ValueError) as error:
        raise ImproperlyConfigured(f"TASKS[{alias!r}]['OPTIONS']: {error}") from error


def _is_ours(path: Any) -> bool:
    try:
        backend = import_string(path)
    except (ImportError, TypeError, AttributeError):  # which the API itself tells
        return False
    return isinstance(backend, type) and issubclass(backend, ModelQueueBackend)


def _declare(alias: str, name: str | None, options: Options) -> Queue[QueuedTask]:
    rows = QueuedTask.objects.filter(backend_name=alias)
    if options.database is not None:
        rows = rows.using(options.database)
    if name is not None:
        rows = rows.filter(queue_name=name)
    upkeep = _Upkeep(options)
    declared = queue(
        rows,
        "status",
        name=queue_name(alias, name),
        retry="retry",
        timeout=options.timeout,
        lease=options.lease,
        delay=options.delay,
        error_field="error",
        claim_values=claim_values,
        next_priority=next_priority,
        task_options=task_options,
        cancel_on=ReturnValueError,
        upkeep=upkeep.keep,
    )(execute)
    upkeep.queue = declared
    declared.group = alias
    declared.keys_of_ids = partial(_keys_of_ids, declared)
    declared.examine = _examine
    return declared


def _examine(using: str, seconds: float) -> Iterator[Finding]:
    """Yield what is wrong with a database: tasks that are in none of the queues."""
    served = {place for queue, place in _queues.items() if queue.using == using}
    try:
        for one in unserved(using, served, seconds):
            yield findings.unserved(str(one), one.rows)
    except OutOfTime as error:
        yield findings.not_all_served(str(error))


def _keys_of_ids(queue: Queue[QueuedTask], ids: Iterable[str]) -> dict[str, Any]:
    """Return the primary keys of its tasks by the ids of their results; those of none are left out."""
    possible = [one for one in ids if is_id(one)]
    rows = queue.source().queryset.filter(result_id__in=possible)
    found = dict(rows.values_list("result_id", "pk"))
    return {one: found[one] for one in possible if one in found}  # MySQL does not tell a from A


class _Upkeep:
    """What a worker does each second for one queue."""

    def __init__(self, options: Options) -> None:
        self.queue: Queue[QueuedTask]
        self._ttl = options.result_ttl
        self._prune_at = 0.0
        self._states = [State.finished, State.canceled]

    def keep(self) -> None:
        promote(self.queue)
        if self._ttl is not None and time.monotonic() >= self._prune_at:
            # What is left by then goes on after the next promotion.
            is_done = self._prune(self._ttl, time.monotonic() + _PRUNE_SECONDS)
            # At other moments than the other workers.
            pause = _PRUNE_INTERVAL * random.uniform(0.5, 1.5)  # noqa: S311
            self._prune_at = time.monotonic() + (pause if is_done else 0.0)

    def _prune(self, ttl: dt.timedelta, deadline: float) -> bool:
        deleted = 0
        for state in tuple(self._states):
            for page in verbs.prune(self.queue.prunable(), "status", ttl, state):
                deleted += page.deleted
                if time.monotonic() >= deadline:
                    # Many of one state that other tables protect are not in the way of the other, nor are
                    # they looked at each second. (They are in the way of those after them.)
                    self._states.reverse()
                    return not deleted
        return True


_declare_all()
