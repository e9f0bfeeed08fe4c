from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import soak
from benchmarks.soak_rank import Part


@pytest.mark.slow
def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "soak.md"
    options = ["--steps", "300", "--kills", "3", "--rebuilds", "4", "--bound", "65536", "--output", str(page)]
    assert soak.main(options) == 0  # memory settles in the first thousands of steps only
    lines = page.read_text().splitlines()
    assert "| resumed from the steps | 10, 20, 30 |  |  |" in lines
    assert "| resumed: largest difference of a loss | 0; 0 | 0 | kept |" in lines
    assert "| resumed: weights at the end | the same bits | the same bits | kept |" in lines
    for name in ("undisturbed", "rebuilt"):
        assert f"| {name}: process groups | 1 to 1; 1 to 1 | as before | kept |" in lines
        assert f"| {name}: hooks after close() | 0; 0 | 0 | kept |" in lines
    assert "60 factor updates and 15 inversions; 0 coarse solves failed" in lines[2]
    assert "undisturbed: bytes per step" in capsys.readouterr().out


def test_an_unforeseen_end_of_a_rank_ends_the_soak_with_its_log(tmp_path: Path) -> None:
    part = Part(first=5, last=6, look=1, folder=str(tmp_path))  # there is no checkpoint to begin from
    with pytest.raises(RuntimeError, match=r"the ranks of train ended with .*(?s:.*)No such file .*last.pt"):
        soak.run("train", part)
    with pytest.raises(RuntimeError, match="was to be killed in step 7 and was not"):
        soak.killed_and_resumed(replace(part, first=0, save=5), [7])


def end(step_bytes: float = 100.0, **changes: Any) -> dict[str, Any]:
    steps = list(range(0, 1000, 100))
    seen = {
        "steps": steps,
        "resident": [round(2e8 + step_bytes * step) for step in steps],
        "descriptors": [20] * 10,
        "threads": [8] * 10,
        "groups": [1, 4, 4, 1],
        "hooks": [6, 0],
    }
    return {"watched": seen | changes}


@pytest.mark.parametrize(
    ("leak", "line"),
    [
        (end(2000.0), "leak: bytes per step"),
        (end(descriptors=[20] * 9 + [21]), "leak: descriptors"),
        (end(threads=[8] * 9 + [9]), "leak: threads"),
        (end(groups=[1, 4, 4, 2]), "leak: process groups"),
        (end(hooks=[6, 1]), "leak: hooks after close()"),
    ],
)
def test_a_leak_on_one_rank_is_seen(leak: dict[str, Any], line: str) -> None:
    assert all(row.kept for row in soak.watched_rows("leak", [end(), end()], 3, 1024.0, "step"))
    for ends in ([end(), leak], [leak, end()]):
        assert [row.what for row in soak.watched_rows("leak", ends, 3, 1024.0, "step") if not row.kept] == [line]


def test_other_losses_or_weights_of_a_resumed_run_are_seen() -> None:
    def ran(steps: int, loss: float = 1.0, weight: float = 1.0) -> dict[str, Any]:
        net = {"weight": torch.full((2,), weight)}
        return {"losses": torch.full((steps,), loss), "net": net, "marked": net}

    def broken(*ends: dict[str, Any]) -> list[str]:
        return [row.what for row in soak.resumed_rows([ran(6), ran(6)], ends, [2]) if not row.kept]

    assert broken(ran(4), ran(4)) == []
    assert broken(ran(4), ran(4, loss=1 + 1e-6)) == ["resumed: largest difference of a loss"]
    assert broken(ran(4), ran(4, weight=1 + 1e-6)) == ["resumed: weights at the end"]


def test_the_slope_is_that_of_a_line() -> None:
    assert soak.slope([0, 100, 200], [7, 1007, 2007]) == pytest.approx(10.0)
