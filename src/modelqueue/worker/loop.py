"""Running asynchronous actions: one event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any, cast

from modelqueue.attempts import AsyncAttempt
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
        #: Whom we have canceled: else it was the action itself, and that is a failure.
        self._canceled: set[Running] = set()

    @property
    def is_alive(self) -> bool:
        return self._thread is None or self._thread.is_alive()

    def submit(self, running: Running) -> None:
        """Run the action of a claimed task."""
        if self._loop is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=self._work, args=[loop], name="modelqueue-loop", daemon=True)
            thread.start()
            self._loop, self._thread = loop, thread  # once there is a thread that runs it
        self._loop.call_soon_threadsafe(self._begin, running)

    def cancel(self, running: Running) -> None:
        """Cancel the action of one task, as its lease is lost."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._cancel, running)

    def interrupt(self) -> None:
        """Cancel all actions that are being run."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._cancel_all)

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
        task = asyncio.ensure_future(attempt.await_action(running.lane.queue.action, attempt.task))
        self._tasks[running] = task
        # Not at the end of a coroutine of ours: one that is canceled before it has begun is not run at all.
        task.add_done_callback(lambda task: self._end(running, task))
        if not attempt.is_held:  # since before there was something to cancel, and nobody tells again
            self._cancel(running)

    def _cancel(self, running: Running) -> None:
        task = self._tasks.get(running)
        if task is not None:
            self._canceled.add(running)
            task.cancel()

    def _cancel_all(self) -> None:
        for running in list(self._tasks):
            self._cancel(running)

    def _end(self, running: Running, task: asyncio.Task[Kept[BaseException | None]]) -> None:
        error: BaseException | None
        if task.cancelled():
            error = asyncio.CancelledError()
        elif (error := task.exception()) is None:
            error, _ = task.result()  # a cancellation that came after the action had ended changes nothing
        if isinstance(error, asyncio.CancelledError) and running not in self._canceled:
            wrong = RuntimeError("The action was canceled, by itself or by what it awaited.")
            wrong.__cause__, error = error, wrong
        self._canceled.discard(running)
        del self._tasks[running]
        self._completer.put(running, error)
