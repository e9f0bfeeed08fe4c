"""Saving and loading a two-level run: complete, plain, exact, and all or nothing."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_dist import CoarseConfig, KFACPreconditioner
from tests.helpers.cases import Case, cases
from tests.helpers.ranks import RankPool
from tests.helpers.training import Run, advance, build

STEPS, CURVATURE = 9, 3
CASE = cases(12 * STEPS)["cnn"]
SPACES = ["layer_step", "layer_step_momentum", "scalar_momentum", "residual", "spectral", "tselepidis"]


def make(coarse: CoarseConfig | str | None, case: Case = CASE) -> KFACPreconditioner:
    return KFACPreconditioner(
        case.model(),
        likelihood="categorical",
        coarse=coarse,
        factor_every_n_steps=CURVATURE,
        inverse_every_n_steps=CURVATURE,
        kl_clip=0.01,
        seed=3,
    )


def config(space: str, **more: Any) -> CoarseConfig:
    return CoarseConfig(space=space, damping=0.1, **more)


def steps(kfac: KFACPreconditioner, first: int, last: int) -> list[list[Tensor]]:
    """SGD(lr=1); the directions by step."""
    result = []
    for step in range(first, last):
        part = torch.arange(12 * step, 12 * step + 12)
        kfac.model.zero_grad()
        logits = kfac.model(CASE.x[part])
        kfac.accumulate(sample_ids=part)
        CASE.loss(logits, CASE.y[part]).backward()
        kfac.step(lr=1.0)
        result.append([p.grad.clone() for p in kfac.model.parameters()])
        with torch.no_grad():
            for p in kfac.model.parameters():
                p -= p.grad
    return result


def saved_and_loaded(state: Mapping[str, Any]) -> Any:
    """Through a file, read without running code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(kfac: KFACPreconditioner, coarse: CoarseConfig | None, state: Mapping[str, Any]) -> KFACPreconditioner:
    """Another process, as far as that goes: a new model and a new preconditioner."""
    other = make(coarse)
    other.model.load_state_dict(kfac.model.state_dict())
    other.load_state_dict(saved_and_loaded(state))
    return other


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("space", SPACES)
def test_a_run_resumed_on_a_curvature_step_equals_an_uninterrupted_one(space: str) -> None:
    """Bit by bit: directions, and the state at the end."""
    kfac = make(config(space))
    steps(kfac, 0, 2 * CURVATURE)
    state = kfac.state_dict()
    other = resumed(kfac, config(space), state)
    assert equal(other.state_dict(), state)
    wanted, found = steps(kfac, 2 * CURVATURE, STEPS), steps(other, 2 * CURVATURE, STEPS)
    for one, another in zip(wanted, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, another, strict=True))
    assert equal(other.state_dict(), kfac.state_dict())
    assert kfac.metrics["corrected"] == 1


@pytest.mark.parametrize("every", [2, 4])
def test_kept_coefficients_are_saved(every: int) -> None:
    """Resumed between two solves, the run goes on with the coefficients of the last one."""
    kfac = make(config("layer_step", every_n_steps=every))
    steps(kfac, 0, CURVATURE)
    other = resumed(kfac, config("layer_step", every_n_steps=every), kfac.state_dict())
    wanted, found = steps(kfac, CURVATURE, STEPS), steps(other, CURVATURE, STEPS)
    for one, another in zip(wanted, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, another, strict=True))
    assert other.state_dict()["coarse"]["solves"] == 1 + (STEPS - 1) // every


def test_resumed_between_curvature_steps_samples_are_captured_anew() -> None:
    """The next step is a two-level one, with the F of its own batch."""
    kfac = make(config("layer_step_momentum"))
    steps(kfac, 0, 4)
    other = resumed(kfac, config("layer_step_momentum"), kfac.state_dict())
    updates = other.state_dict()["counts"]["factor_updates"]
    steps(other, 4, 5)
    assert other.metrics["corrected"] == 1
    assert other.metrics["coarse/samples"] == 12
    assert other.state_dict()["counts"]["factor_updates"] == updates  # factors keep their cadence
    steps(other, 5, STEPS)
    assert other.metrics["coarse/failures"] == 0


def test_what_a_space_made_of_other_factors_is_not_used_after_loading() -> None:
    """Of a run with as many curvature batches as the saved one."""
    source, used = make(config("spectral", vectors_per_layer=2)), make(config("spectral", vectors_per_layer=2))
    steps(source, 0, 4)
    steps(used, 4, 8)
    assert source.metrics["factor_updates"] == used.metrics["factor_updates"]
    fresh = resumed(source, config("spectral", vectors_per_layer=2), source.state_dict())
    used.model.load_state_dict(source.model.state_dict())
    used.load_state_dict(source.state_dict())
    for one, another in zip(steps(used, 4, STEPS), steps(fresh, 4, STEPS), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, another, strict=True))


def test_the_state_is_a_copy() -> None:
    """Going on, also by loading, does not reach into what was saved."""
    kfac = make(config("layer_step_momentum"))
    steps(kfac, 0, 2)
    state = kfac.state_dict()
    before = copy.deepcopy(state)
    other = make(config("layer_step_momentum"))
    other.load_state_dict(state)
    steps(kfac, 2, 5)
    steps(other, 2, 5)
    assert equal(state, before)


