"""The learning-rate-free mode asks for SGD(lr=1, momentum=0), and protects the parameters that K-FAC does not cover."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from kfac_dist import CoarseConfig, KFACPreconditioner, rate_free_optimizer

SPACES = ["layer_step_momentum", "scalar_momentum"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def build(model: nn.Module, space: str) -> KFACPreconditioner:
    return KFACPreconditioner(
        model, likelihood="categorical", coarse=CoarseConfig(space=space, damping=0.1), skip_layers="LayerNorm"
    )


def step(kfac: KFACPreconditioner, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    logits = kfac.model(torch.randn(8, 5))
    kfac.accumulate()
    nn.functional.cross_entropy(logits, torch.arange(8) % 3).backward()
    kfac.step(lr=optimizer)
    optimizer.step()


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("space", SPACES)
def test_an_uncovered_parameter_at_lr_1_is_refused(space: str) -> None:
    model = net()
    kfac = build(model, space)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"'{space}'.*2 parameters.*not cover.*\(6,\).*parameter_groups"):
        step(kfac, torch.optim.SGD(model.parameters(), lr=1.0))
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("space", SPACES)
def test_parameter_groups_are_the_cure(space: str) -> None:
    model = net()
    kfac = build(model, space)
    groups = kfac.parameter_groups(lr=1.0, uncovered_lr=0.05, uncovered_momentum=0.9)
    assert [len(group["params"]) for group in groups] == [4, 2]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.parameters()}
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert [(g["lr"], g["momentum"]) for g in optimizer.param_groups] == [(1.0, 0.0), (0.05, 0.9)]
    with silence():
        for _ in range(3):
            step(kfac, optimizer)
    assert kfac.metrics["corrected"] == 1


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), r"lr=0\.1, momentum=0\b"),
        (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), r"lr=1, momentum=0\.9"),
        (lambda p: torch.optim.Adam(p, lr=1.0), r"lr=1, momentum=0\.9"),
    ],
)
def test_an_optimizer_with_a_rate_or_a_momentum_of_its_own_warns_once(space: str, make: Callable, named: str) -> None:
    model = plain()
    kfac, optimizer = build(model, space), make(model.parameters())
    with pytest.warns(UserWarning, match=rf"'{space}'.*SGD\(lr=1, momentum=0\).*{named}"):
        step(kfac, optimizer)
    with silence():
        step(kfac, optimizer)


def test_the_right_optimizer_is_silent() -> None:
    for space in SPACES:
        model = plain()
        with silence():
            step(build(model, space), torch.optim.SGD(model.parameters(), lr=1.0))
    frozen = net()
    frozen[1].requires_grad_(False)  # what is not trained cannot diverge
    with silence():
        step(build(frozen, "layer_step_momentum"), torch.optim.SGD(frozen.parameters(), lr=1.0))


@pytest.mark.parametrize("space", ["layer_step", "scalar", "nicolaides"])
def test_spaces_without_a_momentum_ask_for_nothing(space: str) -> None:
    model = net()
    with silence():
        step(build(model, space), torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5))


def test_check_optimizer_says_it_before_the_first_step() -> None:
    model = net()
    kfac = build(model, "layer_step_momentum")
    with pytest.raises(ValueError, match="parameter_groups"):
        kfac.check_optimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    with silence():
        kfac.check_optimizer(torch.optim.SGD(kfac.parameter_groups(lr=1.0, uncovered_lr=0.1)))


def test_what_check_optimizer_said_is_not_said_again_by_the_step() -> None:
    model = plain()
    kfac, optimizer = build(model, "layer_step_momentum"), torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.warns(UserWarning, match="chooses step sizes and momentum itself"):
        kfac.check_optimizer(optimizer)
    with silence():
        step(kfac, optimizer)


@pytest.mark.parametrize("space", SPACES)
def test_the_optimizer_that_fits(space: str) -> None:
    model = net()
    kfac = build(model, space)
    optimizer = rate_free_optimizer(model, uncovered_lr=0.25, uncovered_momentum=0.5, skip_layers="LayerNorm")
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.25]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.0, 0.5]
    with silence():
        step(kfac, optimizer)


@pytest.mark.parametrize("options", [{"uncovered_lr": 0.0}, {"uncovered_lr": -1}, {"uncovered_momentum": 1.5}])
def test_rates_that_cannot_be(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be a finite number"):
        rate_free_optimizer(net(), **options)
