"""The code in README and docs runs as it stands, and the links and commands in them exist."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = TEXTS[ROOT / "README.md"]
PROGRAMS = [
    (path.name, block)
    for path, text in TEXTS.items()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    if "import" in block
]


@pytest.mark.parametrize("number", range(len(PROGRAMS)), ids=[name for name, _ in PROGRAMS])
def test_every_program_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, program = PROGRAMS[number]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(many workers|treespec|`srun`).*")
        exec(compile(program, f"{name} program {number}", "exec"), {"__name__": "readme"})


def test_there_are_programs_for_both_loops():
    programs = [program for name, program in PROGRAMS if name == "README.md"]
    assert any("Trainer(" in program for program in programs)
    assert any("kfac.step(" in program for program in programs)


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
