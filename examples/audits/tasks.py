"""A Django task: a function that is enqueued with its arguments, and no row of its own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from audits.models import Audit
from documents.models import Document

try:
    from django.tasks import task
except ImportError:  # before Django 6.0
    from django_tasks import task  # type: ignore[no-redef]

#: The progress is saved each time that so many documents are done.
STEP = 50
#: Of the changed documents so many are named.
NAMED = 10


@task
def audit_documents(audit_id: int) -> dict[str, Any]:
    """Read each file again, and compare it with what is known of it."""
    documents = Document.objects.filter(status__state="finished").order_by("pk")
    total = documents.count()
    audit = Audit.objects.filter(pk=audit_id)
    audit.update(total=total, done=0)
    changed = []
    for done, (path, digest) in enumerate(documents.values_list("path", "digest"), start=1):
        if digest_of(path) != digest:
            changed.append(path)
        if done % STEP == 0 or done == total:
            audit.update(done=done)
    return {"documents": total, "changed": len(changed), "examples": changed[:NAMED]}


def digest_of(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return "the file is gone"
