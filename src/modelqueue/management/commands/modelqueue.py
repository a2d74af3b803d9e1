"""``manage.py modelqueue``: one command with sub-commands, which parses and calls."""

from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser, DjangoHelpFormatter
from django.db import Error

from modelqueue.checks import TAG
from modelqueue.management import cancel, doctor, enqueue, prune, retry, status, worker
from modelqueue.management.words import hint, trouble
from modelqueue.report import in_a_line

__all__ = ["Command"]

_SUBCOMMANDS = {
    "worker": worker,
    "status": status,
    "retry": retry,
    "cancel": cancel,
    "enqueue": enqueue,
    "prune": prune,
    "doctor": doctor,
}


class Command(BaseCommand):
    help = "Run the tasks of declared queues, look at them, and put them right."
    # A worker is to start also where a check of some other app complains.
    requires_system_checks = ["models", TAG]

    def add_arguments(self, parser: CommandParser) -> None:
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        for name, module in _SUBCOMMANDS.items():
            one = commands.add_parser(
                name,
                help=module.HELP,
                description=module.DESCRIPTION,
                formatter_class=DjangoHelpFormatter,
                parents=[_options_of_django()],
            )
            module.add_arguments(one)

    def handle(self, *args: Any, **options: Any) -> str | None:
        try:
            code = _SUBCOMMANDS[options["command"]].handle(self, options)
        except Error as error:
            raise CommandError(f"{trouble(error)}: {in_a_line(error)}\n{hint(error)}") from error
        if code:
            raise SystemExit(code)
        return None


def _options_of_django() -> CommandParser:
    """Return the options of every command, so that they may stand behind the name of the sub-command, too."""
    parser = CommandParser(add_help=False, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("-v", "--verbosity", type=int, choices=range(4), help="verbosity level, as of every command")
    add("--settings", help="the Python path of the settings module")
    add("--pythonpath", help="a directory to add to the Python path")
    add("--traceback", action="store_true", help="show the traceback of an error of the command")
    add("--no-color", action="store_true", help="do not color the output")
    add("--force-color", action="store_true", help="color the output in any case")
    add("--skip-checks", action="store_true", help="skip the system checks")
    return parser
