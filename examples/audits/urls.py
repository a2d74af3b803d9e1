from django.urls import path

from audits import views

urlpatterns = [
    path("", views.index, name="audits"),
    path("start/", views.start, name="start_audit"),
    path("<int:pk>/", views.detail, name="audit"),
]
