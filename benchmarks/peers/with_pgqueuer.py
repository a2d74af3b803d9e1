"""Tasks of pgqueuer, run as its documentation begins: asyncpg, uvloop, and async functions."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import psycopg
import uvloop
from pgqueuer import PgQueuer, run
from pgqueuer.db import AsyncpgDriver, SyncPsycopgDriver
from pgqueuer.models import Job
from pgqueuer.queries import SyncQueries

from benchmarks.moments import tell


@asynccontextmanager
async def make_worker() -> AsyncIterator[PgQueuer]:
    worker = PgQueuer(AsyncpgDriver(await asyncpg.connect()))
    for number in range(int(os.environ["BENCHMARK_QUEUES"])):
        worker.entrypoint(f"queue{number}")(note)
    yield worker


async def note(job: Job) -> None:
    tell()


def enqueuer() -> Callable[[int], Any]:
    queries = SyncQueries(SyncPsycopgDriver(psycopg.connect(autocommit=True)))
    return lambda number: queries.enqueue(f"queue{number}", None)


if __name__ == "__main__":  # what `pgq run` does, which can not be started with the newest Typer
    uvloop.run(run(make_worker))
