"""``manage.py modelqueue retry``: make canceled tasks wait again."""

from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import BaseCommand

from modelqueue.management import change
from modelqueue.selection import VERBS

HELP = "make canceled tasks wait again"
DESCRIPTION = (
    "Make canceled tasks of a queue wait again, from now on and with no attempts made yet. Others are left "
    "alone: use enqueue for those that have finished."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    change.add_arguments(parser, VERBS["retry"])


def handle(command: BaseCommand, options: dict[str, Any]) -> int:
    return change.handle(command, options, VERBS["retry"])
