"""Queries on the parts of a status: ``status__state``, ``status__priority``, ``status__attempts``.

A comparison with a state compiles to a range of the column itself, as Django's ``__year`` does, so
that its index serves it. The values are exact on 64 bits on every database: no float, no rounding
division; they equal what `Status` says of the same number, foreign ones included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.exceptions import EmptyResultSet
from django.db import models
from django.db.models.lookups import Exact, In, Lookup

from modelqueue.status import END_OF_LIVE, FIRST_LIVE, State, Status

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models.sql.compiler import SQLCompiler

    _IntegerField = models.SmallIntegerField[int, State]
    _Lookup = Lookup[bool]
    SQL = tuple[str, tuple[Any, ...]]
else:
    _IntegerField = models.SmallIntegerField
    _Lookup = Lookup

__all__ = ["IsLive", "StateField", "StatusAttempts", "StatusPriority", "StatusState"]


class StateField(_IntegerField):
    """The type of ``status__state`` in queries: reads as `State`, takes a `State`, name or number."""

    def from_db_value(self, value: int | None, *args: Any) -> State | None:
        if value is None:
            return None
        return State.of(value) if value else State(0, "unknown")

    def get_prep_value(self, value: Any) -> Any:
        return None if value is None else int(State.of(value))


class StatusState(models.Transform):
    """The state of a status, 1 to 5; 0 for foreign numbers, NULL for NULL."""

    lookup_name = "state"
    output_field = StateField()

    def as_sql(  # type: ignore[override]
        self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, **kwargs: Any
    ) -> SQL:
        # Literals, not parameters: PostgreSQL must see that the expression in GROUP BY is the one
        # that is selected, and can not where each bound parameter has a number of its own.
        lhs, params = compiler.compile(self.lhs)
        whens = " ".join(
            f"WHEN {lhs} BETWEEN {Status.minimum(state)} AND {Status.maximum(state)} THEN {int(state)}"
            for state in Status.states
        )
        times = len(Status.states) + 1
        return f"CASE {whens} WHEN {lhs} IS NOT NULL THEN 0 END", (*params,) * times


class StatusPriority(models.Transform):
    """The priority of a status, its 17 digits as a number."""

    lookup_name = "priority"
    output_field = models.BigIntegerField()
    _template = "ABS(({lhs} / 10) %% 100000000000000000)"

    def as_sql(  # type: ignore[override]
        self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, template: str = _template, **kwargs: Any
    ) -> SQL:
        lhs, params = compiler.compile(self.lhs)
        return template.format(lhs=lhs), (*params,)

    def as_mysql(self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, **kwargs: Any) -> SQL:
        # "/" of two integers is a rounded decimal there: 3999999999999999999 / 10 ends in a 0.
        return self.as_sql(compiler, connection, "ABS(({lhs} DIV 10) %% 100000000000000000)")

    def as_oracle(self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, **kwargs: Any) -> SQL:
        return self.as_sql(compiler, connection, "ABS(MOD(TRUNC({lhs} / 10), 100000000000000000))")


class StatusAttempts(models.Transform):
    """The attempts of a status, its last digit."""

    lookup_name = "attempts"
    output_field = models.SmallIntegerField()

    def as_sql(  # type: ignore[override]
        self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, **kwargs: Any
    ) -> SQL:
        lhs, params = compiler.compile(self.lhs)
        return f"ABS({lhs} %% 10)", (*params,)

    def as_oracle(self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, **kwargs: Any) -> SQL:
        lhs, params = compiler.compile(self.lhs)
        return f"ABS(MOD({lhs}, 10))", (*params,)


def _ranges(lookup: Lookup[Any], compiler: SQLCompiler, states: list[int]) -> SQL:
    """Compile ``status__state`` in `states` to ranges of the column below the transform."""
    lhs, params = compiler.compile(lookup.lhs.lhs)
    conditions = []
    all_params: list[Any] = []
    for state in states:
        conditions.append(f"{lhs} BETWEEN %s AND %s")
        all_params += [*params, Status.minimum(state), Status.maximum(state)]
    return "(" + " OR ".join(conditions) + ")", (*all_params,)


@StatusState.register_lookup
class StateExact(Exact):
    def as_sql(self, compiler: SQLCompiler, connection: BaseDatabaseWrapper) -> SQL:
        if not self.rhs_is_direct_value():
            sql, params = super().as_sql(compiler, connection)
            return sql, (*params,)
        return _ranges(self, compiler, [self.rhs])


@StatusState.register_lookup
class StateIn(In):
    def as_sql(self, compiler: SQLCompiler, connection: BaseDatabaseWrapper) -> SQL:
        if not self.rhs_is_direct_value() or any(hasattr(state, "as_sql") for state in self.rhs):
            sql, params = super().as_sql(compiler, connection)
            return sql, (*params,)
        states = sorted({state for state in self.rhs if state is not None})
        if not states:
            raise EmptyResultSet
        return _ranges(self, compiler, states)


class IsLive(_Lookup):
    """The condition that a task is waiting or working, in the words of the condition of a `QueueIndex`.

    In literals, and not in parameters: a plan that is made before these are known can use the index only if
    the statement itself says that all of its rows are in it. SQLite never looks further than that.
    """

    prepare_rhs = False

    def __init__(self, status: Any) -> None:
        super().__init__(status, True)

    def as_sql(self, compiler: SQLCompiler, connection: BaseDatabaseWrapper) -> SQL:
        lhs, params = self.process_lhs(compiler, connection)
        return f"({lhs} >= {FIRST_LIVE} AND {lhs} < {END_OF_LIVE})", (*params, *params)
