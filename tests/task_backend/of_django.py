"""Tasks of Django from 6.0 on, to be imported where TASKS has our backend; `of_backport` has the same."""

from django.tasks import task

from modelqueue.task_backend import policy


@task
def add(number, other):
    return number + other


@task
def fail():
    raise LookupError("gone")


@task(takes_context=True)
def name_of_context(context):
    return type(context).__module__


@policy(retry=1)
@task
def fail_twice():
    raise LookupError("gone again")
