"""The fine damping that follows the loss (Martens and Grosse 2015, section 6.5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import CoarseConfig, DistributionConfig, KFACPreconditioner
from kfac_dist.trust import MAX_REJECTIONS, OMEGA, LevenbergMarquardt
from tests.helpers.cases import Case, cases
from tests.helpers.coarse_runs import relative
from tests.helpers.dense_coarse import FIRST_ID, SEED, Dense, decrease_ratio, flat_gradient
from tests.helpers.ranks import RankPool
from tests.helpers.training import BATCH, train_with_closures

STEPS, START = 24, 0.4
ALL = cases()


def build(case: Case, model: nn.Module, **options: Any) -> KFACPreconditioner:
    defaults = {"likelihood": case.likelihood, "damping": "adaptive", "initial_damping": START, "seed": 7}
    return KFACPreconditioner(model, **(defaults | {"damping_method": "eigen"} | options))


def step(case: Case, kfac: KFACPreconditioner, closure: Callable[[], Any] | None, **options: Any) -> None:
    kfac.model.zero_grad()
    logits = kfac.model(case.x)
    kfac.accumulate(sample_ids=torch.arange(len(case.x)))
    case.loss(logits, case.y).backward()
    kfac.step(closure=closure, **options)


@pytest.mark.parametrize("method", ["factored", "eigen"])
@pytest.mark.parametrize("rejections", [0, 2])
def test_the_direction_is_that_of_the_damping_which_the_loss_accepted(method: str, rejections: int) -> None:
    case = ALL["mlp-categorical"]
    model, other = case.model(), case.model()
    kfac = build(case, model, damping_method=method)
    losses = iter([1.0] + [1.1] * rejections + [0.999])
    step(case, kfac, lambda: next(losses))
    assert next(losses, None) is None
    assert kfac.metrics["damping"] == pytest.approx(4.0**rejections * START)
    fixed = build(case, other, damping_method=method, damping=4.0**rejections * START)
    step(case, fixed, None)
    assert relative(flat_gradient(model), flat_gradient(other)) < 1e-12


@pytest.mark.parametrize(("kl_clip", "lr"), [(None, 0.2), (0.01, 1.0)])
def test_the_ratio_is_true_over_predicted_decrease(kl_clip: float | None, lr: float) -> None:
    """(loss(theta) - loss(theta - lr d)) / (lr <d, grad> - lr^2 d^T (F + damping I) d / 2)."""
    case = ALL["mlp-gaussian"]
    model = case.model()
    kfac = build(case, model, kl_clip=kl_clip, seed=SEED)
    kfac.model.zero_grad()
    logits = kfac.model(case.x)
    kfac.accumulate(sample_ids=torch.arange(FIRST_ID, FIRST_ID + len(case.x)))
    case.loss(logits, case.y).backward()
    kfac.step(lr=lr, closure=lambda: case.loss(model(case.x), case.y))
    dense = Dense(case, case.model(), START, START, "true", 1)
    ratio = kfac.metrics["reduction_ratio"]
    assert ratio == pytest.approx(decrease_ratio(dense, case, model, lr), rel=1e-9)
    factor = OMEGA if ratio > 0.75 else 1 / OMEGA if ratio < 0.25 else 1.0
    assert kfac.state_dict()["damping"]["value"] == pytest.approx(START * factor)


def test_a_loss_that_always_grows_costs_the_step_and_not_the_run() -> None:
    case = ALL["mlp-categorical"]
    model = case.model()
    kfac, grows = build(case, model), iter(range(100))
    step(case, kfac, lambda: float(next(grows)))
    assert next(grows) == 1 + MAX_REJECTIONS
    assert kfac.metrics["abandoned"] == kfac.state_dict()["damping"]["abandoned"] == 1
    assert kfac.state_dict()["damping"]["value"] == pytest.approx(START * 4.0**MAX_REJECTIONS)
    assert torch.equal(flat_gradient(model), torch.zeros_like(flat_gradient(model)))
    step(case, kfac, lambda: case.loss(model(case.x), case.y))
    assert flat_gradient(model).abs().max() > 0


@pytest.mark.parametrize("damping", ["auto", None])
def test_a_coarse_level_has_the_same_damping(damping: str | None) -> None:
    case = ALL["mlp-categorical"]
    model = case.model()
    coarse = CoarseConfig(space="scalar_momentum", damping=damping, max_samples=None)
    kfac = build(case, model, coarse=coarse)
    losses = iter([1.0, 1.1, 0.999])
    step(case, kfac, lambda: next(losses))
    assert kfac.metrics["damping"] == kfac.metrics["coarse/damping"] == pytest.approx(4 * START)
    other = case.model()
    fixed = build(case, other, damping=4 * START, coarse=CoarseConfig(space="scalar_momentum", max_samples=None))
    step(case, fixed, None)
    assert relative(flat_gradient(model), flat_gradient(other)) < 1e-10


def test_refusals() -> None:
    case = ALL["mlp-categorical"]
    with pytest.raises(ValueError, match=r"one verdict, which cannot move two dampings; leave one of them a number"):
        build(case, case.model(), coarse=CoarseConfig(space="layer_step", damping="adaptive"))
    with pytest.raises(ValueError, match=r'^damping="adaptive" compares .*closure=lambda.*or choose a number'):
        step(case, build(case, case.model()), None)


def train(
    rank: int, world_size: int, distribution: str = "comm_opt", steps: int = STEPS, saved: Any = None, at: int = 0
) -> tuple[list[dict[str, float]], list[Tensor], dict[str, Any]]:
    """Metrics by step, parameters and the state; every rank's loss is weighted by its share of the samples."""
    case = cases(BATCH * STEPS)["mlp-categorical"]
    model = case.model()
    kfac = KFACPreconditioner(
        model,
        likelihood="categorical",
        damping="adaptive",
        initial_damping=0.01 if saved is None else 50.0,
        distribution=DistributionConfig(strategy=distribution, average_gradients=world_size > 1),  # type: ignore[arg-type]
        factor_every_n_steps=3,
        inverse_every_n_steps=6,
    )
    if saved is not None:
        kfac.load_state_dict(saved[0])
        with torch.no_grad():
            for p, value in zip(model.parameters(), saved[1], strict=True):
                p.copy_(value)
    return train_with_closures(rank, world_size, case, kfac, range(at, steps), always=False)


