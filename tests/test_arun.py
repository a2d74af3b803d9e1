"""`arun`: the same as `run` from asynchronous code, side by side, and with cancellation."""

import asyncio
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.db import OperationalError, connection, connections, transaction

from modelqueue import Abort, Cancel, Retry, State, Status, arun, execution, signals, threads, verbs
from modelqueue.attempts import Attempt
from tests.actions import LONG_AGO, heard, raising, row, stored, succeed, unexpected, write_down
from tests.processes import wait_until
from tests.testapp.models import Ledger, Paper, StampedPaper, Task

pytestmark = pytest.mark.django_db(transaction=True)


def awaited(action):
    """The same action as an async function; its queries go through a thread."""

    @functools.wraps(action)
    async def act(task):
        await sync_to_async(action)(task)

    return act


either = pytest.mark.parametrize("kind", [lambda action: action, awaited], ids=["sync", "async"])


def arun_once(rows, action, **options):
    return async_to_sync(arun)(rows, "status", action, **options)


def on_a_loop(coroutine):
    """Run it as an asynchronous program does, with no synchronous caller above whose thread has a say."""

    async def main():
        try:
            return await coroutine
        finally:
            await sync_to_async(connections.close_all)()

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def _no_connection_stays_open():
    """Each thread closes the connection that it has opened."""
    opened, closed = [], []
    cls = type(connections["default"])
    connect, close = cls.connect, cls.close

    def connecting(self):
        opened.append(self)
        connect(self)

    def closing(self):
        closed.append(self)
        close(self)

    cls.connect, cls.close = connecting, closing
    yield
    cls.connect, cls.close = connect, close
    kept = set(connections.all(initialized_only=True))
    assert set(opened) - set(closed) <= kept


# Outcomes


@either
@pytest.mark.parametrize("model", [Paper, StampedPaper])
@pytest.mark.parametrize(
    ("error", "reraised", "charged", "state"),
    [
        (None, False, True, State.finished),
        (Retry(), False, False, State.waiting),
        (Cancel(), False, True, State.canceled),
        (Abort(), False, True, State.waiting),
        (ValueError("x"), True, True, State.waiting),
        (asyncio.CancelledError(), True, False, State.waiting),
    ],
    ids=lambda value: type(value).__name__,
)
def test_outcome_is_recorded_as_by_run(kind, model, error, reraised, charged, state):
    task = model.objects.create(status=Status.waiting(LONG_AGO))

    def change_and_end(task):
        task.title = "changed"
        if error is not None:
            raise error

    action = kind(change_and_end)
    if reraised:
        with pytest.raises(type(error)) as caught:
            arun_once(model.objects, action)
        assert caught.value is error or kind is not awaited
    else:
        returned = arun_once(model.objects, action)
        assert returned == task
        assert returned.status == stored(task)
    assert (stored(task).state, stored(task).attempts) == (state, charged)
    assert row(task).title == "changed"


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(2)], ids=lambda error: type(error).__name__
)
def test_end_of_the_program_is_a_failed_attempt(error):
    task = Task.objects.create()

    async def end(task):
        raise error

    with pytest.raises(type(error)):
        asyncio.run(arun(Task.objects.all(), "status", end))
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    close_shared_connection()


def test_nothing_due_returns_none():
    assert arun_once(Task.objects, unexpected) is None


@either
def test_error_is_noted_and_told(kind):
    paper = Paper.objects.create()
    with heard() as events, pytest.raises(ValueError, match="torn"):
        arun_once(Paper.objects, kind(raising(ValueError("torn"))), error_field="error")
    assert row(paper).error.startswith("builtins.ValueError: torn")
    assert [name for name, _ in events] == ["task_claimed", "task_finished"]


@either
def test_task_that_can_not_be_loaded_is_a_failed_attempt(kind, monkeypatch):
    task = Task.objects.create()

    def from_db(*arguments):
        raise ValueError("rotten")

    monkeypatch.setattr(Task, "from_db", from_db)
    with pytest.raises(ValueError, match="rotten"):
        arun_once(Task.objects, kind(unexpected))
    monkeypatch.undo()
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


