"""A page of results that several programs write, each its own sections: ``benchmarks/results.md``."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results.md")
TITLE = "# Measured\n\nWritten by `make bench`; every section says what was run, and where.\n"


def machine() -> str:
    """The processor, the system and the versions, for a section's first line."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    processor = found[1].strip() if found else platform.processor() or platform.machine()
    system = f"{platform.system()} {platform.release()}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{processor}, {os.cpu_count()} cores, {system}; {versions}"


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
