"""Not valid Python: the parenthesis is never closed. The worker of the demo fails on it."""


def forget(what:
    return what
