"""What `manage.py makemigrations` wrote: to migrations a status field is a plain BigIntegerField."""

from django.db import migrations, models

import modelqueue.status


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Document",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("path", models.CharField(max_length=700, unique=True)),
                (
                    "status",
                    models.BigIntegerField(db_index=True, default=modelqueue.status.Status.waiting),
                ),
                ("error", models.TextField(blank=True, default="", editable=False)),
                ("lines", models.PositiveIntegerField(editable=False, null=True)),
                ("functions", models.PositiveIntegerField(editable=False, null=True)),
                ("classes", models.PositiveIntegerField(editable=False, null=True)),
                ("imports", models.JSONField(default=list, editable=False)),
                ("digest", models.CharField(editable=False, max_length=64)),
            ],
        ),
    ]
