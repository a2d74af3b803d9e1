"""Django's settings for the tests.

`MODELQUEUE_TEST_DATABASES` holds the databases as JSON: from `tests.suite`, which has started the server, or
from `tests.processes`, so that a process works on the databases of the test. Without it they are on SQLite.
"""

import json
import os
from importlib.util import find_spec

from tests import servers

DATABASES = json.loads(os.environ.get("MODELQUEUE_TEST_DATABASES", "null")) or servers.databases()

MODELQUEUE = {"ENGINE": os.environ.get("MODELQUEUE_TEST_ENGINE", "auto")}

# None, as its queues would be met by the tests of others. Those of the backend set others, as does a process
# that is started with this variable.
TASKS = json.loads(os.environ.get("MODELQUEUE_TEST_TASK_BACKENDS", "{}"))

PAGES = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
]
TASK_BACKEND = [
    "modelqueue.task_backend",
    # The task API for Django before 6.0, and what projects move in from, which is for Django from 5.2 on.
    *[name for name in ("django_tasks", "django_tasks_db") if find_spec(name)],
]
# A worker that a test starts has what it needs alone: it is ready in two thirds of the time.
IS_LEAN = bool(os.environ.get("MODELQUEUE_TEST_LEAN"))
INSTALLED_APPS = [
    *([] if IS_LEAN else PAGES),
    "modelqueue",
    *([] if IS_LEAN and not TASKS else TASK_BACKEND),
    "tests.testapp",
    *os.environ.get("MODELQUEUE_TEST_APPS", "").split(),
]
# Their tables are made without migrations, which is several times faster and tests the same.
MIGRATION_MODULES = dict.fromkeys(["admin", "auth", "contenttypes", "sessions", "django_tasks_database"])

MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
ROOT_URLCONF = "tests.urls"
STATIC_URL = "static/"
SECRET_KEY = "tests"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
