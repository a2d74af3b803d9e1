"""``manage.py modelqueue``: one command with sub-commands, which parses and calls."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from modelqueue.management import worker

__all__ = ["Command"]

_SUBCOMMANDS = {"worker": worker}


class Command(BaseCommand):
    help = "Run the tasks of declared queues, look at them, and put them right."
    # A worker is to start also where a check of some other app complains.
    requires_system_checks = ["models"]

    def add_arguments(self, parser: CommandParser) -> None:
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        for name, module in _SUBCOMMANDS.items():
            one = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
            module.add_arguments(one)

    def handle(self, *args: Any, **options: Any) -> str | None:
        code = _SUBCOMMANDS[options["command"]].handle(self, options)
        if code:
            raise SystemExit(code)
        return None