def test_error_of_a_listener_to_the_claim_is_a_failed_attempt():
    task = Task.objects.create()

    def stop(**arguments):
        raise KeyboardInterrupt

    signals.task_claimed.connect(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            arun_once(Task.objects, unexpected)
    finally:
        signals.task_claimed.disconnect(stop)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


@either
def test_deleted_task_stays_deleted(kind):
    task = Task.objects.create()
    with heard("lease_lost") as events:
        arun_once(Task.objects, kind(lambda task: Task.objects.all().delete()))
    assert stored(task) is None
    assert len(events) == 1


@either
def test_transaction_that_the_action_left_open_is_rolled_back(kind):
    task = Task.objects.create()

    def begin_and_write(task):
        connection.set_autocommit(False)
        write_down(task)

    with pytest.raises(transaction.TransactionManagementError, match="in the middle of a transaction"):
        on_a_loop(arun(Task.objects, "status", kind(begin_and_write)))
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)
    assert not Ledger.objects.exists()


# Arguments


@pytest.mark.vendor("sqlite")
def test_outcome_of_an_action_that_has_failed_in_the_midst_of_a_query_is_recorded():
    """The query locks others out, and with them the thread that records it."""

    def act(task):
        rows = Task.objects.iterator(chunk_size=1)
        next(rows)
        raise ValueError(task)

    tasks = Task.objects.bulk_create([Task() for _ in range(50)])
    with pytest.raises(ValueError, match="Task object"):
        on_a_loop(arun(Task.objects, "status", act))
    assert stored(tasks[0]).attempts == 1


def test_async_action_can_not_be_atomic():
    Task.objects.create()
    with pytest.raises(TypeError, match=r"atomic=True is not for the action .*async function"):
        arun_once(Task.objects, awaited(unexpected), atomic=True)


@pytest.mark.parametrize(
    ("action", "options", "message"),
    [
        (None, {}, "The action is a callable"),
        (lambda task: (yield), {}, "generator function"),
        (succeed, {"atomic": 1}, "atomic is True or False"),
        (succeed, {"retry": 9}, "retry=9 is out of range"),
        (succeed, {"error_field": "nothing"}, "has no field 'nothing'"),
    ],
)
def test_wrong_argument_is_refused_before_a_claim(action, options, message):
    task = Task.objects.create()
    with pytest.raises((TypeError, ValueError), match=message):
        arun_once(Task.objects, action, **options)
    assert stored(task) == task.status


@pytest.mark.parametrize("action", [functools.partial(awaited(write_down)), sync_to_async(write_down)])
def test_every_kind_of_async_action_is_awaited(action):
    task = Task.objects.create()
    assert arun_once(Task.objects, action) == task
    assert Ledger.objects.count() == 1


# Side by side


def run_ten_that_meet(kind, run_main=on_a_loop, **options):
    """Ten actions that end only when all of them are inside their synchronous part at once."""
    Task.objects.bulk_create([Task() for _ in range(10)])
    all_there = threading.Barrier(10)

    def meet(task):
        all_there.wait(60)

    async def main():
        return await asyncio.gather(*(arun(Task.objects, "status", kind(meet), **options) for _ in range(10)))

    assert len({task.pk for task in run_main(main())}) == 10
    assert Task.objects.filter(status__state="finished").count() == 10


@either
def test_actions_do_not_wait_for_one_another(kind):
    run_ten_that_meet(kind)


@pytest.mark.skipif(not threads._CONTEXT_TAKES_EXECUTOR, reason="asgiref lacks contexts with an executor")
def test_async_actions_do_not_wait_for_one_another_below_a_synchronous_caller():
    async def wait_for(coroutine):
        return await coroutine

    run_ten_that_meet(awaited, run_main=async_to_sync(wait_for))


