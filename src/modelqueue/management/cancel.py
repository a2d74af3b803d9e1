"""``manage.py modelqueue cancel``: give tasks up."""

from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import BaseCommand

from modelqueue.management import change
from modelqueue.selection import VERBS

HELP = "give tasks up"
DESCRIPTION = (
    "Cancel tasks of a queue that are created, waiting or working. A working one is taken from its worker, "
    "whose outcome is then dropped."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    change.add_arguments(parser, VERBS["cancel"])


def handle(command: BaseCommand, options: dict[str, Any]) -> int:
    return change.handle(command, options, VERBS["cancel"])