def test_the_damping_follows_the_rule() -> None:
    metrics, _, state = train(0, 1)
    rule, rejected = LevenbergMarquardt(0.01), 0
    for number, values in enumerate(metrics):
        rejections = round(math.log(values["damping"] / rule.damping, 4))
        rejected += rejections
        assert values["damping"] == pytest.approx(rule.damping * 4.0**rejections, rel=1e-9)
        rule.damping = values["damping"]
        assert ("reduction_ratio" in values) == (rule.due(number) or rejections > 0)
        if "reduction_ratio" in values:
            rule.judge(values["reduction_ratio"])
    assert state["damping"]["value"] == pytest.approx(rule.damping)
    assert len({values["damping"] for values in metrics}) > 3


@pytest.mark.parametrize(("world_size", "distribution"), [(2, "comm_opt"), (2, "mem_opt"), (3, "comm_opt")])
def test_one_verdict_for_all_ranks(ranks: RankPool, world_size: int, distribution: str) -> None:
    wanted, parameters, state = train(0, 1)
    answers = ranks.run(world_size, train, distribution, timeout=90)
    for metrics, found, other in answers:
        for mine, theirs in zip(metrics, wanted, strict=True):
            assert mine["damping"] == pytest.approx(theirs["damping"], rel=1e-12)
        assert other["damping"] == state["damping"]
        for one, value in zip(found, parameters, strict=True):
            assert torch.allclose(one, value, rtol=1e-7, atol=1e-9)
    for mine, theirs in zip(answers[0][1], answers[-1][1], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("at", [6, 9, 21])
def test_a_run_resumed_on_a_curvature_step_goes_on_bit_by_bit(at: int) -> None:
    wanted = train(0, 1)
    _, parameters, state = train(0, 1, steps=at)
    metrics, found, after = train(0, 1, saved=(state, parameters), at=at)
    assert [values["damping"] for values in metrics] == [values["damping"] for values in wanted[0][at:]]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted[1], strict=True))
    assert after["damping"] == wanted[2]["damping"]


@pytest.mark.parametrize("spoiled", [{}, {"value": 0.0}, {"value": "x"}, {"again": None, "abandoned": "x"}])
def test_a_damaged_state_is_refused(spoiled: dict[str, Any]) -> None:
    case = ALL["mlp-categorical"]
    kfac = build(case, case.model())
    step(case, kfac, lambda: 1.0)
    state = kfac.state_dict()
    state["damping"] = state["damping"] | spoiled if spoiled else {}
    fresh = build(case, case.model())
    with pytest.raises(ValueError, match="adaptive damping is damaged"):
        fresh.load_state_dict(state)
    assert fresh.state_dict()["damping"] == {"value": START, "again": False, "abandoned": 0}


def test_a_state_without_an_adaptive_damping_starts_it_afresh() -> None:
    case = ALL["mlp-categorical"]
    kfac = build(case, case.model(), damping=0.1)
    step(case, kfac, None)
    fresh = build(case, case.model())
    with pytest.warns(UserWarning, match="damping"):
        fresh.load_state_dict(kfac.state_dict())
    assert fresh.state_dict()["damping"]["value"] == START