@pytest.mark.db_feature("has_select_for_update")  # else an atomic action locks the database
def test_atomic_actions_do_not_wait_for_one_another():
    run_ten_that_meet(lambda action: action, atomic=True)


def test_atomic_actions_all_run_where_each_locks_the_database():
    Task.objects.bulk_create([Task() for _ in range(5)])

    async def main():
        return await asyncio.gather(
            *(arun(Task.objects, "status", write_down, atomic=True) for _ in range(5))
        )

    assert {task.pk for task in async_to_sync(main)()} == set(Task.objects.values_list("pk", flat=True))
    assert Ledger.objects.values("task").distinct().count() == Ledger.objects.count() == 5


def test_atomic_action_that_fails_is_undone_and_told_once():
    Task.objects.create()

    def act(task):
        write_down(task)
        raise ValueError("no")

    with heard() as events, pytest.raises(ValueError, match="no"):
        async_to_sync(arun)(Task.objects, "status", act, atomic=True)
    assert not Ledger.objects.exists()
    assert [name for name, _ in events] == ["task_claimed", "task_finished"]


def test_event_loop_goes_on_during_a_claim(monkeypatch):
    Task.objects.create()
    claim = verbs.claim
    ticks = []

    async def tick():
        while True:
            ticks.append(1)
            await asyncio.sleep(0)

    def slow(source):
        seen = len(ticks)
        wait_until(lambda: len(ticks) > seen + 10)
        return claim(source)

    monkeypatch.setattr(verbs, "claim", slow)

    async def main():
        ticking = asyncio.create_task(tick())
        await arun(Task.objects, "status", awaited(succeed))
        ticking.cancel()

    async_to_sync(main)()
    assert Task.objects.get().status.state == State.finished


def test_action_without_queries_opens_no_connection(monkeypatch):
    Task.objects.create()
    seen = []

    async def act(task):
        seen.append(threading.active_count())

    threads = threading.active_count()
    opened = []
    connect = type(connections["default"]).connect
    monkeypatch.setattr(
        type(connections["default"]), "connect", lambda self: (opened.append(self), connect(self))
    )
    arun_once(Task.objects, act)
    arun_once(Task.objects, succeed)
    assert opened == []
    wait_until(lambda: threading.active_count() <= threads)  # one that was there may have ended


def test_action_inside_a_request_has_its_own_thread_if_asgiref_can():
    Task.objects.create()

    async def main():
        async with ThreadSensitiveContext():
            request = await sync_to_async(threading.get_ident)()

            async def act(task):
                return await sync_to_async(lambda: seen.append(threading.get_ident()))()

            seen = [request]
            await arun(Task.objects, "status", act)
            await sync_to_async(connections.close_all)()
        return seen

    request, action = async_to_sync(main)()
    assert (request != action) == threads._CONTEXT_TAKES_EXECUTOR


# Inside a transaction


@pytest.mark.django_db
@either
def test_inside_a_transaction_the_action_sees_what_is_not_committed(kind):
    """As in the test of a user, whose TestCase is a transaction."""
    task = Task.objects.create(data="uncommitted")

    def act(task):
        assert connection.in_atomic_block
        Task.objects.filter(pk=task.pk).update(data="seen")

    with transaction.atomic():
        assert arun_once(Task.objects, kind(act)) == task
        assert (row(task).data, stored(task).state) == ("seen", State.finished)


@pytest.mark.parametrize("atomic", [False, True])
def test_error_of_the_database_in_a_savepoint_leaves_the_transaction_usable(atomic):
    task = Task.objects.create()

    def act(task):
        with connection.cursor() as cursor:
            cursor.execute("SELECT * FROM nowhere")

    with transaction.atomic():
        with pytest.raises(Exception, match="nowhere"):
            arun_once(Task.objects, act, atomic=atomic)
        assert stored(task).attempts == 1


# Cancellation


