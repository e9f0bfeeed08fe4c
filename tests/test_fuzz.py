"""Any configuration either trains or is refused before the first step."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kfac_dist import CoarseConfig, DistributionConfig, KFACPreconditioner
from kfac_dist.coarse import coarse_spaces
from kfac_dist.schedules import ExponentialDamping

GOOD: dict[str, list[Any]] = {
    "likelihood": ["categorical", "gaussian", "bernoulli", "empirical"],
    "fisher_samples": [1, 3, "exact"],
    "damping": [1e-3, 1, ExponentialDamping(0.1, 0.5, 0.01), "adaptive"],
    "damping_method": ["factored", "eigen"],
    "factor_sides": ["both", "input"],
    "factor_decay": [0.0, 0.5, 0.95],
    "factor_every_n_steps": [1, 2, 10],
    "inverse_every_n_steps": [1, 3, 100],
    "inverse_schedule": ["together", "staggered"],
    "factor_samples": [1, 1.0, 0.5],
    "kl_clip": [None, 1e-3, 1],
    "loss_reduction": ["mean", "sum", "mean_all", 0.5],
    "skip_layers": [(), "^0$", ("Norm", "last")],
    "distribution": ["comm_opt", "mem_opt", 0.5, DistributionConfig(backend="single")],
    "seed": [0, 7],
    "kfac_approx": ["expand", "reduce", {"0": "reduce"}],
    "max_factor_dim": [1, 3, 8192],
    "large_factors": ["blocks", "diagonal"],
    "norm_blocks": ["diagonal", "channel", "full"],
    "uncovered": ["plain", "diagonal"],
    "initial_damping": [0.3, 5.0],
    "preconditioning": ["auto", "gradients", "samples"],
}
BAD: dict[str, list[Any]] = {
    "likelihood": ["poisson"],
    "fisher_samples": [0, 1.5],
    "damping": [0.0, -1, math.nan],
    "damping_method": ["tikhonov"],
    "factor_sides": ["output"],
    "factor_decay": [1.0, -0.5],
    "factor_every_n_steps": [0],
    "inverse_every_n_steps": [-3],
    "inverse_schedule": ["never"],
    "factor_samples": [0.0, 1.5],
    "kl_clip": [0.0, math.inf],
    "loss_reduction": ["median", 0.0],
    "skip_layers": ["(", (".",)],  # the last one leaves nothing to precondition
    "distribution": ["fsdp", 0.0],
    "seed": [-1],
    "kfac_approx": ["sum"],
    "max_factor_dim": [0],
    "large_factors": ["dense"],
    "norm_blocks": ["dense"],
    "uncovered": ["skip"],
    "initial_damping": [0.0],
    "preconditioning": ["rows"],
}
SPACES: dict[str, list[Any]] = {
    "space": list(coarse_spaces),
    "vectors_per_layer": [1, 2],
    "correction": [None, "error_minimizing", "additive", "deflated", "balanced"],
    "every_n_steps": [1, 2],
    "max_samples": ["auto", None, 4],
    "damping": [None, 0.1, "adaptive", "auto"],
    "initial_damping": [1.0],
}


class Net(nn.Module):
    """A weight shared over positions, a norm, a parameter of no layer's, and logits (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.PReLU())
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x).mean(1))


def choose(draw: st.DrawFn, table: dict[str, list[Any]]) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(table)), unique=True, max_size=8))
    return {name: draw(st.sampled_from(table[name])) for name in names}


@st.composite
def configurations(draw: st.DrawFn) -> tuple[dict[str, Any], bool]:
    """Keywords, and whether one of them is out of its bounds."""
    options = {"likelihood": "categorical"} | choose(draw, GOOD)
    if draw(st.booleans()):
        options["coarse"] = choose(draw, SPACES)
    spoiled = draw(st.integers(0, 3)) == 0
    if spoiled:
        name = draw(st.sampled_from(sorted(BAD)))
        options[name] = draw(st.sampled_from(BAD[name]))
    return options, spoiled


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(configurations())
def test_every_configuration_trains_three_steps_or_is_refused_at_once(drawn: tuple[dict[str, Any], bool]) -> None:
    options, spoiled = drawn
    torch.manual_seed(0)
    model = Net()
    coarse = options.pop("coarse", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            space = None if coarse is None else CoarseConfig(**coarse)
            kfac = KFACPreconditioner(model, **options, coarse=space)
        except ValueError:
            refused = True
        else:
            refused = False
        event("refused" if refused else "trained")
        if refused:
            # Good values that do not go together: those of a coarse space, and samples with an adaptive damping.
            by_samples = options.get("preconditioning") == "samples" and options.get("damping") == "adaptive"
            assert spoiled or coarse is not None or by_samples
            assert not any(module._forward_hooks for module in model.modules())
            return
        assert not spoiled
        x, y = torch.randn(6, 3, 4), torch.randint(0, 3, (6,))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def loss() -> Tensor:
            return F.cross_entropy(model(x), y)

        for _ in range(3):
            optimizer.zero_grad()
            value = loss()
            kfac.accumulate()
            value.backward()
            kfac.step(lr=optimizer, closure=lambda: loss().detach())
            optimizer.step()
    assert kfac.metrics["step"] == 2
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    kfac.close()
