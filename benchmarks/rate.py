"""Tasks per second of one process: enqueue, run, run with a change of another field. Prints JSON.

Uses only what modelqueue 2.2.1 has too, so that the interpreter it is started with decides which release it
measures. `benchmarks/compare.py` starts it.

    python benchmarks/rate.py '{"ENGINE": "django.db.backends.sqlite3", "NAME": "x"}' 1000
"""

import json
import sys
import time

import django
from django.conf import settings

settings.configure(DATABASES={"default": json.loads(sys.argv[1])}, USE_TZ=True)
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


def rate(count, step):
    started = time.perf_counter()
    for _ in range(count):
        step()
    return count / (time.perf_counter() - started)


def run(action):
    if modelqueue.run(Task.objects.all(), "status", action) is None:
        raise RuntimeError("the queue was empty before the end")


def main(count):
    with connection.schema_editor() as editor:
        editor.create_model(Task)
    rates = {}
    for name, action in [("run", nothing), ("run and change a field", change)]:
        rates["enqueue"] = rate(count, lambda: Task.objects.create(data="new"))
        rates[name] = rate(count, lambda action=action: run(action))
    finished = Task.objects.filter(**modelqueue.Status.filter("status", modelqueue.State.finished)).count()
    if finished != 2 * count:
        raise RuntimeError(f"{finished} of {2 * count} tasks are finished")
    with connection.schema_editor() as editor:
        editor.delete_model(Task)
    print(json.dumps(rates))


if __name__ == "__main__":
    main(int(sys.argv[2]))
