"""The two statements that tasks take at least, by psycopg alone: the ceiling of a queue in a database.

They claim and finish as a worker does: row by row under its lease, with two commits. Nothing is built of a
row, nothing is run, and the numbers are made without a clock.
"""

from __future__ import annotations

import os

import psycopg

from benchmarks.contenders.worker import create, enqueue, enqueue_singly

__all__ = ["create", "enqueue", "enqueue_singly", "work"]

_WAITING, _WORKING, _FINISHED = 2 * 10**18, 3 * 10**18, 4 * 10**18

_CLAIM = """
WITH picked AS MATERIALIZED (
    SELECT id, status FROM project_task WHERE status >= %s AND status < %s
    ORDER BY status, id LIMIT %s FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE project_task AS task SET status = %s + picked.status %% 10 FROM picked
WHERE task.id = picked.id AND task.status = picked.status RETURNING task.id, task.data, task.status
"""
_FINISH = """
UPDATE project_task AS task SET status = ended.status
FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[]) AS ended (id, lease, status)
WHERE task.id = ended.id AND task.status = ended.lease
"""


def work() -> None:
    batch = int(os.environ["BENCHMARK_BATCH"])
    number = 0
    with psycopg.connect(autocommit=True) as session:
        while True:
            number += 10
            values = _WAITING, _WORKING, batch, _WORKING + number
            rows = session.execute(_CLAIM, values).fetchall()
            if not rows:
                return
            ids, _data, leases = zip(*rows, strict=True)
            finished = [_FINISHED + number + lease % 10 + 1 for lease in leases]
            session.execute(_FINISH, (list(ids), list(leases), finished))
