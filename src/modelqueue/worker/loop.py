"""Running asynchronous actions: one event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any, cast
from weakref import WeakKeyDictionary

from modelqueue.attempts import AsyncAttempt, Attempt
from modelqueue.attempts import running as attempt_of
from modelqueue.exceptions import TimedOut
from modelqueue.threads import Kept
from modelqueue.worker.completer import Completer
from modelqueue.worker.running import Running

__all__ = ["Loop"]


logger = logging.getLogger("modelqueue")


class Loop:
    """The event loop of a process; begins with the first task."""

    def __init__(self, completer: Completer) -> None:
        self._completer = completer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tasks: dict[Running, asyncio.Task[Kept[BaseException | None]]] = {}
        #: Whom we have canceled, and what it has failed with, if it has: else it was the action itself.
        self._canceled: dict[Running, TimedOut | None] = {}
        #: Of which action a task of the loop is: its own, or one that it has made.
        self._attempts: WeakKeyDictionary[asyncio.Task[Any], Attempt[Any] | None] = WeakKeyDictionary()

    @property
    def is_alive(self) -> bool:
        return self._thread is None or self._thread.is_alive()

    def submit(self, running: Running) -> None:
        """Run the action of a claimed task."""
        if self._loop is None:
            loop = asyncio.new_event_loop()
            loop.set_task_factory(self._make_task)
            thread = threading.Thread(target=self._work, args=[loop], name="modelqueue-loop", daemon=True)
            thread.start()
            self._loop, self._thread = loop, thread  # once there is a thread that runs it
        self._loop.call_soon_threadsafe(self._begin, running)

    def cancel(self, running: Running, failure: TimedOut | None = None) -> None:
        """Cancel the action of one task: as its lease is lost or, with a failure, as it takes too long."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._cancel, running, failure)

    def is_held_up_by_another(self, running: Running) -> bool:
        """Say whether it seems that an action can not end because another one does not let the loop go on."""
        current = asyncio.current_task(self._loop)
        attempt = None if current is None else self._attempts.get(current)
        return any(one.attempt is attempt for one in self._tasks.copy() if one is not running)

    def interrupt(self) -> None:
        """Cancel all actions that are being run."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._cancel_all)

    def _make_task(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, **options)
        self._attempts[task] = attempt_of.get(None)  # unless its action is still to begin
        return task

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        while True:
            try:
                loop.run_forever()
                logger.error("An action has stopped the event loop of its worker, which goes on.")
            except BaseException:
                # SystemExit and KeyboardInterrupt of a task that an action has made leave the loop, too. Who
                # awaits that task gets them as well.
                logger.exception("The event loop goes on after an error that has left it.")

    def _begin(self, running: Running) -> None:
        attempt = cast("AsyncAttempt[Any]", running.attempt)
        running.action_begins()
        task = asyncio.ensure_future(attempt.await_action(running.lane.queue.action, attempt.task))
        self._tasks[running] = task
        self._attempts[task] = attempt
        # Not at the end of a coroutine of ours: one that is canceled before it has begun is not run at all.
        task.add_done_callback(lambda task: self._end(running, task))
        if not attempt.is_held:  # since before there was something to cancel, and nobody tells again
            self._cancel(running)

    def _cancel(self, running: Running, failure: TimedOut | None = None) -> None:
        task = self._tasks.get(running)
        if task is not None:
            self._canceled.setdefault(running, failure)
            task.cancel()

    def _cancel_all(self) -> None:
        for running in list(self._tasks):
            self._cancel(running)

    def _end(self, running: Running, task: asyncio.Task[Kept[BaseException | None]]) -> None:
        running.action_has_ended()
        error: BaseException | None
        if task.cancelled():
            error = asyncio.CancelledError()
        elif (error := task.exception()) is None:
            error, _ = task.result()  # a cancellation that came after the action had ended changes nothing
        if isinstance(error, asyncio.CancelledError):
            error = self._why_canceled(running, error)
        self._canceled.pop(running, None)
        del self._tasks[running]
        self._completer.put(running, error)

    def _why_canceled(self, running: Running, error: asyncio.CancelledError) -> BaseException:
        """Return what a canceled action has failed with, or its error if the task is to be given back."""
        if running not in self._canceled:
            wrong = RuntimeError("The action was canceled, by itself or by what it awaited.")
            wrong.__cause__ = error
            return wrong
        failure = self._canceled[running]
        return error if failure is None else failure.with_traceback(error.__traceback__)
