"""Times as a project has them: with a zone, or without one and local where USE_TZ is off."""

from __future__ import annotations

import datetime as dt
from typing import overload

from django.conf import settings
from django.utils import timezone

__all__ = ["aware", "of_project"]


def aware(moment: dt.datetime) -> dt.datetime:
    """Return a time with its zone; one without is local."""
    return moment if moment.tzinfo is not None else timezone.make_aware(moment, _local())


@overload
def of_project(moment: dt.datetime) -> dt.datetime: ...
@overload
def of_project(moment: dt.datetime | None) -> dt.datetime | None: ...
def of_project(moment: dt.datetime | None) -> dt.datetime | None:
    """Return a time as those of the project's models are, which its database takes."""
    if moment is None or (moment.tzinfo is not None) == settings.USE_TZ:
        return moment
    return aware(moment) if settings.USE_TZ else timezone.make_naive(moment, _local())


def _local() -> dt.tzinfo:
    # Not the zone that is active just now, for a request perhaps: that of the columns.
    return timezone.get_default_timezone()
