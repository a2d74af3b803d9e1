"""Every event of the library as a Django signal, and its arguments.

The sender is the model class. All receivers get ``pk`` (primary key of the task), ``field`` (name of
the status field), ``using`` (alias of the database) and ``queue`` (name of the declared queue, or None)
besides what is listed with each signal. They are called after the database has taken the change (inside
an outer transaction: before its commit). What a receiver raises is logged and goes no further: an
observer can not change what happens to a task.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from django.db.models import Model
from django.dispatch import Signal

__all__ = ["lease_lost", "task_claimed", "task_finished", "task_recovered"]

logger = logging.getLogger("modelqueue")

#: A worker has claimed a task and is about to run its action.
#:
#: ``task``: the instance; ``status``: the working `Status`, which is the lease;
#: ``before``: what stood in the fields that the claim has set (`claim_values` of its queue), by their names;
#: None: it sets none. What a receiver loads of the task, by ``refresh_from_db``, counts as claimed.
task_claimed = Signal(use_caching=True)

#: An attempt has ended and its outcome is recorded.
#:
#: ``task``: the instance (None: the row could not be made into one); ``status``: the `Status` that was
#: recorded (None: taken out of the queue);
#: ``outcome``: one of the words of `modelqueue.outcomes.Ending`, such as ``"finish"`` or ``"retry"``;
#: ``error``: the exception that ended the attempt, or None.
task_finished = Signal(use_caching=True)

#: A task was taken back from the worker that held it, as that is dead, or as its lease has run out.
#:
#: ``lease``: the `Status` that the dead worker held; ``status``: the new one; ``error``: what has become of
#: the worker, where its supervisor knows it, or None.
task_recovered = Signal(use_caching=True)

#: An attempt has ended, but its lease was gone: nothing of its outcome was recorded.
#:
#: ``task``: the instance; ``lease``: the `Status` that the worker held; ``status``: the one that stands
#: in the row now (None: the row is gone or out of the queue); ``outcome``, ``error``: as in
#: `task_finished`, of the attempt that was dropped (``"release"`` and None: its action was not called).
lease_lost = Signal(use_caching=True)


#: Called with the same arguments, before the receivers: the log. It is no receiver, since to look for those,
#: where there are any, takes as long as all else of a short task.
_observers: dict[Signal, Callable[..., None]] = {}
#: Says whether the observer has anything to do with an outcome, if there is one.
_wants: dict[Signal, Callable[[str | None], bool]] = {}


def observe(signal: Signal, observer: Callable[..., None], wants: Callable[[str | None], bool]) -> None:
    _observers[signal], _wants[signal] = observer, wants


def is_heard(signal: Signal, model: type[Model], outcome: str | None = None) -> bool:
    """Say whether to send it makes any difference: to put it together for nobody takes its time, too."""
    is_received = bool(signal.receivers) and signal.has_listeners(model)
    return is_received or (signal in _wants and _wants[signal](outcome))


def send(
    signal: Signal,
    model: type[Model],
    *,
    pk: Any,
    field: str,
    using: str,
    queue: str | None,
    **arguments: Any,
) -> None:
    """Send a signal; Django logs what a receiver raises (logger ``django.dispatch``)."""
    observer = _observers.get(signal)
    if observer is not None and _wants[signal](arguments.get("outcome")):
        try:
            observer(model, pk=pk, field=field, using=using, queue=queue, **arguments)
        except Exception:  # of a value without a text, or a handler of the log
            logger.exception("%s %s: what has become of it can not be logged.", model._meta.label, pk)
    if signal.receivers:
        signal.send_robust(model, pk=pk, field=field, using=using, queue=queue, **arguments)
