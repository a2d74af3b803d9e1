"""The queue: what is done with a document, and how. `manage.py modelqueue worker` finds it by itself."""

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


@modelqueue.queue(
    Document,
    "status",
    retry=RETRY,
    delay=backoff.exponential(dt.timedelta(seconds=0.5)),
    # So long the documents of a killed worker are left alone. Short, as a demo is; the default is 30 s.
    lease=dt.timedelta(seconds=5),
    error_field="error",
)
def analyze(document: Document) -> None:
    """Parse the file. The worker saves what is assigned here, together with the outcome.

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
