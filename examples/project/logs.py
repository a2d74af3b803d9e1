"""Log lines that programs can read."""

from __future__ import annotations

import json
import logging

# modelqueue adds these to its records.
FACTS = ("event", "model", "pk", "field", "state", "attempts", "outcome")


class JSONFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {name: getattr(record, name) for name in FACTS if hasattr(record, name)}
        line = {
            "time": record.created,
            "process": record.process,
            "level": record.levelname,
            "message": record.getMessage(),
            **facts,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
