"""Django's settings for whoever measures."""

import json
import os

DATABASES = {"default": json.loads(os.environ["BENCHMARK_DATABASE"])}
INSTALLED_APPS = os.environ.get("BENCHMARK_APPS", "modelqueue benchmarks.project").split()
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
SECRET_KEY = "benchmark"
USE_TZ = True
