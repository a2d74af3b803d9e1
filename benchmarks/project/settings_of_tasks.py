"""Django's settings for whoever measures Django tasks with our backend."""

import json
import os

import django

API = "django.tasks" if django.VERSION >= (6, 0) else "django_tasks"

DATABASES = {"default": json.loads(os.environ["BENCHMARK_DATABASE"])}
INSTALLED_APPS = ["modelqueue", "modelqueue.task_backend"]
if API == "django_tasks":
    INSTALLED_APPS.append(API)
TASKS = {
    "default": {
        "BACKEND": "modelqueue.task_backend.ModelQueueBackend",
        "OPTIONS": {"lease": float(os.environ.get("BENCHMARK_LEASE", "30"))},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
SECRET_KEY = "benchmark"
USE_TZ = True
LOGGING = {"version": 1, "loggers": {API: {"level": "WARNING"}}}
