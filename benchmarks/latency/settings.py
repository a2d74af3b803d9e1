"""Django's settings for the worker of this benchmark."""

import json
import os

DATABASES = {"default": json.loads(os.environ["BENCHMARK_DATABASE"])}
INSTALLED_APPS = ["modelqueue", "benchmarks.latency"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
SECRET_KEY = "benchmark"
USE_TZ = True
