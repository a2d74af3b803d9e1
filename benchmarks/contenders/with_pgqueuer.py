"""pgqueuer: asyncpg, uvloop, and an async function."""

from __future__ import annotations

import asyncio
import os

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries
from pgqueuer.types import QueueExecutionMode

from benchmarks.actions import async_action

#: Rows of one INSERT.
_ROWS = 5000


def create() -> None:
    asyncio.run(_create())


async def _create() -> None:
    connection = await asyncpg.connect()
    queries = Queries(AsyncpgDriver(connection))
    if await connection.fetchval("SELECT to_regclass('pgqueuer')"):
        await queries.uninstall()
    await queries.install()
    await connection.close()


def enqueue(count: int) -> None:
    asyncio.run(_enqueue(count))


async def _enqueue(count: int) -> None:
    connection = await asyncpg.connect()
    queries = Queries(AsyncpgDriver(connection))
    for first in range(0, count, _ROWS):
        rows = min(_ROWS, count - first)
        await queries.enqueue(["task"] * rows, [None] * rows, [0] * rows)
    await connection.close()


def enqueue_singly(count: int) -> None:
    asyncio.run(_enqueue_singly(count))


async def _enqueue_singly(count: int) -> None:
    connection = await asyncpg.connect()
    queries = Queries(AsyncpgDriver(connection))
    for _ in range(count):
        await queries.enqueue("task", None)
    await connection.close()


def work() -> None:
    uvloop.run(_work())


async def _work() -> None:
    act = async_action()
    worker = PgQueuer(AsyncpgDriver(await asyncpg.connect()))

    @worker.entrypoint("task")
    async def task(job: Job) -> None:
        await act(job.id)

    batch, slots = int(os.environ["BENCHMARK_BATCH"]), int(os.environ["BENCHMARK_SLOTS"])
    await worker.qm.run(
        batch_size=min(batch, slots // 2) if slots else batch,  # more than half of them is refused
        max_concurrent_tasks=slots or None,
        mode=QueueExecutionMode.drain,
    )
