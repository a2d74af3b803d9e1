"""The form field of a `StatusField`: shows all 19 digits and knows whether a person changed them.

A page may stay open for minutes while a worker finishes the task. The form therefore renders the
status a second time as a hidden input. When both come back alike, nobody touched the status, and
the form answers with the one that the instance has now instead of the one that was rendered.
"""

from __future__ import annotations

from typing import Any

from django import forms

from modelqueue.status import Status

__all__ = ["StatusFormField"]


class StatusFormField(forms.IntegerField):
    """An integer input that cleans to `Status`, or to the instance's own status if left as rendered."""

    _bound: forms.BoundField | None = None

    def __init__(self, **kwargs: Any) -> None:
        kwargs["show_hidden_initial"] = True
        super().__init__(**kwargs)

    def get_bound_field(self, form: forms.BaseForm, field_name: str) -> forms.BoundField:
        # Each form has a copy of the field of its own, so the field may remember its form.
        self._bound = super().get_bound_field(form, field_name)
        return self._bound

    def prepare_value(self, value: Any) -> Any:
        # A widget renders str(value), which for a Status is words.
        return int(value) if isinstance(value, Status) else value

    def to_python(self, value: Any) -> int | None:
        return super().to_python(self.prepare_value(value))

    def clean(self, value: Any) -> Status | None:
        number = super().clean(value)
        instance = getattr(self._bound and self._bound.form, "instance", None)
        if instance is not None and not instance._state.adding and self._left_as_rendered(value, number):
            stored: Status | None = getattr(instance, self._bound.name)  # type: ignore[union-attr]
            return stored
        return None if number is None else Status(number)

    def _left_as_rendered(self, value: Any, number: int | None) -> bool:
        bound = self._bound
        if bound is None or self.disabled or value is None:  # None: the page had no such input
            return True
        widget = self.hidden_widget()
        rendered = widget.value_from_datadict(bound.form.data, bound.form.files, bound.html_initial_name)
        if rendered is None:  # a template of the user's own, without the hidden input
            return bool(number == bound.initial)
        return bool(value == rendered)