async def started(task, event):
    """Wait for an event of the loop while the task goes on."""
    await asyncio.wait([task, asyncio.ensure_future(event.wait())], return_when=asyncio.FIRST_COMPLETED)


def test_canceled_action_gives_its_task_back_uncharged():
    task = Task.objects.create(status=Status.waiting(LONG_AGO, 2))

    async def main():
        begun = asyncio.Event()

        async def act(task):
            begun.set()
            await asyncio.sleep(60)

        attempt = asyncio.ensure_future(arun(Task.objects, "status", act))
        await started(attempt, begun)
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt

    with heard("task_finished") as events:
        async_to_sync(main)()
    assert stored(task) == task.status
    assert [arguments["outcome"] for _, arguments in events] == ["release"]


def test_timeout_of_the_caller_is_a_cancellation():
    task = Task.objects.create(status=Status.waiting(LONG_AGO))

    async def act(task):
        await asyncio.sleep(60)

    async def main():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(arun(Task.objects, "status", act), 0.5)

    async_to_sync(main)()
    assert stored(task) == task.status


def test_action_that_ignores_its_cancellation_is_finished():
    task = Task.objects.create()

    async def main():
        begun = asyncio.Event()

        async def act(task):
            begun.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                task.data = "cleaned up"

        attempt = asyncio.ensure_future(arun(Task.objects, "status", act))
        await started(attempt, begun)
        attempt.cancel()
        return await attempt

    assert async_to_sync(main)() == task
    assert (stored(task).state, row(task).data) == (State.finished, "cleaned up")


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("error", [None, Retry(), ValueError("x")], ids=repr)
def test_synchronous_action_is_waited_for_and_recorded_before_the_cancellation_goes_on(error, atomic):
    task = Task.objects.create()
    go_on = threading.Event()

    async def main():
        begun, loop = asyncio.Event(), asyncio.get_running_loop()

        def act(task):
            loop.call_soon_threadsafe(begun.set)
            assert go_on.wait(60)
            if error is not None:
                raise error

        attempt = asyncio.ensure_future(arun(Task.objects, "status", act, atomic=atomic))
        await started(attempt, begun)
        for _ in range(3):
            attempt.cancel()
            await asyncio.sleep(0.01)
        assert not attempt.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await attempt

    async_to_sync(main)()
    assert stored(task).state == (State.waiting if error else State.finished)
    assert stored(task).attempts == (not isinstance(error, Retry))


def cancel_during(monkeypatch, owner, name, action, **options):
    """Cancel an attempt while it is in a method, in its thread; say whether it raised the cancellation."""
    method = getattr(owner, name)
    inside, go_on = threading.Event(), threading.Event()

    def paused(*arguments, **named):
        result = method(*arguments, **named)
        inside.set()
        assert go_on.wait(60)
        return result

    monkeypatch.setattr(owner, name, paused)

    async def main():
        attempt = asyncio.ensure_future(arun(Task.objects, "status", action, **options))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        for _ in range(3):
            attempt.cancel()
            await asyncio.sleep(0.001)
        go_on.set()
        try:
            await attempt
        except asyncio.CancelledError:
            return True
        return False

    return async_to_sync(main)()


@pytest.mark.parametrize("atomic", [False, True])
@either
def test_task_that_was_claimed_for_a_canceled_caller_is_given_back(kind, atomic, monkeypatch):
    task = Task.objects.create(status=Status.waiting(LONG_AGO, 1))
    if atomic:
        kind = lambda action: action  # noqa: E731
    assert cancel_during(monkeypatch, verbs, "claim", kind(unexpected), atomic=atomic)
    assert stored(task) == task.status


def test_caller_that_was_canceled_while_nothing_was_due_is_told(monkeypatch):
    assert cancel_during(monkeypatch, verbs, "claim", unexpected)


@either
def test_outcome_is_recorded_although_the_caller_is_canceled_meanwhile(kind, monkeypatch):
    task = Task.objects.create()
    assert cancel_during(monkeypatch, Attempt, "write", kind(succeed))
    assert stored(task).state == State.finished


