"""Coroutines in a thread: they are interrupted from another one, and go to their end in order."""

import asyncio
import threading
import time

import pytest

from modelqueue.exceptions import TimedOut
from modelqueue.threads import run_coroutine
from modelqueue.worker.system import interrupt_thread
from tests.processes import wait_until


class Run:
    """A thread that runs a coroutine function, which gets what it notes what it does in."""

    def __init__(self, function):
        self.notes, self.error, self.value = [], None, None
        self._function = function
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        wait_until(lambda: "began" in self.notes)

    def _work(self):
        try:
            self.value = run_coroutine(self._function(self.notes))
        except BaseException as error:
            self.error = error

    def interrupt(self, error=TimedOut):
        interrupt_thread(self._thread.ident, error)
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self


async def wait(notes):
    notes.append("began")
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        notes.append("canceled")
        raise
    finally:
        await asyncio.sleep(0.01)
        notes.append("cleaned up")


async def wait_beside_who_computes(notes):
    """A task that is in the midst of something nearly always."""

    async def compute():
        while True:
            until = time.monotonic() + 0.02
            while time.monotonic() < until:
                pass
            await asyncio.sleep(0)

    busy = asyncio.create_task(compute())
    try:
        await wait(notes)
    finally:
        notes.append(busy.done())


async def wait_within(notes):
    await asyncio.wait_for(wait(notes), 60)


async def return_all_the_same(notes):
    try:
        await wait(notes)
    except asyncio.CancelledError:
        return "returned"


async def raise_in_the_loop(notes):
    def fail():
        raise KeyboardInterrupt

    asyncio.get_running_loop().call_soon(fail)
    await wait(notes)


async def cancel_itself(notes):
    notes.append("began")
    raise asyncio.CancelledError


ENDED = ["began", "canceled", "cleaned up"]


@pytest.mark.parametrize("function", [wait, wait_within])
def test_coroutine_that_is_interrupted_ends_by_that_error_in_order(function):
    run = Run(function).interrupt()
    assert type(run.error) is TimedOut
    assert run.notes == ENDED


def test_interruption_comes_to_the_coroutine_and_to_no_other_task_of_its_loop():
    for _ in range(10):
        run = Run(wait_beside_who_computes).interrupt()
        assert type(run.error) is TimedOut
        assert run.notes == [*ENDED, False]


def test_coroutine_that_returns_though_it_was_interrupted_has_returned():
    run = Run(return_all_the_same).interrupt()
    assert (run.error, run.value, run.notes) == (None, "returned", ENDED)


def test_coroutine_ends_in_order_where_its_loop_fails():
    notes = []
    with pytest.raises(KeyboardInterrupt):
        run_coroutine(raise_in_the_loop(notes))
    assert notes == ENDED


def test_cancellation_of_its_own_is_raised():
    with pytest.raises(asyncio.CancelledError):
        run_coroutine(cancel_itself([]))


def test_what_a_coroutine_leaves_in_its_loop_is_canceled():
    async def leave_behind():
        asyncio.get_running_loop().create_task(wait(notes))
        await asyncio.sleep(0.01)
        return "returned"

    notes = []
    assert run_coroutine(leave_behind()) == "returned"
    assert notes == ENDED


def test_interruption_after_the_end_of_a_coroutine_comes_in_its_thread():
    def work():
        try:
            run_coroutine(cancel_itself(notes))
        except asyncio.CancelledError:
            notes.append("ended")
        try:
            while True:
                time.sleep(0.001)
        except TimedOut:
            notes.append("interrupted")

    notes = []
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    wait_until(lambda: "ended" in notes)
    interrupt_thread(thread.ident, TimedOut)
    thread.join(10)
    assert notes == ["began", "ended", "interrupted"]
