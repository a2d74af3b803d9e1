"""Django's settings for whoever measures with `benchmarks.project`."""

import json
import os

DATABASES = {"default": json.loads(os.environ["BENCHMARK_DATABASE"])}
# Release 2.2.1 is no app.
INSTALLED_APPS = ["benchmarks.project", *os.environ.get("BENCHMARK_APPS", "modelqueue").split()]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
SECRET_KEY = "benchmark"
USE_TZ = True
