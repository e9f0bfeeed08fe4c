"""The README's code runs as it stands, and its links and commands exist."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROGRAMS = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import" in block]


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_every_program_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(many workers|treespec|`srun`).*")
        exec(compile(PROGRAMS[number], f"README program {number}", "exec"), {"__name__": "readme"})


def test_there_are_programs_for_both_loops():
    assert any("Trainer(" in program for program in PROGRAMS)
    assert any("kfac.step(" in program for program in PROGRAMS)


def test_links_lead_to_files():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_commands_are_targets_of_make():
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test"} <= commands
    assert [name for name in commands if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []
