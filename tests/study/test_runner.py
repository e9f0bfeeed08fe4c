from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from kfac_dist.study import run as run_module
from kfac_dist.study.methods import METHODS
from kfac_dist.study.run import Run, batches, train
from kfac_dist.study.runner import (
    RunFailedError,
    calibrate,
    estimate,
    execute,
    file_of,
    finished,
    make_run,
    read_lines,
    run_all,
)
from kfac_dist.study.suite import PROBLEMS

SLOW_SGD = {"lr": 1e-3, "momentum": 0.9}


@pytest.fixture(scope="module")
def data():
    module = PROBLEMS["tiny"].data()
    module.setup("fit")
    return module


def tiny(name: str = "sgd", seed: int = 0, **changes) -> Run:
    settings = {k: v.default for k, v in METHODS[name].space.items()} | changes.pop("settings", {})
    return make_run("tiny", name, settings, seed=seed, **{"label": "test", "epochs": 1} | changes)


def spied(run: Run, data, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[float]]:
    seen = []
    one_step = run_module.one_step

    def spy(stepper, model, batch, *rest):
        seen.append(float(batch[0].double().sum()))
        torch.rand(len(run.method))  # methods that draw from the global stream, each as much as it likes
        return one_step(stepper, model, batch, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "one_step", spy)
        lines = list(train(run, data))
    return lines[0]["initial"], seen


def test_methods_begin_with_the_same_weights_and_see_the_same_batches(data, monkeypatch) -> None:
    names = ("sgd", "adam", "muon", "kfac", "layer_step_momentum")
    begun = [spied(tiny(name, epochs=2), data, monkeypatch) for name in names]
    assert all(other == begun[0] for other in begun[1:])
    assert len(set(begun[0][1])) == 6  # another order in the second epoch
    other, seen = spied(tiny(seed=1, epochs=2), data, monkeypatch)
    assert other != begun[0][0]
    assert seen != begun[0][1]


def test_batches_neither_use_nor_move_the_global_stream(data) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = [(epoch, batch[0]) for epoch, batch in islice(batches(data.train_dataloader(), 3), 7)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [epoch for epoch, _ in first] == [0, 0, 0, 1, 1, 1, 2]
    every = torch.cat([images for _, images in first[:3]])
    assert torch.equal(every.sum(1).sort()[0], data.train_set.tensors[0].sum(1).sort()[0])


def test_equal_runs_end_with_the_same_weights(data) -> None:
    ends = [list(train(tiny("layer_step_momentum", seed=seed), data))[-1]["weights"] for seed in (0, 0, 1)]
    assert ends[0] == ends[1] != ends[2]


def test_losses_are_means_over_all_samples(data) -> None:
    torch.manual_seed(0)
    net = PROBLEMS["tiny"].model()
    first = next(line for line in train(tiny(), data) if "loss" in line)
    for key, split in (("loss", data.train_set), ("val_loss", data.val_set)):
        images = split.tensors[0]
        assert first[key] == pytest.approx(F.binary_cross_entropy_with_logits(net(images), images).item(), rel=1e-6)


def test_a_run_goes_on_until_both_budgets_are_used_up(data) -> None:
    lines = list(train(tiny(epochs=2, seconds=0.15, marks=(0.05, 0.1), settings=SLOW_SGD), data))
    end, points = lines[-1], [line for line in lines if "loss" in line]
    assert end["end"] == "done"
    assert end["seconds"] >= 0.15
    assert [line["epoch"] for line in points][:3] == [0, 1, 2]
    for mark in (0.05, 0.1):
        assert any(mark <= line["seconds"] < mark + 0.04 for line in points)
    assert (points[-1]["step"], points[-1]["seconds"]) == (end["step"], end["seconds"])  # the end is evaluated, too
    short = list(train(tiny(epochs=2, seconds=1e-9), data))
    assert short[-1]["step"] == 6


def test_evaluations_take_no_seconds_of_training(data, monkeypatch) -> None:
    plain = run_module.mean_loss

    def slow(*arguments):
        time.sleep(0.3)
        return plain(*arguments)

    monkeypatch.setattr(run_module, "mean_loss", slow)
    lines = list(train(tiny(), data))
    assert lines[0]["evaluation"] >= 0.6
    assert lines[-1]["seconds"] < 0.6


def test_lines_between_evaluations_hold_the_mean_of_the_batches(data, monkeypatch) -> None:
    values = iter([1.0, 3.0, 5.0, 7.0, 9.0, 11.0])
    monkeypatch.setattr(run_module, "one_step", lambda *arguments: next(values))
    lines = [line for line in train(tiny(epochs=2, every_n_steps=2), data) if "batch_loss" in line]
    assert [(line["step"], line["batch_loss"]) for line in lines] == [(2, 2.0), (4, 6.0), (6, 10.0)]


def test_diverged_runs_are_recorded_as_such(data) -> None:
    beyond = list(train(tiny(settings={"lr": 1e38}, epochs=2), data))
    assert beyond[-1]["end"] == "diverged"
    assert beyond[-1]["step"] < 6  # it stops there
    worse = list(train(tiny(settings={"lr": 0.3, "momentum": 0.0}), data))
    assert math.isfinite(worse[-2]["loss"])
    assert worse[-1]["end"] == "diverged"
    assert worse[-1]["step"] == 3


def test_an_error_in_the_arithmetic_is_recorded_and_any_other_is_raised(data, monkeypatch) -> None:
    def broken(error: Exception):
        def step(*arguments):
            raise error

        monkeypatch.setattr(run_module, "one_step", step)
        return list(train(tiny(), data))

    end = broken(torch.linalg.LinAlgError("did not converge"))[-1]
    assert (end["end"], end["error"], end["step"]) == ("failed", "_LinAlgError: did not converge", 0)
    with pytest.raises(TypeError, match="a mistake"):
        broken(TypeError("a mistake"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": "magic"}, "problem='magic' is unknown; choose one of mnist_autoencoder"),
        ({"epochs": 0}, "epochs=0 and seconds=0: give the run a budget"),
        ({"threads": 0}, "threads=0 must be an integer of at least 1"),
        ({"seconds": -1.0}, r"seconds=-1.0 must be a finite number at least 0"),
    ],
)
def test_runs_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(**{"problem": "tiny", "method": "sgd", "epochs": 1} | changes)


def test_a_finished_run_is_one_with_these_settings_and_an_end(data, tmp_path: Path) -> None:
    run = tiny(marks=(0.1, 0.2))
    path = file_of(run, tmp_path)
    assert not finished(run, tmp_path)
    execute(run, data, path)
    assert finished(run, tmp_path)
    assert not finished(tiny(marks=(0.1, 0.3)), tmp_path)
    assert not finished(tiny(marks=(0.1, 0.2), settings={"lr": 0.5}), tmp_path)
    whole = path.read_text()
    for cut in (1, 5, len(whole.splitlines()[-1]) + 1):  # killed while it wrote its last line, or before
        path.write_text(whole[:-cut])
        assert not finished(run, tmp_path)


def test_a_run_whose_process_outlived_its_study_does_not_disturb_the_next_one(data, tmp_path: Path) -> None:
    path = file_of(tiny(), tmp_path)
    path.parent.mkdir(parents=True)
    with path.open("w", buffering=1) as orphan:
        orphan.write("half a")
        execute(tiny(), data, path)
        whole = path.read_text()
        orphan.write(" line\n")
    assert path.read_text() == whole
    assert finished(tiny(), tmp_path)


def test_a_run_that_takes_too_long_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=r"took more than timeout=0.2 s: give it more time \(--timeout MINUTES\)"):
        run_all([tiny(epochs=0, seconds=60.0)], tmp_path, 1, timeout=0.2)
    assert not finished(tiny(epochs=0, seconds=60.0), tmp_path)


