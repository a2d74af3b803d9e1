"""A worker: one process that analyzes documents. Start as many as you like."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from documents.analysis import analyze_next
from documents.models import Document

logger = logging.getLogger(__name__)


class Command(BaseCommand):
    help = "Analyze documents as they come. SIGTERM or Ctrl-C ends it after the one at hand."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--until-done", action="store_true", help="end when no document is left to do")

    def handle(self, *, until_done: bool, **options: Any) -> None:
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *arguments: stopped.set())

        while not stopped.is_set():
            try:
                document = analyze_next()
                if document is None and until_done and not is_anything_left():
                    break
            except Exception:
                # The attempt is recorded. (Or the database is away; then it will be back.)
                logger.exception("A document failed")
                document = None
            if document is None:
                stopped.wait(0.2)


def is_anything_left() -> bool:
    """Say whether there is a document that waits, or that some worker holds, dead or alive."""
    return Document.objects.filter(status__state__in=["waiting", "working"]).exists()
