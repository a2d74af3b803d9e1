"""What the trigger of `AddNotifyTrigger` costs those who enqueue."""

from __future__ import annotations

import datetime as dt
import multiprocessing
import threading
import time
from collections.abc import Iterator

from benchmarks.bench import Bench
from benchmarks.figures import Table, ratio
from benchmarks.inside import ask, set_up

_WRITERS = 8
#: Seconds until a task for later is due.
_LATER = 3600.0

_RULE = (
    "Commits per second on PostgreSQL while {writers} processes insert one task per commit, as fast as they "
    "can, for {seconds:g} s: without the trigger, with it, and with it tasks that are due only in an hour. A "
    "session listens all the time. The kinds take turns."
)


def measure(bench: Bench) -> Iterator[Table]:
    seconds = bench.options.seconds
    found: dict[str, list[float]] = bench.inside("trigger", seconds, bench.options.further_rounds)
    without = next(iter(found.values()))
    rule = _RULE.format(writers=_WRITERS, seconds=seconds)
    header = f"{_WRITERS} writers", "commits/s", "to none"
    rows = [(kind, rates, ratio(rates, without)) for kind, rates in found.items()]
    yield Table("trigger", "What the trigger costs", rule, header, rows)


def inside(seconds: float, rounds: int) -> dict[str, list[float]]:
    """Return the commits per second, of each kind in each round."""
    from django.db import connection

    from benchmarks.shared.models import Task
    from modelqueue.engines import engine_for

    engine, table = engine_for("default"), Task._meta.db_table
    with connection.schema_editor() as editor:
        editor.create_model(Task)
    create = engine.create_notify_trigger(table, "status")
    drop = engine.drop_notify_trigger(table, "status")
    kinds = {
        "without the trigger": (drop, 0.0),
        "with it": (create, 0.0),
        "with it, tasks for later": (create, _LATER),
    }
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    stopped = threading.Event()
    listener = threading.Thread(target=_listen, args=[stopped], daemon=True)
    listener.start()
    with multiprocessing.get_context("spawn").Pool(_WRITERS, set_up) as pool:
        pool.map(write, [(0.1, 0.0)] * _WRITERS, chunksize=1)  # which connects them
        for _ in range(rounds):
            for kind, (statements, later) in kinds.items():
                for sql in [f"TRUNCATE {table}", *drop, *statements, "CHECKPOINT"]:
                    ask(sql)
                done = pool.map(write, [(seconds, later)] * _WRITERS, chunksize=1)
                rates[kind].append(sum(done) / seconds)
    if not listener.is_alive():
        raise RuntimeError("the session that is to listen has ended")
    stopped.set()
    listener.join()
    return rates


def _listen(stopped: threading.Event) -> None:
    from modelqueue.engines.notify import Ear

    ear = Ear("default")
    ear.listen()
    while not stopped.is_set():
        ear.wait(0.2)
    ear.close()


def write(how: tuple[float, float]) -> int:
    """Insert tasks for so many seconds, due so many seconds later; return how many."""
    from django.db import connection

    from benchmarks.shared.models import Task
    from modelqueue import Status, now

    seconds, later = how
    sql = f"INSERT INTO {Task._meta.db_table} (queue, status) VALUES (0, %s)"
    until, count = time.monotonic() + seconds, 0
    with connection.cursor() as cursor:
        while time.monotonic() < until:
            cursor.execute(sql, [int(Status.waiting(now() + dt.timedelta(seconds=later)))])
            count += 1
    return count