@pytest.mark.slow
def test_processes_run_what_is_not_finished_and_a_failure_ends_with_its_message(tmp_path: Path) -> None:
    runs = [tiny(name, seed) for name in ("sgd", "adam") for seed in (0, 1)]
    ended = []
    run_all(runs, tmp_path, 2, lambda run, end: ended.append((run.method, run.seed, end["end"])))
    assert sorted(ended) == [(n, s, "done") for n in ("adam", "sgd") for s in (0, 1)]
    times = [file_of(run, tmp_path).stat().st_mtime_ns for run in runs]
    lost = file_of(runs[2], tmp_path)
    lost.write_text(lost.read_text()[:-1])  # killed in flight
    ended.clear()
    run_all(runs, tmp_path, 2, lambda run, end: ended.append((run.method, run.seed)))
    assert ended == [(runs[2].method, runs[2].seed)]
    assert [file_of(r, tmp_path).stat().st_mtime_ns == t for r, t in zip(runs, times, strict=True)] == [1, 1, 0, 1]
    assert read_lines(lost)[-1]["wall"] > 0
    with pytest.raises(RunFailedError, match=r"sgd \(test, seed 7\) ended with status 1(?s:.*)Invalid learning rate"):
        run_all([tiny(seed=7, settings={"lr": -1.0})], tmp_path, 1)
    step, steps_per_epoch, evaluation = calibrate("tiny", tmp_path)
    assert (0 < step < 1, steps_per_epoch, 0 < evaluation < 1) == (True, 3, True)


def test_the_estimate_is_the_larger_budget_and_the_evaluations() -> None:
    runs = [tiny("muon", epochs=4), tiny("sgd", epochs=2, seconds=100.0, marks=(1.0, 2.0))]
    cost = METHODS["muon"].cost
    expected = 2 * 0.5 + 4 * 3 * 0.1 * cost + 5 * 0.2 + 100 + 5 * 0.2
    assert estimate(runs, (0.1, 3, 0.2), 2) == pytest.approx(expected / 2)


def test_the_budget_counts_the_seconds_of_the_clock_that_was_asked_for(data, monkeypatch) -> None:
    asleep = run_module.one_step

    def slow(*arguments):
        time.sleep(0.02)  # passes by the wall, not by the CPU
        return asleep(*arguments)

    monkeypatch.setattr(run_module, "one_step", slow)
    ends = {kind: list(train(tiny(epochs=0, seconds=0.1, clock=kind), data))[-1] for kind in ("wall", "cpu")}
    assert ends["wall"]["seconds"] >= 0.1 > ends["wall"]["cpu_seconds"]
    assert ends["cpu"]["cpu_seconds"] >= 0.1
    assert ends["cpu"]["step"] > ends["wall"]["step"]


def test_a_file_from_before_a_field_was_there_counts_with_that_fields_default(tmp_path) -> None:
    run = tiny()
    path = file_of(run, tmp_path)
    path.parent.mkdir(parents=True)
    stored = {name: value for name, value in run.header().items() if name != "clock"}
    path.write_text(json.dumps({"run": stored}) + "\n" + json.dumps({"end": "done"}) + "\n")
    assert finished(run, tmp_path)
    assert not finished(replace(run, clock="cpu"), tmp_path)
