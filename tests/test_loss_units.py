"""Directions are in units of the mean negative log-likelihood, whatever usual loss they were made from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import CoarseConfig, DistributionConfig, KFACPreconditioner, parameter_groups


def regression() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(4, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    return nn.Linear(4, 3).double(), x, y


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [(nn.MSELoss(), "mean_all"), (nn.MSELoss(), 2 / 3), (lambda f, y: 0.5 * (f - y).square().sum() / len(y), "mean")],
)
def test_one_natural_step_solves_a_linear_regression(loss, reduction):
    model, x, y = regression()
    kfac = KFACPreconditioner(
        model,
        likelihood="gaussian",
        fisher_samples="exact",
        damping=1e-10,
        damping_method="eigen",
        loss_reduction=reduction,
        coarse=CoarseConfig(space="layer_step", max_samples=None),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    output = model(x)
    kfac.accumulate()
    loss(output, y).backward()
    kfac.step(lr=optimizer)
    optimizer.step()
    assert float(F.mse_loss(model(x), y)) < 1e-12


def test_a_layer_that_never_fires_is_refused_at_rate_one():
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.unseen = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.seen(x), self.unseen.weight, self.unseen.bias)

    model = Direct()
    kfac = KFACPreconditioner(model, likelihood="gaussian", coarse=CoarseConfig(space="layer_step_momentum"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    output = model(torch.randn(8, 4))
    kfac.accumulate()
    output.square().sum().backward()
    with (
        pytest.warns(UserWarning, match="these layers keep their plain gradient: unseen"),
        pytest.raises(ValueError, match=r"2 parameters that K-FAC does not cover.*parameter_groups"),
    ):
        kfac.step(lr=optimizer)


def test_parameter_groups_without_a_preconditioner():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2))
    covered, rest = parameter_groups(model, lr=1.0, uncovered_lr=0.01, uncovered_momentum=0.9, skip_layers=["^2$"])
    assert {id(p) for p in covered["params"]} == {id(p) for p in model[0].parameters()}
    assert {id(p) for p in rest["params"]} == {id(p) for m in model[1:] for p in m.parameters()}
    assert (covered["lr"], covered["momentum"], rest["lr"], rest["momentum"]) == (1.0, 0.0, 0.01, 0.9)


def scaled_average(rank: int, world_size: int) -> None:
    model = nn.Linear(3, 2)
    distribution = DistributionConfig(average_gradients=True)
    kfac = KFACPreconditioner(model, likelihood="empirical", distribution=distribution)
    model(torch.ones(4, 3)).sum().backward()
    with pytest.raises(ValueError, match=r"average_gradients=True with grad_scale=8.0.*DistributedDataParallel"):
        kfac.step(grad_scale=8.0)
    kfac.close()


def test_a_gradient_scaler_and_averaging_do_not_go_together(ranks):
    assert ranks.run(2, scaled_average) == [None, None]
