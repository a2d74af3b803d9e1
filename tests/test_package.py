"""What the installed package says of itself."""

from importlib.metadata import metadata, requires, version

import modelqueue


def test_version_is_that_of_the_distribution():
    assert modelqueue.__version__ == version("modelqueue")


def test_django_is_the_only_dependency_and_has_no_cap():
    assert requires("modelqueue") == ["django>=4.2"]


def test_licence_is_in_spdx_form():
    assert metadata("modelqueue")["License-Expression"] == "Apache-2.0"
