"""What the site adds to the pages: the benchmarks' own ones, and names in docstrings without their roles."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add benchmarks/*.md."""
    for path in sorted((ROOT / "benchmarks").glob("*.md")):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links out of docs/ work in the repository: to the benchmarks' pages they lead here, too; others become text."""
    markdown = markdown.replace("](../benchmarks/", "](benchmarks/")
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings name things in Sphinx's way, :meth:`step`; here the name in code type is enough."""
    return re.sub(r":(?:meth|class|func|attr|data|mod):(?=<code>)", "", html)
