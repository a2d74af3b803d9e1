"""pgqueuer as its documentation begins: asyncpg, uvloop, and async functions."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import psycopg
import uvloop
from pgqueuer import PgQueuer, run
from pgqueuer.db import AsyncpgDriver, SyncPsycopgDriver
from pgqueuer.models import Job
from pgqueuer.queries import SyncQueries

from benchmarks.contenders import feed as feeding
from benchmarks.contenders.with_pgqueuer import create
from benchmarks.moments import tell

__all__ = ["create", "feed", "work"]


def feed() -> None:
    queries = SyncQueries(SyncPsycopgDriver(psycopg.connect(autocommit=True)))
    feeding.feed(lambda number: queries.enqueue(f"queue{number}", None))


def work() -> None:
    uvloop.run(run(_make_worker))  # what `pgq run` does, which can not be started with the newest Typer


@asynccontextmanager
async def _make_worker() -> AsyncIterator[PgQueuer]:
    worker = PgQueuer(AsyncpgDriver(await asyncpg.connect()))
    for number in range(int(os.environ["BENCHMARK_QUEUES"])):
        worker.entrypoint(f"queue{number}")(_note)
    yield worker


async def _note(job: Job) -> None:
    tell()
