"""procrastinate: psycopg, and an async function."""

from __future__ import annotations

import asyncio
import os

import psycopg
from procrastinate import App, JobContext, PsycopgConnector

from benchmarks.actions import async_action

#: Rows of one INSERT.
_ROWS = 1000
#: How many tasks one process runs at a time.
_CONCURRENCY = int(os.environ["BENCHMARK_SLOTS"]) or 20

#: Seconds without a heartbeat after which a worker is dead for its recipe.
_SILENCE = 5.0
_RECOVERS = bool(os.environ.get("BENCHMARK_RECOVERS"))
_LIVELY = {"update_heartbeat_interval": 1.0, "stalled_worker_timeout": _SILENCE} if _RECOVERS else {}

app = App(connector=PsycopgConnector(min_size=10, max_size=20))
act = async_action()


@app.task(name="task")
async def task(number: int) -> None:
    await act(number)


if _RECOVERS:

    @app.periodic(cron=f"* * * * * */{_SILENCE:.0f}")
    @app.task(queueing_lock="recover", pass_context=True)
    async def recover(context: JobContext, timestamp: int) -> None:
        """Do as its documentation says; without that nothing is ever recovered."""
        for job in await app.job_manager.get_stalled_jobs(seconds_since_heartbeat=_SILENCE):
            await app.job_manager.retry_job(job)


def create() -> None:
    with psycopg.connect(autocommit=True) as session:
        if session.execute("SELECT to_regclass('procrastinate_jobs')").fetchone()[0]:
            session.execute("TRUNCATE procrastinate_jobs, procrastinate_workers CASCADE")
            return
    with app.open():
        app.schema_manager.apply_schema()


def enqueue(count: int) -> None:
    with app.open():
        for first in range(0, count, _ROWS):
            last = min(first + _ROWS, count)
            task.batch_defer(*({"number": number} for number in range(first, last)))


def enqueue_singly(count: int) -> None:
    with app.open():
        for number in range(count):
            task.defer(number=number)


def work() -> None:
    asyncio.run(_work())


async def _work() -> None:
    async with app.open_async():
        await app.run_worker_async(
            wait=os.environ["BENCHMARK_DRAIN"] != "1",
            concurrency=_CONCURRENCY,
            install_signal_handlers=False,
            **_LIVELY,
        )