def test_cancellation_while_connections_are_closed_comes_after_the_outcome(monkeypatch):
    task = Task.objects.create()
    assert cancel_during(monkeypatch, threads, "_close_connections", write_down)
    assert stored(task).state == State.finished


def test_end_of_the_loop_gives_all_tasks_back():
    """`asyncio.run` cancels what is left when its main coroutine ends, by Ctrl-C for example."""
    tasks = [Task.objects.create(status=Status.waiting(LONG_AGO)) for _ in range(5)]

    async def main():
        begun = []

        async def act(task):
            begun.append(task)
            await asyncio.sleep(60)

        left = [asyncio.ensure_future(arun(Task.objects, "status", act)) for _ in tasks]
        while len(begun) < len(left):
            await asyncio.sleep(0.001)

    asyncio.run(main())
    assert [stored(task) for task in tasks] == [task.status for task in tasks]
    close_shared_connection()


def test_coroutine_that_is_thrown_away_leaves_its_task_to_recovery():
    """Nobody can await anything any more, so there is nothing to record an outcome with."""
    task = Task.objects.create()

    loop = asyncio.new_event_loop()
    begun = []

    async def act(task):
        begun.append(task)
        await asyncio.sleep(60)

    async def until_begun():
        while not begun:
            await asyncio.sleep(0.001)

    coroutine = arun(Task.objects, "status", act)
    attempt = loop.create_task(coroutine)
    loop.run_until_complete(until_begun())
    with suppress(ValueError):  # its context variables are those of its task
        coroutine.close()
    assert stored(task).state == State.working
    attempt.cancel()
    loop.run_until_complete(asyncio.wait([attempt]))
    attempt.exception()
    loop.close()
    close_shared_connection()


@pytest.mark.parametrize("kind", [lambda action: action, awaited], ids=["sync", "async"])
def test_worker_whose_actions_all_fail_can_be_canceled(kind):
    """An error must not hide the cancellation from a loop that catches errors."""
    Task.objects.bulk_create([Task() for _ in range(3)])

    async def main():
        seen = []

        def fail(task):
            seen.append(task)
            raise ValueError

        async def work():
            while True:
                with suppress(ValueError):
                    await arun(Task.objects, "status", kind(fail), retry=None)

        worker = asyncio.ensure_future(work())
        while not seen:
            await asyncio.sleep(0.001)
        worker.cancel()
        await asyncio.wait([worker], timeout=60)
        return worker.cancelled()

    assert async_to_sync(main)()


def test_error_of_a_claim_does_not_hide_a_cancellation(monkeypatch):
    def fail(source):
        raise OperationalError("gone")

    monkeypatch.setattr(verbs, "claim", fail)
    inside, go_on = threading.Event(), threading.Event()
    next_claim = execution.next_claim

    def paused(*arguments):
        inside.set()
        assert go_on.wait(60)
        return next_claim(*arguments)

    monkeypatch.setattr(execution, "next_claim", paused)

    async def main():
        attempt = asyncio.ensure_future(arun(Task.objects, "status", unexpected))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        attempt.cancel()
        await asyncio.sleep(0.001)
        go_on.set()
        with pytest.raises(asyncio.CancelledError) as caught:
            await attempt
        # The task of Python 3.10 raises another one, in whose context it is.
        error = caught.value
        return error.__cause__ or error.__context__.__cause__

    assert str(async_to_sync(main)()) == "gone"


@pytest.mark.parametrize("atomic", [False, True])
def test_task_is_given_back_if_there_is_no_thread_for_its_action(atomic, monkeypatch):
    task = Task.objects.create(status=Status.waiting(LONG_AGO))

    class NoThreads(ThreadPoolExecutor):
        def submit(self, *arguments, **named):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "ThreadPoolExecutor", NoThreads)
    with heard("task_claimed", "task_finished") as events, pytest.raises(RuntimeError, match="new thread"):
        arun_once(Task.objects, unexpected, atomic=atomic)
    assert stored(task) == task.status
    assert [(name, arguments.get("outcome")) for name, arguments in events] == [
        ("task_claimed", None),
        ("task_finished", "release"),
    ]


