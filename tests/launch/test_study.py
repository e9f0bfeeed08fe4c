from __future__ import annotations

import json
from pathlib import Path

import pytest

from kfac_dist.launch.__main__ import main
from kfac_dist.launch.study import parser_of_studies
from kfac_dist.study import runner

PLAN = """
plan:
  title: a study of nothing
  problems:
    tiny: {epochs: 1, seconds: 0.05}
  methods: [sgd, kfac, layer_step_momentum]
  trials: 1
  tuning_epochs: 1
  seeds: [0, 1]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(runner, "CALIBRATION_SECONDS", 0.05)
    path = tmp_path / "mine.yaml"
    path.write_text(PLAN)
    return path


def study(file: Path, *options: str) -> int:
    return main(["study", str(file), "--folder", str(file.parent / "runs"), "--processes", "1", *options])


def runs(file: Path) -> dict[str, float]:
    """Every finished run but the calibration, and when its file was written."""
    found = sorted((file.parent / "runs").rglob("*.jsonl"))
    return {f"{p.parent.name} {p.stem}": p.stat().st_mtime for p in found if "calibration" not in p.stem}


def test_a_study_runs_all_stages_and_goes_on_where_it_stopped(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study(file, "--stage", "tuning") == 0
    assert set(runs(file)) == {f"{name} trial-0-seed-100" for name in ("sgd", "kfac", "layer_step_momentum")}
    first = runs(file)
    assert study(file) == 0
    assert len(runs(file)) == 3 + 3 * 2 + 2  # trials, runs with both seeds, the one-level form at two-level's settings
    assert first.items() <= runs(file).items()
    header = json.loads(next((file.parent / "runs").rglob("final-seed-1.jsonl")).read_text().splitlines()[0])["run"]
    assert (header["seed"], header["seconds"], header["clock"]) == (1, 0.05, "cpu")
    done = runs(file)
    capsys.readouterr()
    assert study(file) == 0
    assert runs(file) == done
    assert "tuning: 0 runs" in capsys.readouterr().out
    report = (file.parent / "runs" / "report.md").read_text()
    assert report.startswith("# a study of nothing")
    assert "Incomplete" not in report
    assert (file.parent / "runs" / "report.html").exists()


def test_a_report_of_an_unfinished_study_says_so_and_runs_nothing(file: Path) -> None:
    assert study(file, "--stage", "tuning") == 0
    done = runs(file)
    assert study(file, "--stage", "report", "--report", str(file.parent / "page")) == 0
    assert runs(file) == done
    assert "Incomplete: " in (file.parent / "page" / "report.md").read_text()


def test_the_report_names_the_command_with_what_was_changed_in_the_plan(file: Path) -> None:
    changes = ["--plan.seeds", "[0, 1, 2]", "--plan.trials=2"]
    assert study(file, *changes, "--stage", "report") == 0
    text = (file.parent / "runs" / "report.md").read_text()
    assert "mine.yaml --plan.seeds '[0, 1, 2]' --plan.trials=2`" in text


def test_the_timeout_is_that_of_a_run_in_minutes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr("kfac_dist.launch.study.run_all", lambda *args, timeout: given.append(timeout))
    assert study(file, "--stage", "tuning", "--tasks", "2", "--timeout", "30") == 0
    assert given == [1800.0]


def test_a_plan_beyond_the_budget_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study(file, "--budget", "0.001") == 1
    assert "are more than --budget 0.001" in capsys.readouterr().out
    assert not runs(file)


def test_an_estimate_runs_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study(file, "--estimate", "--plan.seeds", "[0, 1, 2]") == 0
    assert "finals: 9 runs" in capsys.readouterr().out
    assert not runs(file)


def test_an_array_of_jobs_shares_a_stage(file: Path) -> None:
    assert study(file, "--stage", "tuning", "--task", "1", "--tasks", "2") == 0
    assert set(runs(file)) == {"kfac trial-0-seed-100"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan.methods", "[adamm]"], "unknown method 'adamm'"),
        (["--task", "2", "--tasks", "2"], "--task 2 of --tasks 2: it counts from 0"),
        (["--processes", "0"], "--processes 0"),
        (["--timeout", "0"], "--timeout 0 must be above 0 minutes"),
        (["--plan.device", "xpu:7", "--plan.clock", "wall"], "device='xpu:7' cannot be used here"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_line(file: Path, options, message, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        study(file, *options)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_study_needs_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["study"])
    assert end.value.code == 2
    assert "name the study's file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["quick", "paper", "cluster"])
def test_the_profiles_that_come_with_the_project_are_whole(name: str, tmp_path: Path) -> None:
    parser = parser_of_studies()
    file = Path(__file__).parents[2] / "configs" / "study" / f"{name}.yaml"
    plan = parser.instantiate(parser.parse_args(["--config", str(file)])).plan
    assert len(plan.seeds) >= (3 if name == "quick" else 5)
    assert plan.runs("side", tmp_path, assume=True) or name == "quick"
