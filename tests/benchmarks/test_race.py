from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import race
from benchmarks.race_page import Curves, best_two_level, page, quiet, targets
from kfac_dist.study.protocol import Protocol
from kfac_dist.study.readings import after_epochs, after_seconds, training_loss
from kfac_dist.study.runner import read_lines
from kfac_dist.study.suite import PROBLEMS
from tests.helpers.study_lines import made

TINY = ["--problem", "tiny", "--trials", "2", "--tuning-epochs", "1", "--seeds", "0", "1", "--epochs", "1"]
SHORT = [*TINY, "--seconds", "0.1", "--marks", "0.05", "0.1", "--methods"]


def protocol(**changes) -> Protocol:
    settings = {"trials": 6, "tuning_epochs": 3, "seeds": (0,), "epochs": 10, "seconds": 60.0, "marks": (20.0, 60.0)}
    return Protocol(**{"problem": "mnist_autoencoder"} | settings | changes)


def raced(**rates: float) -> Curves:
    lines = {name: [made(rate)] for name, rate in rates.items()}
    return Curves(problem=PROBLEMS["mnist_autoencoder"], settings={name: {} for name in rates}, lines=lines)


@pytest.mark.parametrize("end", ["diverged", "failed"])
def test_a_diverged_run_is_the_worst_of_all(end: str) -> None:
    lines = made(1.0, end, epochs=3)
    lines[-2] = lines[-2] | {"loss": math.nan}
    assert training_loss(lines) == after_epochs(lines, 3) == after_seconds(lines, 17.0) == math.inf
    assert after_epochs(lines, 2) == pytest.approx(1 / 3)
    curves = raced(kfac=1.0)
    curves.lines["kfac"] = [made(1.0), lines, lines]
    text = page(curves, protocol(seeds=(0, 1, 2)), "command", 2, {})
    assert "| - (0.0909 to -) |" in text
    assert "2 of 3 |" in text


def verdicts(curves: Curves, **changes) -> dict[str, bool | None]:
    adam = after_seconds(curves.lines["adam"][0], 60.0)
    return {target.what: target.met for target in targets(curves, protocol(**changes), adam)}


def test_the_verdicts_follow_the_numbers() -> None:
    curves = raced(adam=0.1, muon=0.5, soap=0.6, kfac=1.0, layer_step_momentum=1.3)
    curves.twin = ("layer_step_momentum", {}, [made(1.0)])
    assert best_two_level(curves) == "layer_step_momentum"
    assert set(verdicts(curves).values()) == {True}
    curves.twin = ("layer_step_momentum", {}, [made(1.25)])  # 4 % ahead of that only
    found = verdicts(curves)
    assert [what for what, met in found.items() if not met] == [what for what in found if "'s settings" in what]
    slow = raced(adam=0.4, muon=1.4, soap=0.6, kfac=1.0, layer_step_momentum=1.0)
    slow.twin = ("layer_step_momentum", {}, [made(1.0)])
    missed = [what for what, met in verdicts(slow).items() if met is False]
    assert len(missed) == 7  # below 0.08, Muon, 20 s, 60 s, Adam's loss in 20 s, and both of the two levels
    assert {met for met in verdicts(slow, epochs=5, seconds=30.0).values() if met is None} == {None}


def test_a_rival_that_did_not_run_leaves_its_target_open() -> None:
    assert verdicts(raced(adam=0.1, kfac=1.0, muon=0.5))["per epoch ahead of SOAP"] is None
    alone = {target.what: target.met for target in targets(raced(kfac=1.0), protocol(), math.inf)}
    assert alone["ahead of everything after 20 s"] is None


def test_a_busy_machine_is_said() -> None:
    curves = raced(adam=0.1)
    assert "The machine was quiet" in quiet(curves)
    curves.lines["adam"] = [made(0.1), made(0.1, share=0.8)]
    assert "least 0.80" in quiet(curves)
    assert "not quiet" in quiet(curves)


def test_the_seed_of_the_trials_is_not_used_again(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        race.parse(["--seeds", "0", "100"])
    assert "100 is the seed of the trials" in capsys.readouterr().err


@pytest.mark.slow
def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("KFAC_PYTORCH", "")
    where = ["--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "race.md")]
    race.main([*SHORT, "adam", "kfac", "--resume", *where])
    runs = sorted((tmp_path / "runs").rglob("*.jsonl"))
    before = {path: path.stat().st_mtime_ns for path in runs}
    assert len(runs) == 2 * (2 + 2) + 1  # trials and seeds of two methods, and the calibration
    race.main([*SHORT, "layer_step_momentum", "kfac_pytorch", "--resume", *where])
    out, text = capsys.readouterr().out, (tmp_path / "race.md").read_text()
    assert "kfac-pytorch is left out: it needs a clone" in out
    assert "2 trials, about" in out
    kept = [path for path in runs if path.stat().st_mtime_ns == before[path]]
    assert [path.name for path in runs if path not in kept] == ["calibration-seed-0.jsonl"]
    assert len(list((tmp_path / "runs").rglob("as-layer_step_momentum-seed-*.jsonl"))) == 2
    for title in ("Adam", "K-FAC, factored damping", "two-level K-FAC, layer_step_momentum"):
        assert sum(line.startswith(f"| {title} |") for line in text.splitlines()) == 2  # results, settings
    finals = [read_lines(path) for path in (tmp_path / "runs").rglob("final-seed-0.jsonl")]
    assert len({json.dumps(lines[1]["initial"]) for lines in finals}) == 1
    assert (tmp_path / "runs" / "race.png").read_bytes()[:4] == b"\x89PNG"
