"""A two-level run that is resumed at any step: bit by bit from a curvature step, with new samples from any other."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_dist import CoarseConfig, KFACPreconditioner
from tests.helpers.cases import cases
from tests.helpers.ranks import RankPool
from tests.helpers.training import Run, advance, build
from tests.test_state import assert_state_equal

STEPS, CURVATURE, BATCH = 7, 2, 12
CASE = cases(BATCH * STEPS)["mlp-categorical"]


def decreasing(step: int) -> float:
    return 0.1 / (step + 1)


KINDS: dict[str, dict[str, Any]] = {
    "adaptive": {"coarse": CoarseConfig(space="layer_step_momentum", damping="adaptive")},
    "auto with a loss": {"coarse": CoarseConfig(space="scalar_momentum", damping="auto")},
    "schedule": {"coarse": CoarseConfig(space="residual", damping=decreasing), "damping": decreasing},
    "input side": {"coarse": CoarseConfig(space="layer_step", damping=0.1), "factor_sides": "input"},
    "eigen": {"coarse": CoarseConfig(space="spectral", vectors_per_layer=2), "damping_method": "eigen"},
    "every third": {"coarse": CoarseConfig(space="layer_step", damping=0.1, every_n_steps=3)},
}


def make(kind: str) -> KFACPreconditioner:
    options = {"damping": 0.03, "factor_every_n_steps": CURVATURE, "inverse_every_n_steps": 3, "kl_clip": 0.01}
    return KFACPreconditioner(CASE.model(), likelihood="categorical", **options | KINDS[kind])


def step(kfac: KFACPreconditioner, number: int) -> None:
    """SGD(lr=1)."""
    part = torch.arange(BATCH * number, BATCH * (number + 1))
    kfac.model.zero_grad()
    logits = kfac.model(CASE.x[part])
    kfac.accumulate(sample_ids=part)
    CASE.loss(logits, CASE.y[part]).backward()
    closure: Callable[[], Tensor] | None = None
    if kfac.uses_loss:
        closure = lambda: CASE.loss(kfac.model(CASE.x[part]), CASE.y[part])  # noqa: E731
    kfac.step(lr=1.0, closure=closure)
    with torch.no_grad():
        for p in kfac.model.parameters():
            p -= p.grad


def snapshot(kfac: KFACPreconditioner) -> dict[str, Any]:
    """Through a file."""
    file = io.BytesIO()
    torch.save({"model": kfac.model.state_dict(), "kfac": kfac.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_at_any_step(kind: str) -> None:
    whole, saved = make(kind), []
    for number in range(STEPS):
        saved.append(snapshot(whole))
        step(whole, number)
    for first, state in enumerate(saved):
        kfac = make(kind)
        kfac.model.load_state_dict(state["model"])
        kfac.load_state_dict(state["kfac"])
        assert_state_equal(kfac.state_dict(), state["kfac"])
        for number in range(first, STEPS):
            step(kfac, number)
            assert kfac.metrics["corrected"] == 1
        if first % CURVATURE == 0:
            assert_state_equal(kfac.model.state_dict(), whole.model.state_dict())
            assert_state_equal(kfac.state_dict(), whole.state_dict())
        assert kfac.state_dict()["counts"] == whole.state_dict()["counts"]  # the cadence goes on in any case
        assert kfac.metrics["coarse/failures"] == 0


def test_samples_that_were_captured_anew_serve_until_the_next_curvature_step() -> None:
    """Where this differs from the uninterrupted run, and where it does not."""
    whole = make("input side")
    for number in range(3):
        step(whole, number)
    state = snapshot(whole)
    kfac = make("input side")
    kfac.model.load_state_dict(state["model"])
    kfac.load_state_dict(state["kfac"])
    step(whole, 3)
    step(kfac, 3)
    assert kfac.metrics["coarse/decrease"] != whole.metrics["coarse/decrease"]
    assert_state_equal(kfac.state_dict()["layers"], whole.state_dict()["layers"])


def trained(rank: int, world_size: int, strategy: str, first: int, last: int, state: Any) -> Any:
    """Steps first .. last - 1 of one run from a saved state; weights, optimizer and K-FAC."""
    options = {"coarse": CoarseConfig(space="layer_step_momentum", damping=0.1, max_samples=None)}
    run = Run("mlp-categorical", strategy=strategy, options=options)
    case, model, kfac, optimizer = build(run, world_size)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        kfac.load_state_dict(state["kfac"])
    for number in range(first, last):
        advance(run, case, model, kfac, optimizer, number, rank, world_size)
    result = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "kfac": kfac.state_dict()}
    kfac.close()
    return copy.deepcopy(result)


@pytest.mark.filterwarnings("ignore:.*chooses step sizes and momentum itself")
def test_two_ranks_go_on_bit_by_bit_from_a_curvature_step(ranks: RankPool) -> None:
    for strategy in ("comm_opt", "mem_opt"):
        wanted = ranks.run(2, trained, strategy, 0, STEPS, None)
        for first in (2, 4, 6):
            saved = ranks.run(2, trained, strategy, 0, first, None)
            assert_state_equal(saved[1], saved[0])
            assert_state_equal(ranks.run(2, trained, strategy, first, STEPS, saved[0]), wanted)


@pytest.mark.filterwarnings("ignore:.*chooses step sizes and momentum itself")
def test_one_two_three_and_one_rank_again(ranks: RankPool) -> None:
    wanted, state, first = trained(0, 1, "comm_opt", 0, STEPS, None), None, 0
    for world_size, last, strategy in (
        (1, 2, "comm_opt"),
        (2, 4, "mem_opt"),
        (3, 6, "comm_opt"),
        (1, STEPS, "mem_opt"),
    ):
        jobs = (trained, strategy, first, last, state)
        state = ranks.run(world_size, *jobs)[0] if world_size > 1 else trained(0, 1, *jobs[1:])
        first = last
    for name, value in wanted["model"].items():
        torch.testing.assert_close(state["model"][name], value, rtol=0, atol=1e-10)
