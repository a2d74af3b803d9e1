"""What a run has found: printed as Markdown, and stored, so that it can be printed and drawn again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.figures import Table

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    heading: str
    """Command, machine, date and versions."""
    tables: list[Table]
    failures: dict[str, str]
    """What was not run, and why."""

    def markdown(self) -> str:
        parts = [self.heading, *(table.markdown() for table in self.tables)]
        failures = [f"- {what}: not run: {why}" for what, why in self.failures.items()]
        return "\n".join([*parts, *failures])

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> Report:
        """Return what was saved.

        Raises:
            ValueError: something else is in the file.
        """
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            tables = [
                Table(
                    **{
                        **table,
                        "header": tuple(table["header"]),
                        "rows": [tuple(row) for row in table["rows"]],
                        "notes": tuple(table["notes"]),
                    }
                )
                for table in stored["tables"]
            ]
            return cls(stored["heading"], tables, stored["failures"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is not what --save writes: {type(error).__name__}: {error}") from error
