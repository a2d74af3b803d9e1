"""Django's settings for the tests.

`MODELQUEUE_TEST_DATABASES` holds the databases as JSON: from `tests.suite`, which has started the server, or
from `tests.processes`, so that a process works on the databases of the test. Without it they are on SQLite.
"""

import json
import os

from tests import servers

DATABASES = json.loads(os.environ.get("MODELQUEUE_TEST_DATABASES", "null")) or servers.databases()

MODELQUEUE = {"ENGINE": os.environ.get("MODELQUEUE_TEST_ENGINE", "auto")}

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "modelqueue",
    "tests.testapp",
    *os.environ.get("MODELQUEUE_TEST_APPS", "").split(),
]
# Their tables are made without migrations, which is several times faster and tests the same.
MIGRATION_MODULES = {"admin": None, "auth": None, "contenttypes": None, "sessions": None}

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
