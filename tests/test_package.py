"""What the installed package says of itself."""

import os
import subprocess
import sys
from importlib.metadata import metadata, requires, version

import modelqueue


def test_version_is_that_of_the_distribution():
    assert modelqueue.__version__ == version("modelqueue")


def test_django_is_the_only_dependency_and_has_no_cap():
    needed = [one for one in requires("modelqueue") if "extra ==" not in one]
    assert needed == ["django>=4.2"]


def test_licence_is_in_spdx_form():
    assert metadata("modelqueue")["License-Expression"] == "Apache-2.0"


def test_help_works_where_django_is_not_configured():
    environment = {key: value for key, value in os.environ.items() if key != "DJANGO_SETTINGS_MODULE"}
    text = subprocess.run(
        [sys.executable, "-c", "import modelqueue; help(modelqueue)"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "any Django model is a task queue" in text
    assert "Run `action` on the next due task of a queue" in text
