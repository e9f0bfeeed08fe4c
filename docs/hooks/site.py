"""What the site adds to the pages: the benchmarks' own ones, and names in docstrings without their roles."""

from __future__ import annotations

import os
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
    """Links that work in the repository: to pages of the site they lead here, too; others become text."""
    here = page.file.src_uri
    folder = Path(here if here.startswith("benchmarks/") else f"docs/{here}").parent

    def here_too(link: re.Match[str]) -> str:
        target = os.path.normpath(folder / link[2])
        site = target.removeprefix("docs/")
        if site == target and not target.startswith("benchmarks/"):
            return link[1]
        return f"[{link[1]}]({os.path.relpath(site, Path(here).parent)}{link[3] or ''})"

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)#]*)(#[^)]*)?\)", here_too, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings name things in Sphinx's way, :meth:`step`; here the name in code type is enough."""
    return re.sub(r":(?:meth|class|func|attr|data|mod):(?=<code>)", "", html)
