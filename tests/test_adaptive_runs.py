"""The adaptive coarse damping over many steps: one verdict for all ranks, the state, and what is asked of the loop."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_dist import CoarseConfig, DistributionConfig, KFACPreconditioner
from kfac_dist.trust import LevenbergMarquardt
from tests.helpers.cases import cases
from tests.helpers.ranks import RankPool
from tests.helpers.training import BATCH, train_with_closures

STEPS = 24


def train(
    rank: int, world_size: int, start: float, steps: int = STEPS, **options: Any
) -> tuple[list[dict[str, float]], list[Tensor], dict[str, Any]]:
    """Metrics by step, parameters and the state; every rank's loss is weighted by its share of the samples."""
    case = cases(BATCH * STEPS)["mlp-categorical"]
    model = case.model()
    coarse = CoarseConfig(
        space="layer_step_momentum", damping="adaptive", initial_damping=start, max_samples=None, **options
    )
    distribution = DistributionConfig(average_gradients=world_size > 1)
    kfac = KFACPreconditioner(
        model, likelihood="categorical", coarse=coarse, distribution=distribution, factor_every_n_steps=3, seed=3
    )
    return train_with_closures(rank, world_size, case, kfac, range(steps))


@pytest.mark.parametrize("start", [1e-4, 1.0, 1e3])
def test_the_damping_follows_the_rule(start: float) -> None:
    """After rejections, each of which is a factor of 4, the ratio of the step that was taken moves it."""
    metrics, _, state = train(0, 1, start)
    rule = LevenbergMarquardt(start)
    for number, values in enumerate(metrics):
        rejections = math.log(values["coarse/damping"] / rule.damping, 4)
        assert rejections == pytest.approx(round(rejections), abs=1e-9)
        assert round(rejections) >= 0
        rule.damping = values["coarse/damping"]
        if rule.due(number):
            rule.judge(values["coarse/reduction_ratio"])
    assert state["coarse"]["damping"] == pytest.approx(rule.damping)
    assert state["coarse"]["damping"] != start


@pytest.mark.parametrize("start", [1e-3, 3.0])
def test_one_verdict_for_all_ranks(start: float, ranks: RankPool) -> None:
    """The ranks' own losses differ; ratio and damping do not, and equal those of one rank on the whole batch."""
    wanted, parameters, state = train(0, 1, start)
    for world_size in (2, 3):
        answers = ranks.run(world_size, train, start, timeout=90)
        for metrics, found, other in answers:
            for mine, theirs in zip(metrics, wanted, strict=True):
                assert mine["coarse/damping"] == pytest.approx(theirs["coarse/damping"], rel=1e-12)
                assert mine["coarse/reduction_ratio"] == pytest.approx(theirs["coarse/reduction_ratio"], rel=1e-6)
            assert other["coarse"]["damping"] == state["coarse"]["damping"]
            assert other["coarse"]["again"] == state["coarse"]["again"]
            for one, value in zip(found, parameters, strict=True):
                assert torch.allclose(one, value, rtol=1e-7, atol=1e-9)
        for mine, theirs in zip(answers[0][1], answers[-1][1], strict=True):
            assert torch.equal(mine, theirs)
        traffic = [metrics.get("bytes/adaptive", 0) for metrics in answers[0][0]]
        assert all(size > 0 and size % 56 == 0 for size in traffic[:20])  # seven numbers per trial
        assert 0 in traffic[20:]


def test_without_a_closure() -> None:
    case = cases()["mlp-categorical"]

    def first_step(coarse: str | CoarseConfig, **options: Any) -> KFACPreconditioner:
        model = case.model()
        kfac = KFACPreconditioner(model, likelihood="categorical", damping=0.02, coarse=coarse)
        logits = model(case.x)
        kfac.accumulate()
        case.loss(logits, case.y).backward()
        kfac.step(**options)
        return kfac

    adaptive = CoarseConfig(space="layer_step", damping="adaptive", initial_damping=7.0)
    with pytest.raises(ValueError, match=r"'?\"?adaptive.*closure=lambda.*or choose a number"):
        first_step(adaptive)
    assert first_step(adaptive, closure=lambda: 1.0).metrics["coarse/damping"] == 7.0
    with pytest.warns(UserWarning, match=r"cannot adapt, because step\(\) got no closure.*closure=lambda"):
        kfac = first_step("layer_step_momentum")  # its bare name means "where there is a loss"
    assert kfac.metrics["coarse/damping"] == 0.02
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac = first_step("layer_step_momentum", closure=lambda: 1.0)
        assert kfac.metrics["coarse/damping"] == 1.0
        assert first_step("layer_step").metrics["coarse/damping"] == 0.02


@pytest.mark.parametrize("at", [9, 21])
def test_the_state_keeps_the_damping(at: int) -> None:
    """A run that is resumed on a curvature step goes on with the damping it had, bit by bit."""
    wanted = train(0, 1, 0.01)
    case = cases(BATCH * STEPS)["mlp-categorical"]
    _, parameters, state = train(0, 1, 0.01, steps=at)
    model = case.model()
    with torch.no_grad():
        for p, value in zip(model.parameters(), parameters, strict=True):
            p.copy_(value)
    coarse = CoarseConfig(space="layer_step_momentum", damping="adaptive", initial_damping=50.0, max_samples=None)
    kfac = KFACPreconditioner(model, likelihood="categorical", coarse=coarse, factor_every_n_steps=3, seed=3)
    kfac.load_state_dict(state)
    for step in range(at, STEPS):
        part = torch.arange(step * BATCH, (step + 1) * BATCH)
        model.zero_grad()
        logits = model(case.x[part])
        kfac.accumulate(sample_ids=part)
        (case.sum_loss(logits, case.y[part]) * (1 / BATCH)).backward()
        kfac.step(closure=lambda part=part: case.sum_loss(model(case.x[part]), case.y[part]) * (1 / BATCH))
        assert kfac.metrics["coarse/damping"] == wanted[0][step]["coarse/damping"]
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), wanted[1], strict=True))
    assert kfac.state_dict()["coarse"]["damping"] == wanted[2]["coarse"]["damping"]
    kfac.close()


@pytest.mark.parametrize("again", [False, True])
def test_the_state_keeps_whether_the_next_step_is_checked(again: bool) -> None:
    _, parameters, state = train(0, 1, 0.01, steps=21)
    case = cases(BATCH * STEPS)["mlp-categorical"]
    model, calls = case.model(), 0
    coarse = CoarseConfig(space="layer_step_momentum", damping="adaptive", max_samples=None)
    kfac = KFACPreconditioner(model, likelihood="categorical", coarse=coarse, factor_every_n_steps=3, seed=3)
    state["coarse"]["again"] = again
    kfac.load_state_dict(state)

    def closure() -> float:
        nonlocal calls
        calls += 1
        return 1.0 - 0.1 * calls

    with torch.no_grad():
        for p, value in zip(model.parameters(), parameters, strict=True):
            p.copy_(value)
    logits = model(case.x[:BATCH])
    kfac.accumulate()
    case.loss(logits, case.y[:BATCH]).backward()
    kfac.step(closure=closure)
    assert calls == (2 if again else 0)
    kfac.close()
