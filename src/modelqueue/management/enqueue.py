"""``manage.py modelqueue enqueue``: make tasks wait."""

from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import BaseCommand

from modelqueue.management import change
from modelqueue.selection import VERBS

HELP = "make tasks wait"
DESCRIPTION = (
    "Make tasks of a queue wait, from now on and with no attempts made yet: created, finished and canceled "
    "ones, those whose time has not come, and, by --pk or --all, those that are not in the queue (NULL). "
    "Working ones are left alone, and so are those that are due already."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    change.add_arguments(parser, VERBS["enqueue"])


def handle(command: BaseCommand, options: dict[str, Any]) -> int:
    return change.handle(command, options, VERBS["enqueue"])
