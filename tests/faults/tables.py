"""Tables of what is expected where: a line for each fault point, a test for each line."""

import pytest

from modelqueue import conf
from tests.testapp.models import StampedPaper, Task

#: The outcome of the first is one UPDATE, that of the second is written by save().
MODELS = (Task, StampedPaper)


def lines(plain, atomic=None):
    """The lines of a table for run() and one for `atomic=True`, for each model whose writes differ."""
    found = []
    for is_atomic, table in ((False, plain), (True, atomic or {})):
        for (step, moment), expected in table.items():
            for model in MODELS if step == "outcome" else MODELS[:1]:
                if (model, is_atomic, step, moment) == (Task, False, "outcome", "before the commit"):
                    continue  # an UPDATE in autocommit has no such moment
                name = f"{'atomic ' * is_atomic}{model.__name__}, {step}, {moment}"
                found.append(pytest.param(model, is_atomic, step, moment, expected, id=name))
    names = ("model", "is_atomic", "step", "moment", "expected")
    return pytest.mark.parametrize(names, found)


def is_missing(step, moment, vendor):
    """Say whether a database does not have this point."""
    is_one_statement = vendor == "postgresql" and conf.get("ENGINE") == "auto"
    return (step, moment) == ("claim", "before the commit") and is_one_statement


def skip_where_missing(step, moment, vendor):
    if is_missing(step, moment, vendor):
        pytest.skip("a claim is one statement in autocommit")
