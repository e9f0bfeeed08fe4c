"""Links, configurations, targets of make and pages that README and docs name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = {
    path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
README = TEXTS[ROOT / "README.md"]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    targets = re.findall(r"\]\(([^)#:]+)\)", TEXTS[path])
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_configurations_that_commands_name_exist(path):
    named = re.findall(r"--config[ =](configs/[\w/.-]+)", TEXTS[path])
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_there_are_links_and_configurations():
    assert "](" in README
    assert any("--config configs/" in text for text in TEXTS.values())


def test_commands_are_targets_of_make():
    makefile = (ROOT / "Makefile").read_text()
    commands = {name for text in TEXTS.values() for name in re.findall(r"`make ([a-z-]+)", text)}
    commands |= set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test"} <= commands
    assert [name for name in commands if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


def test_every_page_is_in_the_navigation_and_every_benchmarks_page_too():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    pages += [f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.md")]
    assert [page for page in pages if not re.search(rf": {re.escape(page)}$", navigation, re.MULTILINE)] == []
