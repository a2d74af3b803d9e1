"""How Sphinx builds the documentation; `make docs` calls it with every warning an error."""

import sys
from pathlib import Path

import django
from django.conf import settings

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))

# The reference is read off the code, which needs a configured Django to be imported.
settings.configure(
    INSTALLED_APPS=[
        "django.contrib.admin",
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.messages",
        "django.contrib.sessions",
        "modelqueue",
    ],
)
django.setup()

import modelqueue  # noqa: E402

project = "ModelQueue"
author = "The ModelQueue authors"
copyright = "the ModelQueue authors"
version = release = modelqueue.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["README.md"]

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

# `run` in a docstring is a link where the reference has it, and code where it has not: names of Python and of
# Django can not be looked up, since a build asks nobody on the network.
default_role = "py:obj"
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:.*", r"(admin|asyncio|collections|datetime|django|dt|enum|forms|models|types|typing)\..*"),
    ("py:class", r"Any|Callable|Combinable|Manager|Model|ModelAdmin|QuerySet|Signal"),
    # Type variables and aliases of the code.
    ("py:class", r"(.*\.)?(M|_ST|_GT|Action|Given|Origin|StateLike|TaskOptions|Tasks)"),
]

html_theme = "furo"
html_title = f"ModelQueue {release}"
html_copy_source = False
html_show_sphinx = False

# Prompts are for the reader, not for the clipboard.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
