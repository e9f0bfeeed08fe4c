"""A page of results that several programs write, each its own sections: ``benchmarks/results.md``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from kfac_dist.machine import machine as machine

RESULTS = Path(__file__).with_name("results.md")
TITLE = "# Measured\n\nWritten by `make bench`; every section says what was run, and where.\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column holds names, the others numbers."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines.insert(1, "|---|" + "---:|" * (len(head) - 1))
    return "\n".join(lines) + "\n"


def write_sections(sections: Mapping[str, str], path: Path = RESULTS) -> None:
    """Put the sections (title -> text without the title) in place of those of the same title, or at the end."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    pages = dict(part.split("\n\n", 1) for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:])
    pages |= {title: f"{text.strip()}\n" for title, text in sections.items()}
    parts = [TITLE, *(f"## {title}\n\n{text.strip()}\n" for title, text in pages.items())]
    path.write_text("\n".join(parts), encoding="utf-8")
