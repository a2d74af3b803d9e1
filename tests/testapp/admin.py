"""The admin of the test suite: each way in which the parts of modelqueue are put together."""

from django.contrib import admin

import modelqueue
from tests.testapp.models import Errand, Job, PlainJob, PrintJob, Project, ProxyJob


@admin.register(Job)
class JobAdmin(admin.ModelAdmin):
    actions = [*modelqueue.admin_actions("status"), *modelqueue.admin_actions("review_status")]
    list_display = ["pk", "title", "status", "review_status"]
    list_filter = [modelqueue.admin_list_filter("status"), modelqueue.admin_list_filter("review_status")]
    readonly_fields = ["error"]

    def get_changeform_initial_data(self, request):
        return {"status": int(modelqueue.Status.waiting(5))}


@admin.register(Errand)
class ErrandAdmin(admin.ModelAdmin):
    actions = [*modelqueue.admin_actions("review_status")]


@admin.register(ProxyJob)
class EditableJobAdmin(admin.ModelAdmin):
    list_display = ["pk", "title", "status", "review_status"]
    list_editable = ["title", "status", "review_status"]
    ordering = ["pk"]

    def get_changeform_initial_data(self, request):
        return {"status": modelqueue.Status.waiting(5)}


@admin.register(PrintJob)
class PrintJobAdmin(admin.ModelAdmin):
    """The status is in the table of the parent, and the rows come out of joins, one of them twice."""

    actions = [*modelqueue.admin_actions("status"), *modelqueue.admin_actions("review_status")]

    def get_queryset(self, request):
        return super().get_queryset(request).filter(project__job__isnull=False).order_by("-review_status")


@admin.register(PlainJob)
class PlainJobAdmin(admin.ModelAdmin):
    actions = [*modelqueue.admin_actions("status")]
    list_display = ["pk", "status"]
    list_filter = [modelqueue.admin_list_filter("status")]


class JobInline(admin.TabularInline):
    model = Job
    fields = ["title", "status", "review_status"]
    extra = 1


@admin.register(Project)
class ProjectAdmin(admin.ModelAdmin):
    inlines = [JobInline]
