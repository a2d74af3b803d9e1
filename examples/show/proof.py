"""The end: is everything there that was promised? And what there is to see."""

from __future__ import annotations

from documents.models import Document
from documents.queues import RETRY
from modelqueue import State, Status
from show.drain import Drain
from show.files import short

SHOWN = 6


def broken_promises(drain: Drain, total: int) -> list[str]:
    """Compare what stands in the database with what the processes have reported; return what is wrong."""
    problems = list(drain.problems)
    documents = {document.pk: document for document in Document.objects.defer("imports")}
    if len(documents) != total:
        problems.append(f"{total} documents were enqueued, and there are {len(documents)}")
    for document in documents.values():
        status, reported = document.status, drain.attempts[document.pk]
        about = f"document {document.pk}, {short(document.path)}: {status}"
        if status.state not in (State.finished, State.canceled):
            problems.append(f"{about}; it is neither finished nor canceled")
        elif status.attempts != reported:
            problems.append(f"{about}, but reported were {reported}")
        elif status.state == State.finished and (document.error or not document.digest):
            problems.append(f"{about}; it has no facts, or an error: {document.error!r}")
        elif status.state == State.canceled and (not document.error or status.attempts != RETRY + 1):
            problems.append(f"{about}; it has no reason, or not {RETRY + 1} attempts")
    return problems


def report(drain: Drain, total: int) -> bool:
    """Print the outcome; return whether every promise was kept."""
    print("\nTally")
    for state, count in Status.tally(Document.objects.all(), "status").items():
        print(f"  {state:<9}{count:7,}")
    print(f"  {total:,} documents in {drain.seconds:.1f} s: {total / drain.seconds:,.0f} a second")

    canceled = Document.objects.filter(status__state="canceled").order_by("path")
    print(f"\nCanceled after {RETRY + 1} attempts, as expected: this Python can not parse them")
    # Ours first. The others are mostly test data of the standard library.
    for document in sorted(canceled, key=lambda document: "invalid" not in document.path)[:SHOWN]:
        print(f"  {short(document.path)}\n    {document.error.splitlines()[0]}")
    if canceled.count() > SHOWN:
        print(f"  and {canceled.count() - SHOWN} more")

    print("\nThe killed process")
    if drain.killed is None:
        print("  none could be caught while it held a document")
    ran = {document.pk for document in drain.taken_along}
    for document in Document.objects.filter(pk__in=ran):
        print(f"  pid {drain.killed} ran {short(document.path)}")
        print(f"    its supervisor has taken it back; now it is {document.status}")

    problems = broken_promises(drain, total)
    if problems:
        print(f"\nBROKEN, in {len(problems)} cases")
        print(*(f"  {problem}" for problem in problems[:20]), sep="\n")
    else:
        print("\nNothing is lost: each document is finished or canceled, each attempt accounted for.")
    return not problems
