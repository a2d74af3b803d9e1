"""The action of the queue: parse a file and keep what was found. And the queue's options, in one place."""

from __future__ import annotations

import ast
import datetime as dt
import hashlib
from pathlib import Path

import modelqueue
from documents.models import Document
from modelqueue import backoff

#: Attempts after the first one.
RETRY = 2
#: After this time a worker counts as dead. Longer than any attempt takes; yours will need more than seconds.
TIMEOUT = dt.timedelta(seconds=5)


def analyze(document: Document) -> None:
    """Parse the file. `run` saves what is assigned here, together with the outcome.

    There is nothing to catch: a file that can not be parsed raises, and that is a failed attempt.
    """
    source = Path(document.path).read_bytes()
    nodes = list(ast.walk(ast.parse(source, filename=document.path)))

    document.lines = len(source.splitlines())
    document.functions = sum(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in nodes)
    document.classes = sum(isinstance(node, ast.ClassDef) for node in nodes)
    document.imports = sorted(imported_modules(nodes))
    document.digest = hashlib.sha256(source).hexdigest()


def imported_modules(nodes: list[ast.AST]) -> set[str]:
    """Return the full names of what a file imports; a relative import begins with dots."""
    modules: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.add("." * node.level + (node.module or ""))
    return modules


def analyze_next() -> Document | None:
    """Analyze the next document that is due and return it, or None when there is none."""
    return modelqueue.run(
        Document.objects.all(),
        "status",
        analyze,
        retry=RETRY,
        timeout=TIMEOUT,
        delay=backoff.exponential(dt.timedelta(seconds=0.5)),
        error_field="error",
    )
