from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfac_dist import KFACPreconditioner
from kfac_dist.config import KFACConfig
from kfac_dist.layers import find_layers
from kfac_dist.study.dense_fisher import DenseFisher, sampled_cotangents

DAMPING = 3e-3


def fisher_of(draws: int = 1) -> tuple[DenseFisher, torch.Tensor]:
    """More samples than it takes to be interesting, fewer than parameters; and a gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(20, 4, dtype=torch.float64)
    config = KFACConfig(likelihood="categorical", seed=3, fisher_samples=draws)
    fisher = DenseFisher(net, find_layers(net).layers, x, sampled_cotangents(config, 7, net(x)))
    return fisher, torch.randn(len(fisher.U), dtype=torch.float64)


@pytest.mark.parametrize("draws", [1, 3])
def test_products_and_solutions_are_those_of_the_dense_matrix(draws: int) -> None:
    fisher, vector = fisher_of(draws)
    dense = fisher.damped(DAMPING)
    assert dense.shape == (43, 43)
    torch.testing.assert_close(fisher.solve(vector, DAMPING), torch.linalg.solve(dense, vector), rtol=1e-9, atol=1e-9)
    assert fisher.energy(vector, DAMPING) == pytest.approx(float(vector @ dense @ vector), rel=1e-12)


def test_errors_are_those_of_the_dense_formulas() -> None:
    fisher, gradient = fisher_of()
    dense, d = fisher.damped(DAMPING), torch.randn(43, dtype=torch.float64)
    exact = torch.linalg.solve(dense, gradient)
    norm = float(exact @ dense @ exact)
    scales = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    apart = scales[:, None] * d * float(exact @ dense @ d / (d @ dense @ d)) - exact
    expected = (
        (float((d - exact) @ dense @ (d - exact)) / norm) ** 0.5,
        (float(torch.einsum("ni,ij,nj->n", apart, dense, apart).min()) / norm) ** 0.5,
    )
    found, exactly, halved, turned = fisher.errors(gradient, [d, exact, exact / 2, -exact], DAMPING)
    assert found == pytest.approx(expected, rel=1e-9)
    assert exactly == pytest.approx((0, 0), abs=1e-6)
    assert halved == pytest.approx((0.5, 0), abs=1e-6)
    assert turned == pytest.approx((2, 0), abs=1e-6)
    assert fisher.errors(gradient, [torch.zeros_like(d)], DAMPING)[0] == pytest.approx((1, 1))


def test_vectors_are_the_layers_in_order() -> None:
    fisher, vector = fisher_of()
    parts = fisher.unflatten(vector)
    assert [part.shape for part in parts.values()] == [(1, 5, 5), (1, 3, 6)]
    assert torch.equal(fisher.flatten(parts), vector)


@pytest.mark.parametrize("draws", [2, "exact"])
def test_the_targets_are_those_that_kfac_draws(draws) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    kfac = KFACPreconditioner(net, "categorical", fisher_samples=draws, seed=3, factor_every_n_steps=1)
    x, of_steps = torch.randn(20, 4, dtype=torch.float64), []
    for step in range(2):
        logits = net(x)
        kfac.accumulate()
        F.cross_entropy(logits, torch.zeros(20).long()).backward()
        kfac.step()
        of_steps.append(sum(weight * c.T @ c / 20 for c, weight in sampled_cotangents(kfac.config, step, logits)))
        average = kfac.state_dict()["layers"]["2"]["factors"]["G"][0]
        torch.testing.assert_close(average, sum(of_steps) / len(of_steps))
    kfac.close()


def test_what_cannot_be_is_refused() -> None:
    net = nn.Linear(200, 100)
    with pytest.raises(ValueError, match="20100 covered parameters: a dense Fisher is for at most 20000"):
        DenseFisher(net, find_layers(net).layers, torch.zeros(1, 200), [])
    with pytest.raises(ValueError, match="draws no targets: name the likelihood"):
        next(sampled_cotangents(KFACConfig(likelihood="empirical"), 0, torch.zeros(2, 3)))
