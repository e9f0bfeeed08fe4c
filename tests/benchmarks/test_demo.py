from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from benchmarks import demo
from benchmarks.training_run import ROOT, RunFailedError, TrainingRun
from kfac_dist.study.methods import METHODS

EPOCHS = [
    {"epoch": n, "step": 18 * n, "seconds": 1.5 * n, "pixel_loss": 0.3 / n, "val_pixel_loss": 0.4 / n}
    for n in range(1, 5)
]


def small_run(tmp_path: Path, *options: str, **changes: object) -> TrainingRun:
    settings = {"epochs": 1, "record": tmp_path / "run.jsonl", "log": tmp_path / "run.log", "timeout": 120.0}
    return TrainingRun(
        config=ROOT / "configs" / "mnist_autoencoder_sgd.yaml",
        options=["--model.widths=[784,20,5]", *options],
        **settings | changes,  # type: ignore[arg-type]
    )


@pytest.mark.slow
def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ("two_level", "adam")
    assert demo.main(["--smoke", "--only", *only, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path) in out.split("\n")[1]  # where the outputs are is said at the start
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    for method in (method for method in demo.METHODS if method.key in only):
        assert method.name in out
        lines = [json.loads(line) for line in (tmp_path / f"{method.key}.jsonl").read_text().splitlines()]
        assert lines[-1]["epoch"] == 1
        assert lines[-1]["step"] == 3
        assert "distributed_backend=gloo" in (tmp_path / f"{method.key}.log").read_text()
        saved = yaml.safe_load((tmp_path / method.key / "config.yaml").read_text())
        assert saved["data"]["init_args"]["batch_size"] == 128


def test_a_failing_method_ends_the_demo_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = demo.Method("SGD", "sgd", "mnist_autoencoder_sgd.yaml", ("--model.activation=gelu",))
    monkeypatch.setattr(demo, "METHODS", (broken,))
    monkeypatch.setattr(demo, "PROCESSES", 1)
    assert demo.main(["--smoke", "--output", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "status 2" in out
    assert "gelu" in out.split("--- end of")[1]
    assert not (tmp_path / "loss.png").exists()


def test_a_run_that_outlives_its_time_is_ended(tmp_path: Path) -> None:
    beats = []
    with pytest.raises(RunFailedError, match="was ended after 1 s"):
        small_run(tmp_path, epochs=100_000, timeout=1.0).train(beats.append)
    assert beats


@pytest.mark.slow
def test_a_run_hands_back_its_epochs(tmp_path: Path) -> None:
    epochs = small_run(tmp_path, "--trainer.limit_train_batches=2", epochs=2).train()
    assert [line["step"] for line in epochs] == [2, 4]
    with pytest.raises(RunFailedError, match="status 0 after 1 of 2 epochs"):
        small_run(tmp_path, "--trainer.max_steps=2", "--trainer.limit_train_batches=2", epochs=2).train()


def test_table_shows_the_losses_of_the_marked_epochs() -> None:
    text = io.StringIO()
    Console(file=text, width=120).print(demo.loss_table({"K-FAC": EPOCHS}, [2, 4]))
    row = next(line for line in text.getvalue().splitlines() if "K-FAC" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["K-FAC", "0.1500", "0.0750", "0.2000", "0.1000", "6.0"]


def test_plot_survives_a_diverged_method(tmp_path: Path) -> None:
    diverged = [line | {"pixel_loss": float("nan"), "val_pixel_loss": float("inf")} for line in EPOCHS]
    demo.plot({"K-FAC": EPOCHS, "SGD": diverged}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_wrong_number_of_epochs_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--epochs", "0"])
    assert "--epochs=0 must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["adam", "kfac", "layer_step_momentum"])
def test_configurations_hold_what_the_trials_of_the_race_chose(method: str) -> None:
    page = (ROOT / "benchmarks" / "race.md").read_text().split("## Settings that the trials chose")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    (searched,) = (row[1] for row in rows if row[0] == METHODS[method].title)
    chosen = {name: float(value) for name, value in (each.split() for each in searched.split(", "))}
    files = {"layer_step_momentum": "_two_level", "kfac": ""}
    config = yaml.safe_load((ROOT / "configs" / f"mnist_autoencoder{files.get(method, f'_{method}')}.yaml").read_text())
    found = dict(config["optimizer"]["init_args"])
    if "betas" in found:
        found["beta2"] = found["betas"][1]
    for callback in config["trainer"].get("callbacks", ()):
        found |= callback["init_args"]
    assert set(chosen) == set(METHODS[method].space)
    assert {name: found[name] for name in chosen} == chosen
