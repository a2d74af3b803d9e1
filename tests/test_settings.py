"""Settings: what is not set has its default; what is set wrong is said before anything is written."""

import pytest
from django.apps import apps
from django.core import checks
from django.core.exceptions import ImproperlyConfigured

from modelqueue import conf, run
from tests.actions import stored, unexpected
from tests.testapp.models import Task

WRONG = [
    ({"ENGINE": "fast"}, "MODELQUEUE['ENGINE'] is 'fast', but can only be 'auto' or 'portable'."),
    (
        {"PREPARED_STATEMENTS": "no"},
        "MODELQUEUE['PREPARED_STATEMENTS'] is 'no', but can only be True or False.",
    ),
    ({"ENGIN": "auto"}, "MODELQUEUE has no setting 'ENGIN'."),
    ("auto", "MODELQUEUE is 'auto', not a dictionary."),
]


@pytest.mark.parametrize("given", [None, {}, {"ENGINE": "auto"}])
def test_default(settings, given):
    del settings.MODELQUEUE
    if given is not None:
        settings.MODELQUEUE = given
    assert (conf.get("ENGINE"), conf.get("PREPARED_STATEMENTS")) == ("auto", True)
    assert conf.problems() == []


@pytest.mark.parametrize(("given", "problem"), WRONG)
def test_wrong_settings_are_e001(settings, given, problem):
    settings.MODELQUEUE = given
    # Of this app alone, as those of models ask the databases.
    found = checks.run_checks([apps.get_app_config("modelqueue")])
    [error] = [message for message in found if message.id == "modelqueue.E001"]
    assert isinstance(error, checks.Error)
    assert error.msg == problem
    assert error.hint


@pytest.mark.parametrize(("given", "problem"), [WRONG[0], WRONG[-1]])
@pytest.mark.django_db(transaction=True)
def test_wrong_value_is_refused_before_anything_is_claimed(settings, given, problem):
    settings.MODELQUEUE = given
    task = Task.objects.create()
    with pytest.raises(ImproperlyConfigured) as error:
        run(Task.objects, "status", unexpected)
    assert str(error.value).startswith(problem)
    assert stored(task) == task.status