@pytest.mark.parametrize("allowed", [1, 2])
def test_action_that_has_run_is_finished_although_no_thread_can_look_after_it(allowed, monkeypatch):
    """It is only what comes after it that is not done: the task must not run again."""
    task = Task.objects.create()

    class FewThreads(ThreadPoolExecutor):
        def submit(self, *arguments, **named):
            submitted.append(arguments)
            if len(submitted) > allowed:
                raise RuntimeError("can't start new thread")
            return super().submit(*arguments, **named)

    submitted = []
    monkeypatch.setattr(threads, "ThreadPoolExecutor", FewThreads)

    async def act(task):
        await sync_to_async(int)()

    assert on_a_loop(arun(Task.objects, "status", act)) == task
    assert (stored(task).state, stored(task).attempts) == (State.finished, 1)
    assert len(submitted) == 3


def test_lack_of_threads_inside_the_action_is_a_failure_of_the_action(monkeypatch):
    task = Task.objects.create()

    def act(task):
        raise threads.NotCalled("can't start new thread")

    with pytest.raises(RuntimeError, match="can't start new thread"):
        arun_once(Task.objects, act, atomic=True)
    assert (stored(task).state, stored(task).attempts) == (State.waiting, 1)


def test_transaction_of_another_coroutine_is_none_of_our_business():
    """It is open in the thread that all share; an action that ends meanwhile never was in there."""
    Task.objects.create()

    async def main():
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def act(task):
            inside.set()
            await go_on.wait()

        attempt = asyncio.ensure_future(arun(Task.objects, "status", act))
        await inside.wait()
        block = transaction.atomic()
        await sync_to_async(block.__enter__)()
        await sync_to_async(Ledger.objects.create)(task=1)
        go_on.set()
        await attempt
        await sync_to_async(block.__exit__)(None, None, None)

    on_a_loop(main())
    assert Ledger.objects.count() == 1
    assert Task.objects.get().status.state == State.finished


# The database


def test_lost_connection_during_an_async_action_costs_nothing(vendor):
    task = Task.objects.create()

    async def act(task):
        await sync_to_async(connections.close_all)()

    assert arun_once(Task.objects, act) == task
    assert stored(task).state == State.finished


def test_error_of_the_database_in_a_claim_is_raised(monkeypatch):
    task = Task.objects.create()

    def fail(source):
        raise OperationalError("gone")

    monkeypatch.setattr(verbs, "claim", fail)
    with pytest.raises(OperationalError, match="gone"):
        arun_once(Task.objects, unexpected)
    assert stored(task) == task.status


def close_shared_connection():
    """Close the connection of the thread that asgiref has for coroutines outside of `async_to_sync`."""
    asyncio.run(sync_to_async(connections.close_all)())


def in_thread_by(call, monkeypatch):
    """What `in_thread` returns where a function is called in this way; and how often it was called."""
    calls = []
    monkeypatch.setattr(threads, "sync_to_async", lambda work, **options: functools.partial(call, work))
    result, canceled = asyncio.run(threads.in_thread(lambda: calls.append(1) or "done"))
    return result, canceled, len(calls)


def test_function_is_called_once_though_it_was_handed_to_a_thread_twice(monkeypatch):
    async def twice(work):
        work()
        work()

    assert in_thread_by(twice, monkeypatch) == ("done", None, 1)


def test_system_that_ends_just_after_the_call_does_not_hide_what_it_returned(monkeypatch):
    async def call_and_fail(work):
        work()
        raise RuntimeError("cannot schedule new futures after shutdown")

    assert in_thread_by(call_and_fail, monkeypatch) == ("done", None, 1)