@pytest.mark.filterwarnings("ignore:resumed with other settings")
def test_a_one_level_checkpoint_in_a_two_level_run() -> None:
    one = make(None)
    steps(one, 0, CURVATURE)
    two = resumed(one, config("layer_step_momentum"), one.state_dict())
    fresh = two.state_dict()["coarse"]
    assert fresh["momentum"] is None
    assert fresh["solves"] == 0
    steps(two, CURVATURE, STEPS)
    assert two.metrics["corrected"] == 1
    # A run that has a momentum drops it: it belongs to another trajectory.
    two.load_state_dict(one.state_dict())
    assert equal(two.state_dict()["coarse"], fresh)


@pytest.mark.filterwarnings("ignore:resumed with other settings")
def test_a_two_level_checkpoint_in_a_one_level_run() -> None:
    two = make(config("layer_step_momentum"))
    steps(two, 0, CURVATURE)
    one = resumed(two, None, two.state_dict())
    assert one.state_dict()["coarse"] is None
    assert equal(one.state_dict()["layers"], two.state_dict()["layers"])
    steps(one, CURVATURE, STEPS)
    assert one.metrics["corrected"] == 0


@pytest.mark.filterwarnings("ignore:resumed with other settings")
def test_a_checkpoint_of_another_space_starts_the_coarse_level_afresh() -> None:
    kfac = make(config("layer_step_momentum"))
    steps(kfac, 0, CURVATURE)
    other = resumed(kfac, config("layer_step"), kfac.state_dict())
    assert other.state_dict()["coarse"] == make(config("layer_step")).state_dict()["coarse"]
    assert equal(other.state_dict()["layers"], kfac.state_dict()["layers"])
    steps(other, CURVATURE, STEPS)
    assert other.metrics["corrected"] == 1


def damaged(state: dict[str, Any], how: str) -> dict[str, Any]:
    state = copy.deepcopy(state)
    coarse = state["coarse"]
    name = next(iter(coarse["momentum"]))
    if how == "shape":
        coarse["momentum"][name] = coarse["momentum"][name][:, :, 1:]
    elif how == "name":
        coarse["momentum"]["elsewhere"] = coarse["momentum"].pop(name)
    elif how == "layers":
        state["layers"][name]["factors"]["A"] = torch.eye(2)
    else:
        del coarse[how]
    return state


@pytest.mark.parametrize("how", ["shape", "name", "layers", "momentum", "kept", "damping", "solves"])
def test_nothing_is_half_loaded(how: str) -> None:
    """A state that does not fit leaves factors, step, momentum and damping as they were."""
    source = make(config("layer_step_momentum"))
    steps(source, 0, 4)
    bad = damaged(source.state_dict(), how)
    kfac = make(config("layer_step_momentum"))
    steps(kfac, 0, 2)
    before = copy.deepcopy(kfac.state_dict())
    with pytest.raises(ValueError, match=r"momentum of layer|damaged|shape"):
        kfac.load_state_dict(bad)
    assert equal(kfac.state_dict(), before)
    steps(kfac, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(kfac.model.parameters(), source.model.parameters(), strict=True))


def resumed_on_ranks(rank: int, world_size: int, strategy: str, state: Any, parameters: Any) -> tuple[Any, Any]:
    """From step 4 on, where curvature is due."""
    run = Run("mlp-categorical", strategy=strategy, options={"coarse": config("layer_step_momentum", max_samples=None)})
    case, model, kfac, optimizer = build(run, world_size)
    if parameters is not None:
        with torch.no_grad():
            for p, value in zip(kfac.model.parameters(), parameters, strict=True):
                p.copy_(value)
        kfac.load_state_dict(state)
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
    first, last = (0, 4) if parameters is None else (4, 7)
    gradients = [advance(run, case, model, kfac, optimizer, step, rank, world_size) for step in range(first, last)]
    result = kfac.state_dict(), [p.detach().clone() for p in kfac.model.parameters()]
    kfac.close()
    return (*result, gradients) if parameters is not None else result


def test_another_world_size_goes_on_alike(ranks: RankPool) -> None:
    """Saved on one rank, resumed on three, whatever the strategy; and saved on three, resumed on one."""
    state, parameters = resumed_on_ranks(0, 1, "comm_opt", None, None)
    many = ranks.run(3, resumed_on_ranks, "mem_opt", None, None)
    wanted = resumed_on_ranks(0, 1, "comm_opt", state, parameters)
    for strategy in ("comm_opt", "mem_opt"):
        for answer in ranks.run(3, resumed_on_ranks, strategy, state, parameters):
            for mine, theirs in zip(answer[1], wanted[1], strict=True):
                assert torch.allclose(mine, theirs, rtol=0, atol=1e-10)
    for saved in many:
        back = resumed_on_ranks(0, 1, "comm_opt", *saved)
        for mine, theirs in zip(back[1], wanted[1], strict=True):
            assert torch.allclose(mine, theirs, rtol=0, atol=1e-10)
