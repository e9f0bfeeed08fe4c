"""Convolutions in a whole step: lazy ones, memory formats, transposed ones whose call says how large they become."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner
from kfac_dist.layers import find_layers
from tests.helpers.cases import Case, cases
from tests.helpers.coarse_runs import Setup, relative
from tests.helpers.dense import cotangents, gradient_matrix, kfac_direction, kronecker_factors, treated
from tests.test_traps import dense_state, one_step

LAZY = {
    nn.LazyConv1d: (2, 3, 5),
    nn.LazyConv2d: (2, 3, 5, 4),
    nn.LazyConv3d: (2, 3, 5, 4, 3),
    nn.LazyConvTranspose1d: (2, 3, 5),
    nn.LazyConvTranspose2d: (2, 3, 5, 4),
    nn.LazyConvTranspose3d: (2, 3, 5, 4, 3),
}


@pytest.mark.parametrize("kind", LAZY)
def test_lazy_convolutions_wait_for_their_first_batch(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(4, 2))
    with pytest.raises(ValueError, match="module '0' is lazy: run one forward pass before K-FAC is built"):
        find_layers(model)
    model(torch.zeros(LAZY[kind]))
    (layer,), refused = find_layers(model)
    rank = len(LAZY[kind]) - 2
    assert layer.shape == (1, 4, 3 * 2**rank + 1)
    assert refused == {}


class GradientAs(torch.autograd.Function):
    """The identity, whose gradient lies in the memory as asked for (kernels of accelerators deliver such ones)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: torch.memory_format) -> Tensor:
        ctx.layout = layout
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.contiguous(memory_format=ctx.layout), None


class Delivered(nn.Module):
    """Gives the gradient of the layer before it the strides of ``layout``."""

    def __init__(self, layout: torch.memory_format) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        return GradientAs.apply(x, self.layout)


def in_both_formats(format_: torch.memory_format, likelihood: str) -> list[dict[str, Tensor]]:
    """``param.grad`` after a step, of a net with standard strides and of the same net with channels last."""
    volumes = format_ is torch.channels_last_3d
    kinds = (nn.Conv3d, nn.ConvTranspose3d) if volumes else (nn.Conv2d, nn.ConvTranspose2d)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(4, 4, *([2] * (3 if volumes else 2)), generator=generator, dtype=torch.float64)
    y, found = torch.randint(0, 3, (4, 64 if volumes else 16), generator=generator), []
    for layout in (torch.contiguous_format, format_):
        torch.manual_seed(3)
        model = nn.Sequential(
            kinds[0](4, 4, 2, padding=1, groups=2),
            Delivered(layout),
            nn.Tanh(),
            kinds[1](4, 3, 2, stride=2, padding=1),
            Delivered(layout),
            nn.Tanh(),
            kinds[0](3, 3, 3, padding=1, padding_mode="circular", bias=False),
            Delivered(layout),
        ).double()
        model = model.to(memory_format=layout)
        kfac = KFACPreconditioner(model, likelihood=likelihood, damping_method="eigen")
        logits = model(x.to(memory_format=layout))
        kfac.accumulate()
        nn.functional.cross_entropy(logits.flatten(2), y, reduction="sum").div(len(x)).backward()
        kfac.step()
        kfac.close()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return found


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
@pytest.mark.parametrize("format_", [torch.channels_last, torch.channels_last_3d])
def test_memory_formats_do_not_matter(format_: torch.memory_format, likelihood: str) -> None:
    plain, last = in_both_formats(format_, likelihood)
    for name, value in plain.items():
        assert value.abs().max() > 0
        assert relative(last[name], value) < 1e-12, name


class TwoSizes(nn.Module):
    """One transposed convolution, called with its own size and with two others."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 2, 3, stride=(2, 3), padding=1)
        self.head = nn.Linear(2 * (3 * 4 + 4 * 5 + 3 * 6), 3)

    def forward(self, x: Tensor) -> Tensor:
        calls = [self.up(x), self.up(x.tanh(), output_size=(4, 5)), self.up(x.relu(), [3, 6])]
        return self.head(torch.cat([torch.tanh(h).flatten(1) for h in calls], dim=1))


def two_sizes() -> Case:
    made = cases()["cnn"]
    return Case(TwoSizes, made.x[:, :, :2, :2], made.y, "categorical")


@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_the_size_asked_for_in_a_call_is_the_calls_own(fisher: str) -> None:
    case = two_sizes()
    model = case.model()
    likelihood = "empirical" if fisher == "empirical" else case.likelihood
    kfac = KFACPreconditioner(model, likelihood=likelihood, damping=0.03, damping_method="eigen", seed=3)
    ids = torch.arange(len(case.x))
    logits = model(case.x)
    kfac.accumulate(sample_ids=ids)
    case.loss(logits, case.y).backward()
    gradients = {name: gradient_matrix(module).clone() for name, module in treated(model).items()}
    factors = kronecker_factors(
        case, copy.deepcopy(model), case.x, lambda z: cotangents(case, z, case.y, fisher, 1, 3, 0, ids)
    )
    kfac.step()
    assert factors["up"][2] == 4 * 3 + 5 * 4 + 6 * 3
    for name, module in treated(model).items():
        assert relative(gradient_matrix(module), kfac_direction(*factors[name], gradients[name], 0.03)) < 1e-10


@pytest.mark.parametrize("space", ["layer_step", "nicolaides"])
def test_the_coarse_level_knows_the_size_as_well(space: str) -> None:
    case, setup = two_sizes(), Setup(space=space)
    state = dense_state(case, setup)
    wanted = state.corrected(state.basis(space, 1), "error_minimizing")
    assert relative(one_step(case, setup), wanted) < 1e-9
