"""One page: a button that enqueues the task, and how far it is. The page asks anew each second, by itself."""

from __future__ import annotations

from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_POST

from audits.models import Audit
from audits.tasks import audit_documents


@require_GET
def index(request: HttpRequest) -> HttpResponse:
    return render(request, "audits/index.html", {"audits": Audit.objects.order_by("-pk")[:10]})


@require_POST
def start(request: HttpRequest) -> HttpResponse:
    # One transaction: there is no audit without its task, and no task without its audit.
    with transaction.atomic():
        audit = Audit.objects.create()
        audit.result_id = audit_documents.enqueue(audit.pk).id
        audit.save(update_fields=["result_id"])
    return redirect("audit", audit.pk)


@require_GET
def detail(request: HttpRequest, pk: int) -> HttpResponse:
    audit = get_object_or_404(Audit, pk=pk)
    result = audit_documents.get_result(audit.result_id)
    context = {"audit": audit, "result": result, "value": result.return_value if succeeded(result) else None}
    return render(request, "audits/detail.html", context)


def succeeded(result: object) -> bool:
    """Say whether there is a return value, which a result refuses to give before."""
    return str(getattr(result, "status", "")) == "SUCCESSFUL"
