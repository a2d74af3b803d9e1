"""What processes of tests are forked from, see `tests.processes`, has imported all that takes long."""

import django
import pytest  # noqa: F401  (their functions are in modules of tests)
from django.db import connections

django.setup()
connections.all()  # which loads the driver, and connects to nothing
