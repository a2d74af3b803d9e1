"""Not valid Python: the parenthesis is never closed. Workers of the demo fail on it."""


def forget(what:
    return what
