"""How much a worker says, where the project has not configured its logger."""

from __future__ import annotations

import logging

__all__ = ["show_log_lines"]


def show_log_lines(verbosity: int) -> None:
    """Write to the standard error what is logged: all of it with 2 and above, with 0 errors alone.

    With 1 that is left to the logging of Python, which writes warnings and errors.
    """
    logger = logging.getLogger("modelqueue")
    if verbosity == 1 or logger.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbosity else logging.ERROR)
