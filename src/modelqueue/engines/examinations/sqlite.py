"""SQLite: one file, one writer."""

from __future__ import annotations

import datetime as dt
import os
import re
from pathlib import Path
from typing import Any

from modelqueue.engines.examinations.base import Examination
from modelqueue.engines.examinations.facts import OneWriter, Plan, Refusal
from modelqueue.source import Source


class SQLiteExamination(Examination):
    def plan(self, source: Source[Any], now: dt.datetime) -> Plan | None:
        text = self.explain(source, now)
        if text is None:
            return None
        # SEARCH ... USING COVERING INDEX name (status>? AND status<?)
        sought = re.findall(r"USING (?:COVERING )?INDEX (\S+) \((.*)\)", text)
        indexes = self.indexes(source)
        seeks = any(name in indexes and str(source.field.column) in terms for name, terms in sought)
        steps = [re.sub(r"^[\d ]+", "", line) for line in text.splitlines()]
        return Plan(seeks, ", ".join(steps))

    def refusal(self, source: Source[Any]) -> Refusal | None:
        if self.connection.is_in_memory_db():
            return None
        file = Path(self.connection.settings_dict["NAME"])
        for place in file, file.parent:  # where the journal comes and goes
            if place.exists() and not os.access(place, os.W_OK):
                table = self.connection.ops.quote_name(source.owner._meta.db_table)
                why = f"this user may not write to {place}"
                return Refusal(table, why, f"Give it to the user of the worker: chown USER {place}")
        return None

    def one_writer(self) -> OneWriter | None:
        if self.connection.is_in_memory_db():  # of this process alone
            return None
        (journal_mode,), (synchronous,), (milliseconds,) = (
            self.ask(f"PRAGMA {name}")[0] for name in ("journal_mode", "synchronous", "busy_timeout")
        )
        # Django sets it when it connects; None is SQLite's default. Before 5.1 there is no such option.
        mode = getattr(self.connection, "transaction_mode", "unknown") or "DEFERRED"
        return OneWriter(journal_mode, synchronous, milliseconds / 1000, None if mode == "unknown" else mode)
