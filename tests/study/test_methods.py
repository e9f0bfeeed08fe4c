from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from kfac_dist.coarse import coarse_spaces
from kfac_dist.config import CORRECTIONS
from kfac_dist.study.methods import METHODS, Method, method
from kfac_dist.study.rivals import KFAC_PYTORCH
from kfac_dist.study.run import train
from kfac_dist.study.runner import make_run
from kfac_dist.study.search import trials
from kfac_dist.study.suite import PROBLEMS

PAIRS = sorted({f"{space}:error_minimizing" for space in coarse_spaces} | {f"layer_step:{c}" for c in CORRECTIONS})


@pytest.fixture(scope="module")
def data():
    module = PROBLEMS["tiny"].data()
    module.setup("fit")
    return module


def one_epoch(name: str, data, **settings: float) -> list[dict]:
    run = make_run("tiny", name, trials(method(name).space, 1)[0] | settings, seed=0, label="test", epochs=1)
    return list(train(run, data))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_three_steps(name: str, data) -> None:
    reason = METHODS[name].missing()
    if reason is not None:
        pytest.skip(f"{METHODS[name].title} {reason}")
    lines = one_epoch(name, data)
    assert lines[-1]["end"] == "done", lines[-1]
    assert lines[-1]["step"] == 3
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[1] < losses[0] == pytest.approx(math.log(2), rel=1e-2)


@pytest.mark.parametrize("name", PAIRS)
def test_every_space_and_every_correction_trains_three_steps(name: str, data) -> None:
    lines = one_epoch(name, data)
    assert lines[-1]["end"] == "done", lines[-1]
    assert method(name).fixed["coarse_correction"] == name.split(":")[1]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_searched_is_not_fixed_and_two_levels_know_their_one_level_form(name: str) -> None:
    entry = METHODS[name]
    assert entry.space or name.startswith("rate_free")
    assert not entry.space.keys() & entry.fixed.keys()
    assert (entry.one_level is not None) == ("coarse_space" in entry.fixed)
    if entry.one_level is not None:
        form = METHODS[entry.one_level]
        assert form.fixed.get("factor_sides") == entry.fixed.get("factor_sides")
        assert "coarse_space" not in form.fixed


def test_the_settings_reach_the_optimizers() -> None:
    net = torch.nn.Linear(4, 3)
    problem, changes = {"likelihood": "bernoulli"}, {"lr": 0.25, "damping": 0.5, "kl_clip": 2.0}

    def built(entry: Method, **settings: float):
        return entry.build(
            net, problem, {**entry.fixed, **{k: v.default for k, v in entry.space.items()}, **settings}, 7
        )

    stepper = built(METHODS["muon"], lr=0.3, momentum=0.8, rest_lr=0.4)
    assert [g["lr"] for o in stepper.optimizers for g in o.param_groups] == [0.3, 0.4]
    assert [p.ndim for o in stepper.optimizers for g in o.param_groups for p in g["params"]] == [2, 1]
    preconditioner = built(METHODS["kfac"], **changes).accumulate.__self__
    assert (preconditioner.config.damping, preconditioner.config.kl_clip, preconditioner.config.seed) == (0.5, 2.0, 7)
    fixed = built(METHODS["layer_step_momentum_fixed"], coarse_damping=0.7)
    assert fixed.accumulate.__self__.coarse.damping == 0.7
    assert [(g["lr"], g["momentum"]) for g in fixed.optimizers[0].param_groups] == [(1.0, 0.0)]


def test_unknown_names_and_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown method 'magic'; known: sgd, adam"):
        method("magic")
    with pytest.raises(ValueError, match="unknown coarse space 'magic'"):
        method("magic:deflated")
    with pytest.raises(ValueError, match="correction='magic' is unknown"):
        method("layer_step:magic")


def test_a_missing_clone_is_said_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data) -> None:
    for value in ("", str(tmp_path)):
        monkeypatch.setenv(KFAC_PYTORCH.variable, value)
        assert "KFAC_PYTORCH" in (METHODS["kfac_pytorch"].missing() or "")
    with pytest.raises(ModuleNotFoundError, match="name its folder in KFAC_PYTORCH"):
        one_epoch("kfac_pytorch", data)
