"""Settings of a small project. What they say for ModelQueue is marked with (*)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import django

BASE_DIR = Path(__file__).resolve().parent.parent

# (*) SQLite has one writer at a time. So that several processes get along: wait for it, begin with the write
# lock, and let readers read meanwhile. Before Django 5.1 run "PRAGMA journal_mode=WAL" on the file once.
# A task of a dead process is taken back after its lease and this timeout. A demo is short; yours may say 20.
OPTIONS: dict[str, Any] = {"timeout": 5}
if django.VERSION >= (5, 1):
    OPTIONS |= {
        "transaction_mode": "IMMEDIATE",
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
    }
SQLITE = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": str(BASE_DIR / "db.sqlite3"),
    "OPTIONS": OPTIONS,
}
# The demo keeps its data elsewhere, or uses PostgreSQL.
DATABASES = {"default": SQLITE | json.loads(os.environ.get("EXAMPLE_DATABASE", "{}"))}

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "modelqueue",  # (*) the command `modelqueue worker`, and system checks
    "modelqueue.task_backend",  # (*) the table of Django tasks
    "documents",
    "audits",
]
if django.VERSION < (6, 0):  # (*) whose task API comes as a package, by modelqueue[tasks]
    INSTALLED_APPS.append("django_tasks")

# (*) Django tasks are run by the same worker.
TASKS = {"default": {"BACKEND": "modelqueue.task_backend.ModelQueueBackend"}}

# (*) What the queue does, one JSON object per line.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": "project.logs.JSONFormatter"}},
    "handlers": {
        "stdout": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "json"}
    },
    "loggers": {
        "documents": {"handlers": ["stdout"]},
        "modelqueue": {"handlers": ["stdout"], "level": "DEBUG"},
    },
}

MIDDLEWARE = [
    "project.csp.strict",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
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

DEBUG = os.environ.get("EXAMPLE_DEBUG", "1") == "1"
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
SECRET_KEY = "an example has no secrets; your project reads its key from the environment"
ROOT_URLCONF = "project.urls"
STATIC_URL = "static/"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
TIME_ZONE = "UTC"
