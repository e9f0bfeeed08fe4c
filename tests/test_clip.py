"""The KL clip: nu = min(1, sqrt(kappa / sum_i lr_i^2 <zeta_i, grad_i>)), signed, once, after everything else."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from kfac_dist import KFACPreconditioner
from kfac_dist.clip import kl_clip_scale
from tests.helpers.cases import cases

CASE = cases()["mlp-categorical"]


def directions(
    kl_clip: float | None, lr: object = 1.0, **options: object
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``.grad`` before and after the step."""
    model = CASE.model()
    kfac = KFACPreconditioner(model, likelihood="categorical", kl_clip=kl_clip, **options)  # type: ignore[arg-type]
    logits = model(CASE.x)
    kfac.accumulate(sample_ids=torch.arange(12))
    CASE.loss(logits, CASE.y).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    kfac.step(lr=lr(model) if callable(lr) else lr)  # type: ignore[arg-type]
    values = dict(kfac.metrics)
    found = {name: p.grad for name, p in model.named_parameters()}
    assert values["direction_norm"] == pytest.approx(float(torch.stack([g.norm() for g in found.values()]).norm()))
    assert values["grad_norm"] == pytest.approx(float(torch.stack([g.norm() for g in before.values()]).norm()))
    return before, found


def test_the_scale_is_the_formula() -> None:
    products = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    rates = torch.tensor([0.1, 0.2, 1.0], dtype=torch.float64)
    change = 0.01 * 3 - 0.04 * 1 + 0.5  # signed
    assert kl_clip_scale(0.1, products, rates).item() == pytest.approx((0.1 / change) ** 0.5, rel=1e-12)
    assert kl_clip_scale(change * 1.01, products, rates).item() == 1.0
    assert kl_clip_scale(1e-3, -products, rates).item() == 1.0  # no descent direction: nothing to bound
    assert kl_clip_scale(1e-3, torch.zeros(2), torch.ones(2)).item() == 1.0
    assert kl_clip_scale(1e-3, torch.tensor([float("nan")]), torch.ones(1)).isnan()


@pytest.mark.parametrize("lr", [1.0, 0.1])
def test_a_number(lr: float) -> None:
    gradient, zeta = directions(None)
    inner = sum(float((zeta[name] * gradient[name]).sum()) for name in zeta)
    kappa = 0.3 * lr**2 * inner
    _, clipped = directions(kappa, lr)
    for name, value in clipped.items():
        assert torch.allclose(value, zeta[name] * 0.3**0.5, rtol=1e-12)
    _, free = directions(1.1 * lr**2 * inner, lr)
    assert all(torch.allclose(free[name], zeta[name], rtol=1e-12) for name in zeta)


def test_an_optimizer_gives_every_layer_the_rate_of_its_group() -> None:
    def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        slow = list(model[0].parameters())
        rest = [*model[2].parameters(), *model[4].parameters()]
        return torch.optim.SGD([{"params": slow, "lr": 0.1}, {"params": rest, "lr": 0.7}])

    gradient, zeta = directions(None)
    rates = {name: 0.1 if name.startswith("0.") else 0.7 for name in zeta}
    change = sum(rates[name] ** 2 * float((zeta[name] * gradient[name]).sum()) for name in zeta)
    _, clipped = directions(0.5 * change, optimizer)
    for name, value in clipped.items():
        assert torch.allclose(value, zeta[name] * 0.5**0.5, rtol=1e-10)


def test_an_optimizer_without_a_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="optimizer given as lr does not hold the weights of 2, 4"):
        directions(0.1, lambda model: torch.optim.SGD(model[0].parameters(), lr=0.1))


def test_without_lr_it_takes_one_and_warns_once() -> None:
    model = CASE.model()
    kfac = KFACPreconditioner(model, likelihood="categorical", kl_clip=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model.zero_grad()
            logits = model(CASE.x)
            kfac.accumulate(sample_ids=torch.arange(12))
            CASE.loss(logits, CASE.y).backward()
            kfac.step()
    assert [str(w.message) for w in caught] == [
        "kl_clip is set but step() got no lr: the clip takes lr = 1; pass the optimizer"
    ]
    assert kfac.metrics["kl_clip_scale"] < 1


def test_the_metrics_hold_what_was_written() -> None:
    gradient, zeta = directions(None)
    inner = sum(float((zeta[name] * gradient[name]).sum()) for name in zeta)
    model = CASE.model()
    kfac = KFACPreconditioner(model, likelihood="categorical", kl_clip=inner / 4)
    logits = model(CASE.x)
    kfac.accumulate(sample_ids=torch.arange(12))
    CASE.loss(logits, CASE.y).backward()
    kfac.step(lr=1.0)
    assert kfac.metrics["kl_clip_scale"] == pytest.approx(0.5)
    assert kfac.metrics["direction_dot_gradient"] == pytest.approx(inner / 2)
