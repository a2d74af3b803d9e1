"""Synchronous work for asynchronous callers: in a thread, to its end, and with connections of its own.

Django's connections belong to threads. `sync_to_async` gives all coroutines of a loop the same thread, so
their work on the database is done one after the other, unless a coroutine has a thread of its own.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar, cast

from asgiref.sync import SyncToAsync, ThreadSensitiveContext, sync_to_async
from django.db import connections

__all__ = [
    "Kept",
    "NotCalled",
    "await_with_own_thread",
    "call_apart",
    "call_in_own_thread",
    "in_thread",
    "interrupt_coroutine",
    "run_coroutine",
]

T = TypeVar("T")
#: What came of it, and the cancellation that arrived meanwhile, which the caller is to raise.
Kept = tuple[T, "asyncio.CancelledError | None"]

#: Else the context does nothing below `async_to_sync` and within another one.
_CONTEXT_TAKES_EXECUTOR = "executor" in inspect.signature(ThreadSensitiveContext).parameters  # asgiref 3.13


class NotCalled(RuntimeError):  # noqa: N818
    """There was no thread to call a function in."""


async def in_thread(function: Callable[..., T], *arguments: Any, executor: Executor | None = None) -> Kept[T]:
    """Call a function in a thread, by default that of this coroutine's connections, and wait for its end.

    A thread can not be canceled, and who leaves it alone does not learn what it did. So the function is
    called also if this is canceled, and the cancellation is kept until it has ended.

    Args:
        executor: one of a single thread.

    Raises:
        asyncio.CancelledError: this was canceled, and the function raised an error.
        BaseException: what the function raised.
        NotCalled: it was not called.
    """
    ended: Future[tuple[T | None, BaseException | None]] = Future()
    turn = threading.Lock()

    def work() -> None:
        if not turn.acquire(blocking=False):
            return
        try:
            ended.set_result((function(*arguments), None))
        except BaseException as error:
            ended.set_result((None, error))

    canceled: asyncio.CancelledError | None = None
    while not ended.done():
        try:
            if turn.locked():
                await asyncio.wait([asyncio.wrap_future(ended)])
            else:
                # Maybe once more, if it was canceled before it had begun: then the second call finds that
                # there is nothing left to do.
                pool = cast("ThreadPoolExecutor | None", executor)  # any Executor will do
                await sync_to_async(work, thread_sensitive=executor is None, executor=pool)()
        except asyncio.CancelledError as error:
            canceled = error
        except RuntimeError as error:  # the system gives no more threads, or is about to end
            if not turn.locked():
                raise NotCalled(str(error)) from error
    result, failure = ended.result()
    if failure is not None:
        if canceled is not None and isinstance(failure, Exception):
            raise canceled from failure
        if isinstance(failure, NotCalled):  # of a call inside of it
            raise RuntimeError(str(failure)) from failure
        raise failure
    return cast("T", result), canceled


def call_apart(function: Callable[[], T]) -> T:
    """Call a function in a thread of its own, so with connections of its own, and wait for its end."""

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(_call_and_close, function).result()


def _call_and_close(function: Callable[..., T], *arguments: Any) -> T:
    try:
        return function(*arguments)
    finally:
        _close_connections()


async def call_in_own_thread(function: Callable[..., T], *arguments: Any) -> Kept[T]:
    """Call a function as `in_thread` does, in a thread of its own; its connections are closed at the end."""
    executor = ThreadPoolExecutor(1)
    try:
        return await in_thread(_call_and_close, function, *arguments, executor=executor)
    finally:
        executor.shutdown(wait=False)


class _OwnThread(Executor):
    """A pool of one thread that is made with its first call: most async actions need none."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    @property
    def is_used(self) -> bool:
        return self._pool is not None

    def submit(self, function: Callable[..., T], /, *arguments: Any, **named: Any) -> Future[T]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1)
        return self._pool.submit(function, *arguments, **named)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait, cancel_futures=cancel_futures)


async def await_with_own_thread(work: Awaitable[T], then: Callable[[T], T]) -> Kept[T]:
    """Await work whose synchronous parts get a thread of their own, whose connections are closed at the end.

    The thread is made when it is needed. With asgiref before 3.13 they stay in the caller's thread below
    `async_to_sync` and in the context of a request.

    Args:
        then: called with the result, in the thread that was used, before its connections are closed;
            returns the result.
    """
    executor = _OwnThread()
    options: dict[str, Any] = {"executor": executor} if _CONTEXT_TAKES_EXECUTOR else {}
    canceled: asyncio.CancelledError | None = None
    try:
        async with ThreadSensitiveContext(**options) as context:
            SyncToAsync.context_to_thread_executor[context] = executor
            try:
                result = await work
                with suppress(NotCalled):  # the work is done all the same
                    if executor.is_used:
                        result, canceled = await in_thread(then, result, executor=executor)
                    elif not _CONTEXT_TAKES_EXECUTOR:  # perhaps in the caller's thread
                        result, canceled = await in_thread(then, result)
            finally:
                with suppress(NotCalled):
                    if executor.is_used:
                        _, late = await in_thread(_close_connections, executor=executor)
                        canceled = canceled or late
                # Else the end of the context waits for it, and may be canceled meanwhile.
                SyncToAsync.context_to_thread_executor.pop(context, None)
    finally:
        executor.shutdown(wait=False)
    return result, canceled


#: By the number of a thread: what cancels the coroutine that `run_coroutine` runs in it.
_cancelers: dict[int, Callable[[type[BaseException]], object]] = {}


def interrupt_coroutine(ident: int, error: type[BaseException]) -> bool:
    """Cancel the coroutine that `run_coroutine` runs in a thread, and have that raise an exception.

    What is raised in the midst of an event loop instead may end any other task of the loop, or nothing.

    Returns:
        Whether there is one; it hears of it when it awaits.
    """
    canceler = _cancelers.get(ident)
    if canceler is not None:
        with suppress(RuntimeError):  # the loop has just been closed
            canceler(error)
    return canceler is not None


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in an event loop of its own, which `interrupt_coroutine` can cancel.

    `asyncio.run` can be interrupted by what is raised in its thread alone. That does not wake a loop that
    waits, and comes to whatever is just running in the loop.

    Raises:
        BaseException: what the coroutine raised; or the error of who has interrupted it, unless it has
            returned all the same.
    """
    ident, loop = threading.get_ident(), asyncio.new_event_loop()
    sent: list[type[BaseException]] = []
    try:
        task = loop.create_task(coroutine)

        def cancel(error: type[BaseException]) -> None:
            sent.append(error)
            loop.call_soon_threadsafe(task.cancel)

        _cancelers[ident] = cancel
        try:
            return loop.run_until_complete(task)
        except asyncio.CancelledError as canceled:
            if not sent:
                raise
            raise sent[0] from canceled  # which says where it was
        finally:
            _cancelers.pop(ident, None)
    finally:
        _close(loop)


def _close(loop: asyncio.AbstractEventLoop) -> None:
    try:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


def _close_connections() -> None:
    for connection in connections.all(initialized_only=True):
        with suppress(Exception):  # of one that is dead
            connection.close()
