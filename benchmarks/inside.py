"""What a measure does in a process of its own: it needs models, and Django is set up once in each process.

python -m benchmarks.inside bulk '[1000, 1]'

calls `inside(1000, 1)` of `benchmarks.measures.bulk` on an empty database of PostgreSQL, and says what that
has returned, as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from typing import Any

from benchmarks.environments import CHECKOUT, ROOT
from benchmarks.stores import Postgres

__all__ = ["ask", "made", "run_inside", "set_up"]


def run_inside(measure: str, store: Postgres, *values: float) -> Any:
    """Return what `inside` of this measure returns."""
    with store.empty_database() as environment:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.inside", measure, json.dumps(values)],
            env={
                **os.environ,
                **environment,
                "BENCHMARK_APPS": "benchmarks.shared",
                "DJANGO_SETTINGS_MODULE": "benchmarks.project.settings",
                "PYTHONPATH": CHECKOUT,
            },
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it does not say why"]
        raise RuntimeError(f"{measure} has failed: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(measure: str, values: str) -> None:
    set_up()
    from django.db import connection

    found = import_module(f"benchmarks.measures.{measure}").inside(*json.loads(values))
    connection.close()
    print(json.dumps(found))


def set_up() -> None:
    import django

    django.setup()


def made(name: str, *indexes: Any, **fields: Any) -> Any:
    """Return a model that has a text and these fields, with its table."""
    from django.db import connection, models

    meta = type("Meta", (), {"app_label": "benchmark", "indexes": list(indexes)})
    fields = {"data": models.TextField(), **fields}
    model: Any = type(name, (models.Model,), {"__module__": __name__, "Meta": meta, **fields})
    with connection.schema_editor() as editor:
        editor.create_model(model)
    return model


def ask(sql: str) -> Any:
    """Return the first value of the answer, if there is one."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone()[0] if cursor.description else None


if __name__ == "__main__":
    main(*sys.argv[1:])
