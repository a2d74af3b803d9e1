"""Django's own tests of its task API pass with our backend in place of Django's, and beside our app."""

from __future__ import annotations

import re

import django
import pytest

from tests import pages
from tests.task_backend import django_suite

PAGE = pages.DOCS / "reference" / "task-backend.md"


@pytest.mark.skipif(django.VERSION < (6, 0), reason="Django has a task API of its own from 6.0 on")
def test_tests_of_django_pass(processes):
    try:
        django_suite.tests_of_django()
    except django_suite.Unavailable as reason:
        pytest.skip(str(reason))
    # In a process of its own: they change the settings, and Django's modules.
    done = processes.start(django_suite.run).result()
    assert not done["wrong"], "\n\n".join(done["wrong"])
    assert_on_page(done["report"])


def assert_on_page(report):
    """The page shows the report of the version that it names; of another the numbers may differ."""
    page = PAGE.read_text()
    if f"### Django {django.__version__}\n" in page:
        assert report in page


def test_page_has_a_report_of_each_version_with_the_api():
    assert re.findall(r"^### Django (\d+\.\d+)", PAGE.read_text(), re.MULTILINE) == ["6.0", "6.1"]
