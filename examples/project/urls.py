"""The admin, and the page of the audits."""

from django.contrib import admin
from django.urls import include, path
from django.views.generic import RedirectView

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="admin:documents_document_changelist")),
    path("admin/", admin.site.urls),
    path("audits/", include("audits.urls")),
]
