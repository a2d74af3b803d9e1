"""Who takes part, with what settings. What each does stands in `benchmarks.contenders`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import django

__all__ = [
    "CONTENDERS",
    "DJANGO_TASKS",
    "OURS",
    "OUR_TASKS",
    "PGQUEUER",
    "PROCRASTINATE",
    "RAW",
    "Contender",
]


@dataclass(frozen=True, eq=False)
class Contender:
    name: str
    """As it stands in the tables."""
    module: str
    store: str
    requirements: tuple[str, ...] = ()
    """Its packages; none: it runs with this checkout."""
    settings: str = ""
    """What was chosen for it, in words."""
    environment: Mapping[str, str] = field(default_factory=dict)
    table: str = ""
    """Where it claims (PostgreSQL)."""
    done: str = ""
    """Which rows are outcomes (PostgreSQL); else its actions tell when they begin."""
    left: str = ""
    """Which rows have no outcome yet (other databases), where it keeps its tasks in a table."""
    share: float = 1.0
    """A slow one gets this part of the tasks, so that its turns take seconds, too."""
    adds_many: bool = True
    """It can add many tasks at once; else it adds them one at a time."""
    most_processes: int = 4
    has_processes: bool = False
    """One command starts as many as it is asked for."""
    ends: bool = True
    """It stops when nothing is left."""
    python: tuple[int, int] = (3, 10)
    """The oldest version that it takes."""
    quickest: Mapping[str, str] = field(default_factory=dict)
    """With which a task of a killed worker runs again as soon as it can, if it has such settings."""
    quickest_in_words: str = ""
    sessions: int = 0
    """In how many each of its processes commits (PostgreSQL); 0: that depends on how many tasks it runs."""

    @property
    def is_slow(self) -> bool:
        return self.share < 0.5


_TASK = {"table": "project_task", "done": "project_task WHERE status >= 4000000000000000000"}
_LEFT = "project_task WHERE status < 4000000000000000000"
_OLD = "modelqueue==2.2.1", "pytz", f"Django=={django.__version__}"
_LOOP = {"BENCHMARK_APPS": "benchmarks.project"}  # release 2.2.1 is no app

OURS = Contender(
    "ModelQueue",
    "worker",
    "postgres",
    settings="defaults",
    **_TASK,
    has_processes=True,
    sessions=2,  # one claims, one writes outcomes
)
RAW = Contender(
    "raw SQL, 100 rows at a time",
    "raw",
    "postgres",
    (),
    "psycopg",
    {"BENCHMARK_BATCH": "100"},
    **_TASK,
    sessions=1,
)
PGQUEUER = Contender(
    "pgqueuer",
    "with_pgqueuer",
    "postgres",
    ("pgqueuer", "asyncpg", "uvloop", "psycopg[binary]"),
    "batches of 1,000, asyncpg, uvloop",
    {"BENCHMARK_BATCH": "1000"},
    table="pgqueuer",
    done="pgqueuer_log WHERE status = 'successful'",
    sessions=1,
)
PROCRASTINATE = Contender(
    "procrastinate",
    "with_procrastinate",
    "postgres",
    ("procrastinate", "psycopg[binary,pool]"),
    "concurrency 20",
    table="procrastinate_jobs",
    done="procrastinate_jobs WHERE status = 'succeeded'",
    share=0.1,
    quickest={"BENCHMARK_RECOVERS": "1"},
    quickest_in_words="its recipe of a periodic task, every 5 s, for workers without a heartbeat for 5 s",
)
_TASKS = "modelqueue_tasks_queuedtask"
OUR_TASKS = Contender(
    "ModelQueue",
    "with_django_tasks",
    "postgres",
    (),
    "defaults",
    table=_TASKS,
    done=f"{_TASKS} WHERE status >= 4000000000000000000",
    has_processes=True,
    quickest={"BENCHMARK_LEASE": "3"},
    quickest_in_words="lease=3",
)
DJANGO_TASKS_DB = Contender(
    "django-tasks-db",
    "with_django_tasks_db",
    "postgres",
    ("django-tasks-db[compat]", "psycopg[binary]"),
    "CONN_MAX_AGE=None",
    table="django_tasks_database_dbtaskresult",
    done="django_tasks_database_dbtaskresult WHERE status = 'SUCCESSFUL'",
    adds_many=False,
    share=0.05,
    sessions=1,
)
DJANGO_OX = Contender(
    "django-ox",
    "with_django_ox",
    "postgres",
    (
        "django-ox" if django.VERSION >= (6, 0) else "django-ox[backport]",
        f"Django=={django.__version__}",
        "psycopg[binary]",
    ),
    "CONN_MAX_AGE=None, 4 threads",
    table="django_ox_oxtask",
    done="django_ox_oxtask WHERE status = 'SUCCESSFUL'",
    python=(3, 12),
    share=0.05,
    quickest={"BENCHMARK_LEASE": "3"},
    quickest_in_words="LOCK_TIMEOUT=3",
)

#: Those that run Django tasks, and one that could.
DJANGO_TASKS = [OUR_TASKS, DJANGO_TASKS_DB, DJANGO_OX, PROCRASTINATE]

CONTENDERS = [
    OURS,
    RAW,
    PGQUEUER,
    Contender(
        "raw SQL, one row at a time",
        "raw",
        "postgres",
        (),
        "psycopg",
        {"BENCHMARK_BATCH": "1"},
        **_TASK,
        share=0.25,
        sessions=1,
    ),
    Contender(
        "ModelQueue, loops of `run`",
        "loop",
        "postgres",
        (),
        "one task at a time",
        _LOOP,
        **_TASK,
        share=0.15,
        sessions=1,
    ),
    PROCRASTINATE,
    DJANGO_TASKS_DB,
    Contender(
        "modelqueue 2.2.1",
        "loop",
        "postgres",
        (*_OLD, "psycopg[binary]"),
        "loops of `run`",
        _LOOP,
        **_TASK,
        share=0.05,
        sessions=1,
    ),
    Contender("ModelQueue", "worker", "mariadb", (), "defaults", left=_LEFT, has_processes=True, share=0.5),
    Contender(
        "modelqueue 2.2.1",
        "loop",
        "mariadb",
        (*_OLD, "mysqlclient"),
        "loops of `run`",
        _LOOP,
        left=_LEFT,
        share=0.03,
    ),
    Contender("ModelQueue", "worker", "sqlite", (), "defaults", left=_LEFT, has_processes=True, share=0.5),
    Contender(
        "huey",
        "with_huey",
        "sqlite",
        ("huey",),
        "processes, fsync=False",
        {"BENCHMARK_FSYNC": "0"},
        has_processes=True,
        ends=False,
        adds_many=False,
        share=0.5,
    ),
    Contender(
        "huey",
        "with_huey",
        "sqlite",
        ("huey",),
        "processes, fsync=True",
        {"BENCHMARK_FSYNC": "1"},
        has_processes=True,
        ends=False,
        adds_many=False,
        share=0.2,
    ),
    Contender(
        "modelqueue 2.2.1",
        "loop",
        "sqlite",
        _OLD,
        "loops of `run`",
        _LOOP,
        left=_LEFT,
        share=0.05,
        most_processes=1,  # of a second one it gets "database is locked"
    ),
    Contender(
        "huey",
        "with_huey",
        "redis",
        ("huey", "redis"),
        "processes",
        has_processes=True,
        ends=False,
        adds_many=False,
        share=0.5,
    ),
    Contender(
        "dramatiq",
        "with_dramatiq",
        "redis",
        ("dramatiq[redis]",),
        "8 threads",
        has_processes=True,
        ends=False,
        adds_many=False,
        share=0.5,
    ),
    Contender(
        "Celery",
        "with_celery",
        "redis",
        ("celery[redis]",),
        "prefork, results ignored",
        has_processes=True,
        ends=False,
        adds_many=False,
        share=0.2,
    ),
]
