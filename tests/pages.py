"""The pages that a user reads, and the code on them, so that tests can run what the pages say.

A fenced block whose first line is a comment with a path, such as ``# uploads/models.py``, is that file of
the reader's project; with ``, at the end`` it is added to the file. Blocks inside an HTML comment are not
shown to the reader: they set up or check what the page shows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

_FENCE = re.compile(
    r"^(?P<fence>```+)(?P<language>[\w-]+)\n(?P<text>.*?)^(?P=fence)$", re.DOTALL | re.MULTILINE
)
_FILE = re.compile(r"# (?P<path>[\w./-]+\.\w+)(?P<append>, at the end)?\n")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    """Where its text begins, counted from 1."""
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The path in the reader's project, or None."""
        named = _FILE.match(self.text)
        return named["path"] if named else None

    @property
    def is_addition(self) -> bool:
        named = _FILE.match(self.text)
        return bool(named and named["append"])

    @property
    def module(self) -> str | None:
        """The dotted name of the file, or None."""
        if self.file is None or not self.file.endswith(".py"):
            return None
        return self.file.removesuffix(".py").replace("/", ".")

    @property
    def is_doctest(self) -> bool:
        return self.text.lstrip().startswith(">>>")

    def write(self, folder: Path) -> None:
        """Put the file into a project."""
        assert self.file is not None
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text() if self.is_addition else ""
        path.write_text(before + ("\n" if before else "") + self.text)


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return the fenced blocks of a page, in order; only those in the given languages, if any are."""
    source = page.read_text()
    found = [
        Block(page, source[: match.start("text")].count("\n") + 1, match["language"], match["text"])
        for match in _FENCE.finditer(source)
    ]
    return [block for block in found if not languages or block.language in languages]


def pages() -> list[Path]:
    """Every page: those of the documentation, and those that stand beside it."""
    return [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
