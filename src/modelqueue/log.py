"""Every event as a line of the logger ``modelqueue``, with the facts as ``extra`` keys.

The keys: ``event`` (the name of the signal), ``queue``, ``model`` (its label), ``pk``, ``field``,
``using``, ``state`` and ``attempts`` of the status that stands now (None where there is none), ``due``
where a task waits for a time, and ``outcome`` where an attempt has ended.

A claim and a good end are DEBUG, what somebody may want to look at is WARNING, and a task that was
given up for good is ERROR. The line of a failure has its traceback.
"""

from __future__ import annotations

import datetime as dt
import logging
import traceback
from typing import Any

from django.db.models import Model

from modelqueue.clock import now
from modelqueue.durations import in_short
from modelqueue.outcomes import error_text
from modelqueue.signals import lease_lost, observe, task_claimed, task_finished, task_recovered
from modelqueue.status import State, Status, priority_to_datetime

logger = logging.getLogger("modelqueue")

#: What is told at DEBUG alone: claims, which have no outcome yet, and what nobody has to look at.
_QUIET = (None, "finish", "assign", "retry", "release")


def log_claimed(sender: type[Model], **facts: Any) -> None:
    _log(logging.DEBUG, "task_claimed", "claimed", sender, facts)


def log_finished(sender: type[Model], **facts: Any) -> None:
    if facts["outcome"] in _QUIET:
        level, text = logging.DEBUG, f"outcome {facts['outcome']}"
    else:
        level = logging.ERROR if _is_canceled(facts) else logging.WARNING
        text = f"outcome {facts['outcome']} ({error_text(facts['error']).splitlines()[0]})"
    is_trace_wanted = facts["outcome"] == "fail" and logger.isEnabledFor(level)  # Abort and Cancel were meant
    _log(level, "task_finished", text, sender, facts, _traced(facts["error"]) if is_trace_wanted else None)


def log_recovered(sender: type[Model], **facts: Any) -> None:
    level = logging.ERROR if _is_canceled(facts) else logging.WARNING
    why = facts["error"] or "its worker did not report in time"
    _log(level, "task_recovered", f"recovered, as {why}", sender, facts)


def log_lease_lost(sender: type[Model], **facts: Any) -> None:
    if facts["outcome"] == "release" and facts["error"] is None:  # nobody asked for it to be given back
        text = "lease lost, the task was taken away before its action began"
    else:
        text = f"lease lost, its outcome {facts['outcome']} is dropped; {_what_happened(facts['status'])}"
    _log(logging.WARNING, "lease_lost", text, sender, facts)


def _is_told(outcome: str | None) -> bool:
    return outcome not in _QUIET or logger.isEnabledFor(logging.DEBUG)


observe(task_claimed, log_claimed, _is_told)
observe(task_finished, log_finished, _is_told)
observe(task_recovered, log_recovered, lambda outcome: True)
observe(lease_lost, log_lease_lost, lambda outcome: True)


def _traced(error: BaseException) -> BaseException | None:
    """Return an error if its traceback can be written to a file, or its line would be lost with it."""
    try:
        "".join(traceback.format_exception(type(error), error, error.__traceback__)).encode()
    except Exception:
        return None
    return error


def _what_happened(status: Status | None) -> str:
    """Say what came between, as far as the row tells."""
    if status is None:
        return "its row was deleted, or left the queue, meanwhile"
    if status.state == State.canceled:
        return "it was canceled meanwhile"
    if status.state in (State.waiting, State.working):
        return (
            "it was taken back meanwhile, as the action took longer than the timeout or its worker could not "
            "renew the lease, or somebody has changed the status"
        )
    return "the status was changed meanwhile, by somebody or by the action"


def _is_canceled(facts: dict[str, Any]) -> bool:
    status: Status | None = facts["status"]
    return status is not None and status.state == State.canceled


def _log(
    level: int,
    event: str,
    text: str,
    model: type[Model],
    facts: dict[str, Any],
    trace: BaseException | None = None,
) -> None:
    if not logger.isEnabledFor(level):
        return
    status: Status | None = facts["status"]
    due = None if status is None else _due(status)
    extra = {
        "event": event,
        "queue": facts["queue"],
        "model": model._meta.label,
        "pk": facts["pk"],
        "field": facts["field"],
        "using": facts["using"],
        "state": None if status is None else status.state.name,
        "attempts": None if status is None else status.attempts,
        "due": due,
        "outcome": facts.get("outcome"),
    }
    where = f"{model._meta.label} {facts['pk']} {facts['field']}"
    if facts["queue"] is not None:
        where = f"{facts['queue']}, {where}"
    logger.log(level, "%s: %s [%s]", where, text, _stands(status, due), extra=extra, exc_info=trace)


def _due(status: Status) -> dt.datetime | None:
    """Return when a waiting task is due, if that is a time."""
    return priority_to_datetime(status.priority) if status.state == State.waiting else None


def _stands(status: Status | None, due: dt.datetime | None) -> str:
    if status is None:
        return "gone"
    seconds = 0.0 if due is None else (due - now()).total_seconds()
    wait = f" for {in_short(seconds)}" if seconds >= 1.0 else ""
    return f"{status.state}{wait}, {status.attempts} attempt{'' if status.attempts == 1 else 's'}"
