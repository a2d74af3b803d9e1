"""One process of a benchmark: a table of tasks, and loops that work on it. Started by `benchmarks.compare`.

    python benchmarks/worker.py '{"ENGINE": "django.db.backends.sqlite3", "NAME": "x"}' '{}'

The arguments are the database and the setting MODELQUEUE.

Reads commands from its standard input, a line each, and answers each with a line of JSON. Uses only what
modelqueue 2.2.1 has too, so that the interpreter it is started with decides which release is measured.
"""

import json
import sys
import time
from itertools import islice

import django
from django.conf import settings

settings.configure(
    DATABASES={"default": json.loads(sys.argv[1])}, MODELQUEUE=json.loads(sys.argv[2]), USE_TZ=True
)
django.setup()

from django.db import connection, models  # noqa: E402

import modelqueue  # noqa: E402


class Task(models.Model):
    data = models.TextField()
    status = modelqueue.StatusField(db_index=True, default=modelqueue.Status.waiting)

    class Meta:
        app_label = "benchmarks"


def nothing(task):
    pass


def change(task):
    task.data = "done"


def run_by_release(action):
    while True:
        try:
            task = modelqueue.run(Task.objects.all(), "status", action)
        except Exception:
            yield "error"  # 2.2.1: what the database refused, for example a deadlock
            continue
        if task is None:
            return
        yield "task"


# The two statements that a task takes at least, without Django and without modelqueue.

CLAIM = """
WITH picked AS MATERIALIZED (
    SELECT id, status FROM benchmarks_task WHERE status >= %s AND status <= %s
    ORDER BY status, id LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE benchmarks_task AS task SET status = %s + picked.status %% 10 FROM picked
WHERE task.id = picked.id AND task.status = picked.status RETURNING task.id, task.data, task.status
"""
OUTCOME = "UPDATE benchmarks_task SET status = %s WHERE id = %s AND status = %s"


def run_raw():
    import psycopg

    # Fixed numbers, as what it costs to make them is not the database's.
    waiting, working, finished = 2 * 10**18, 3 * 10**18, 4 * 10**18
    database = connection.settings_dict
    with psycopg.connect(
        host=database["HOST"], dbname=database["NAME"], user=database["USER"], autocommit=True
    ) as session:
        number = 0
        while row := session.execute(CLAIM, (waiting, working - 1, working + number * 10)).fetchone():
            number += 1
            session.execute(OUTCOME, (finished + number * 10 + 1, row[0], row[2]))
            yield "task"


LOOPS = {
    "nothing": lambda: run_by_release(nothing),
    "change": lambda: run_by_release(change),
    "raw": run_raw,
}


# Commands

running = []


def create(history):
    """Make the table, with tasks that were finished long ago."""
    with connection.schema_editor() as editor:
        editor.create_model(Task)
    status = int(modelqueue.Status.finished(10**16, 1))
    numbers = {
        "postgresql": "SELECT generate_series(1, %s) AS n",
        "sqlite": "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s LIMIT %s) SELECT n FROM s",
    }[connection.vendor]
    with connection.cursor() as cursor:
        if history:
            cursor.execute(
                "INSERT INTO benchmarks_task (data, status) "
                f"SELECT 'history', {status} + 10 * n FROM ({numbers}) AS numbers",
                [history],
            )
    return {}


def drop():
    with connection.schema_editor() as editor:
        editor.delete_model(Task)
    return {}


def fill(count):
    """Forget the tasks of the last round; add many at once."""
    Task.objects.exclude(data="history").delete()
    Task.objects.bulk_create([Task(data="new") for _ in range(count)], 5000)
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("VACUUM ANALYZE benchmarks_task")
            cursor.execute("CHECKPOINT")
        else:
            cursor.execute("ANALYZE")
    return {}


def warm(loop, count):
    """Run some tasks, as a process does many things only once."""
    running.append(LOOPS[loop]())
    return {"tasks": sum(1 for _ in islice(running[-1], count))}


def enqueue(count):
    """Add rows as a project does, one at a time."""
    started = time.perf_counter()
    for _ in range(count):
        Task.objects.create(data="new")
    return {"seconds": time.perf_counter() - started}


def drain():
    """Go on until no task is due."""
    ended = {"task": 0, "error": 0}
    for what in running.pop():
        ended[what] += 1
    return ended


def statements(loop, count):
    """Count the statements of some tasks. (What begins and ends a transaction is not one to Django.)"""
    sent = []

    def note(execute, sql, *arguments):
        sent.append(sql)
        return execute(sql, *arguments)

    with connection.execute_wrapper(note):
        tasks = sum(1 for _ in islice(LOOPS[loop](), count))
    return {"statements": len(sent) / tasks}


def wal():
    """How much PostgreSQL has written into its log so far."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")
        return {"bytes": int(cursor.fetchone()[0])}


COMMANDS = {
    command.__name__: command for command in (create, drop, fill, warm, enqueue, drain, statements, wal)
}

if __name__ == "__main__":
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(COMMANDS[name](*arguments)), flush=True)
