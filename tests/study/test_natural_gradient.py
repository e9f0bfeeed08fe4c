from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_dist.config import KFACConfig
from kfac_dist.study.dense_fisher import sampled_cotangents
from kfac_dist.study.natural_gradient import NaturalGradient, build_natural_gradient
from kfac_dist.study.plan import Budget, StudyPlan
from kfac_dist.study.run import train
from kfac_dist.study.runner import available, make_run
from kfac_dist.study.suite import PROBLEMS

DAMPING, LR = 0.02, 0.3
B, INPUTS, OUTPUTS = 30, 4, 3


class Regression:
    """A linear map under the squared error (1/2) ||f - y||^2, whose Fisher matrix can be written down."""

    def __init__(self, **settings) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(INPUTS, OUTPUTS).double()
        self.x, self.y = (torch.randn(B, n, dtype=torch.float64) for n in (INPUTS, OUTPUTS))
        self.config = KFACConfig(likelihood="gaussian", damping=DAMPING, seed=5, **settings)
        self.exact = NaturalGradient(self.net, self.config)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=LR)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient and the direction, (OUTPUTS, INPUTS + 1)."""
        self.net.zero_grad()
        (0.5 * (self.net(self.x) - self.y).square().sum() / B).backward()
        gradient = self.matrix()
        self.exact.step(self.optimizer)
        return gradient, self.matrix()

    def matrix(self) -> torch.Tensor:
        return torch.cat([self.net.weight.grad, self.net.bias.grad[:, None]], 1)

    @property
    def rows(self) -> torch.Tensor:
        return torch.cat([self.x, torch.ones(B, 1, dtype=torch.float64)], 1)


def test_a_linear_map_gets_the_damped_gauss_newton_step_of_the_sampled_fisher() -> None:
    problem = Regression()
    for step in range(2):  # with samples of its own in each
        gradient, direction = problem.step()
        noise = next(sampled_cotangents(problem.config, step, problem.net(problem.x)))[0]
        U = torch.einsum("bo,bi->boi", noise, problem.rows).flatten(1)
        fisher = U.T @ U / B + DAMPING * torch.eye(U.shape[1], dtype=torch.float64)
        torch.testing.assert_close(direction.flatten(), torch.linalg.solve(fisher, gradient.flatten()))


def test_with_the_exact_fisher_it_is_the_ridge_regression() -> None:
    gradient, direction = Regression(fisher_samples="exact").step()
    problem = Regression()
    A = problem.rows.T @ problem.rows / B + DAMPING * torch.eye(INPUTS + 1, dtype=torch.float64)
    torch.testing.assert_close(direction, torch.linalg.solve(A, gradient.T).T)


@pytest.mark.parametrize("kappa", [1e-6, 1e6])
def test_the_clip_is_that_of_kfac(kappa: float) -> None:
    _, free = Regression().step()
    gradient, clipped = Regression(kl_clip=kappa).step()
    nu = min(1.0, (kappa / (LR**2 * float((free * gradient).sum()))) ** 0.5)
    torch.testing.assert_close(clipped, nu * free)
    assert (nu < 1) == (kappa < 1)


def test_a_step_without_a_forward_and_settings_it_does_not_know_are_refused() -> None:
    problem = Regression()
    problem.step()
    with pytest.raises(RuntimeError, match="no forward pass was seen"):
        problem.exact.step(problem.optimizer)
    for changes, message in (
        ({"damping": "adaptive"}, "damping='adaptive' must be a number"),
        ({"loss_reduction": "mean_all"}, "loss_reduction='mean_all': the exact natural gradient knows"),
    ):
        with pytest.raises(ValueError, match=message):
            NaturalGradient(problem.net, KFACConfig(likelihood="gaussian", **changes))


def test_it_is_for_small_problems_only() -> None:
    settings = {"lr": 0.1, "damping": 0.01, "kl_clip": 0.01}
    run = make_run("mnist_autoencoder", "natural_gradient", settings, seed=0, label="test", epochs=1)
    with pytest.raises(ValueError, match="'mnist_autoencoder': it needs a problem of at most 20000 covered parameters"):
        next(train(run, PROBLEMS["tiny"].data()))
    with pytest.raises(ValueError, match="at most 20000"):
        build_natural_gradient(nn.Linear(200, 100), {"likelihood": "gaussian"}, settings | {"momentum": 0.9}, 0)
    assert available("tiny", ["sgd", "natural_gradient"]) == (["sgd", "natural_gradient"], {})
    names, reasons = available("mnist_autoencoder", ["sgd", "natural_gradient"])
    assert (names, list(reasons)) == (["sgd"], ["natural_gradient"])
    assert "digits_cnn, tiny" in reasons["natural_gradient"]
    problems = {"tiny": Budget(), "mnist_autoencoder": Budget()}
    plan = StudyPlan(title="", problems=problems, methods=["sgd", "natural_gradient"])
    assert plan.methods_of("tiny") == ("sgd", "natural_gradient")
    assert plan.methods_of("mnist_autoencoder") == ("sgd",)
    assert list(plan.left_out()) == ["natural_gradient"]
