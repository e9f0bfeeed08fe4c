"""Layers whose factor is their Fisher block: every family against gradients of single samples, by autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from kfac_dist.config import LayerOptions
from kfac_dist.layers import Layer, Part, find_layers, layers
from kfac_dist.layers.watch import Split
from tests.helpers.conformance import agree


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def itself(module: nn.Module, x: Tensor) -> nn.Module:
    return module


def with_these_statistics(module: nn.Module, x: Tensor) -> nn.Module:
    """A batch norm in evaluation mode, whose running statistics are those of this batch."""
    frozen = copy.deepcopy(module)
    dims = [d for d in range(x.dim()) if d != 1]
    frozen.running_mean, frozen.running_var = x.mean(dims), x.var(dims, unbiased=False)
    return frozen.eval()


def frozen(module: nn.Module, name: str) -> nn.Module:
    module.get_parameter(name).requires_grad_(False)
    return module


class Affine(nn.Module):
    def __init__(self, size: int, activation: Callable[[Tensor], Tensor] = lambda x: x, unused: int = 0) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(1, size))
        self.activation = activation
        if unused:
            self.unused = nn.Parameter(torch.ones(unused))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.activation(self.scale * x + self.offset)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 3))

    def forward(self, index: Tensor) -> Tensor:
        return self.table[index].cos()


class Container(nn.Module):
    """A token in front of the sequence, positions, and layers whose parameters are their own."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 3)), nn.Parameter(torch.randn(3, 3))
        self.inner = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.inner(x).mul_(self.shift).tanh().sum(1)


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 2)
        self.factors = nn.ParameterDict({"down": torch.randn(2, 3), "up": torch.randn(2, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.factors["down"].T @ self.factors["up"].T


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Cube(torch.autograd.Function):
    """Of the old form, which torch.func refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g * ctx.saved_tensors[0] ** 2


@dataclass(frozen=True)
class Example:
    """A module, an input with its samples outermost, and the module that treats one sample as it is treated there."""

    build: Callable[[], nn.Module]
    x: Tensor
    alone: Callable[[nn.Module, Tensor], nn.Module] = itself


def norm(kind: type[nn.Module], *sizes: Any, x: tuple[int, ...], frozen: str = "", **options: Any) -> Example:
    def build() -> nn.Module:
        module = kind(*sizes, **options)
        for name, parameter in module.named_parameters():
            nn.init.normal_(parameter, 0.5)
            parameter.requires_grad_(name != frozen)
        return module

    batch = issubclass(kind, nn.modules.batchnorm._BatchNorm)
    return Example(build, 3.0 * normal(*x) + 1.0, with_these_statistics if batch else itself)


def evaluated(example: Example) -> Example:
    """The same after some training, in evaluation mode."""

    def build() -> nn.Module:
        module = example.build().double()
        module(example.x + 0.3)
        return module.eval()

    return Example(build, example.x)


EXAMPLES: dict[str, dict[str, Example]] = {
    "norm": {
        "layer norm": norm(nn.LayerNorm, 5, x=(4, 5)),
        "layer norm, sequences": norm(nn.LayerNorm, 5, x=(4, 3, 5)),
        "layer norm, two dimensions": norm(nn.LayerNorm, (2, 5), x=(4, 3, 2, 5)),
        "layer norm, no shift": norm(nn.LayerNorm, 5, x=(4, 3, 5), bias=False),
        "layer norm, frozen scale": norm(nn.LayerNorm, 5, x=(4, 3, 5), frozen="weight"),
        "layer norm, frozen shift": norm(nn.LayerNorm, (3, 5), x=(4, 3, 5), frozen="bias"),
        "layer norm, large eps": norm(nn.LayerNorm, 5, 0.3, x=(4, 5)),
        "rms norm": norm(nn.RMSNorm, 5, x=(4, 3, 5)),
        "rms norm, two dimensions": norm(nn.RMSNorm, (3, 5), 0.1, x=(4, 3, 5)),
        "group norm": norm(nn.GroupNorm, 2, 4, x=(4, 4)),
        "group norm, sequences": norm(nn.GroupNorm, 2, 4, x=(4, 4, 3)),
        "group norm, images": norm(nn.GroupNorm, 4, 4, 0.2, x=(2, 4, 3, 2)),
        "group norm, frozen scale": norm(nn.GroupNorm, 1, 4, x=(2, 4, 3, 2), frozen="weight"),
        "batch norm": norm(nn.BatchNorm1d, 4, x=(6, 4)),
        "batch norm, sequences": norm(nn.BatchNorm1d, 4, x=(4, 4, 3)),
        "batch norm, images": norm(nn.BatchNorm2d, 4, 0.2, x=(4, 4, 3, 2)),
        "batch norm, volumes": norm(nn.BatchNorm3d, 2, x=(4, 2, 3, 2, 2)),
        "batch norm, no running statistics": norm(nn.BatchNorm1d, 4, x=(6, 4), track_running_stats=False),
        "batch norm, cumulative": norm(nn.BatchNorm2d, 4, momentum=None, x=(4, 4, 3, 2), frozen="bias"),
        "batch norm, evaluated": evaluated(norm(nn.BatchNorm2d, 4, x=(4, 4, 3, 2))),
        "instance norm": norm(nn.InstanceNorm1d, 4, x=(2, 4, 3), affine=True),
        "instance norm, images": norm(nn.InstanceNorm2d, 4, x=(2, 4, 3, 2), affine=True, track_running_stats=True),
        "instance norm, volumes": norm(nn.InstanceNorm3d, 2, x=(2, 2, 3, 2, 2), affine=True, frozen="bias"),
        "instance norm, evaluated": evaluated(
            norm(nn.InstanceNorm2d, 4, x=(2, 4, 3, 2), affine=True, track_running_stats=True)
        ),
    },
}
EXAMPLES["generic"] = {
    "one slope": Example(nn.PReLU, normal(4, 3)),
    "slopes": Example(lambda: nn.PReLU(3), normal(4, 3, 5)),
    "frozen offset": Example(lambda: frozen(Affine(3), "offset"), normal(4, 2, 3)),
    "not linear in its parameters": Example(lambda: Affine(3, torch.tanh), normal(4, 2, 3)),
    "a parameter that is not used": Example(lambda: Affine(3, unused=2), normal(4, 3)),
    "lookup": Example(Lookup, torch.tensor([[0, 2], [4, 4], [1, 0], [2, 3]])),
    "container": Example(Container, normal(4, 2, 3)),
    "low rank": Example(LowRank, normal(4, 2, 3)),
    "weight norm": Example(lambda: parametrizations.weight_norm(nn.Linear(3, 2)), normal(4, 3)),
    "weight norm without bias": Example(
        lambda: parametrizations.weight_norm(nn.Conv1d(3, 2, 2, bias=False)), normal(4, 3, 4)
    ),
    "linear with a forward of its own": Example(lambda: Doubled(3, 2), normal(4, 3)),
    "not for vmap": Example(lambda: Affine(3, Cube.apply), normal(4, 2, 3)),
}
CASES = [(family, name) for family, examples in EXAMPLES.items() for name in examples]


class Recorder:
    """A :class:`kfac_dist.layers.Record` of a single call."""

    def wanted(self, names: Sequence[str]) -> bool:
        return True

    def __call__(self, names: Sequence[str], outputs: Sequence[Tensor], split: Split) -> None:
        (self.output,), self.split = outputs, split


@dataclass
class Call:
    """One call of one layer: a gradient of its output, what was recorded, and the samples' own gradients (B, p)."""

    layer: Layer
    part: Part
    output: Tensor
    gradients: Tensor


@pytest.fixture(params=CASES, ids=[f"{family}: {name}" for family, name in CASES])
def call(request: pytest.FixtureRequest) -> Call:
    family, name = request.param
    example = EXAMPLES[family][name]
    torch.manual_seed(2)
    module = example.build().double()
    options = LayerOptions(norm_blocks="full", uncovered="diagonal", skip_layers="^Linear$")
    (layer,), refused = find_layers(module, options)
    assert type(layer) is layers[family]
    assert refused == {}
    record = Recorder()
    handles = layer.watch(record)
    out = module(example.x)
    for handle in handles:
        handle.remove()
    g = normal(*out.shape, seed=3)
    g = g.mT.contiguous().mT if g.dim() > 2 else g  # in the strides that autograd may deliver
    (part,) = record.split([g])
    assert part.layer.name == layer.name
    assert part.g is g
    alone = example.alone(module, example.x)
    rows = []
    for b in range(len(example.x)):
        alone.zero_grad()
        alone(example.x[b : b + 1]).backward(g[b : b + 1])
        trained = [alone.get_parameter(name) for name in layer.names]
        rows.append(layer.to_matrix(*[torch.zeros_like(p) if p.grad is None else p.grad for p in trained]).flatten())
    return Call(layer, part, record.output.detach(), torch.stack(rows))


def test_the_moment_is_that_of_the_samples_gradients(call: Call) -> None:
    layer, u = call.layer, call.gradients
    for samples in (len(u), len(u) // 2, 1):  # a sample may be several rows of the first dimension
        rows = u.view(samples, -1, u.shape[1]).sum(1)
        dense = rows.T @ rows
        for options in (LayerOptions(norm_blocks="full"), LayerOptions(norm_blocks="diagonal"), LayerOptions()):
            layer.configure(options)
            size = layer.factors["A"].size
            wanted = torch.stack([dense[i : i + size, i : i + size] for i in range(0, len(dense), size)])
            found = layer.gradient_moment(call.part.x, call.part.g, samples, torch.float64)
            assert found.shape == layer.factors["A"].stored
            agree(layer, "moments", found / dense.abs().max(), wanted / dense.abs().max(), 1e-13)


def test_blocks_are_as_the_options_say(call: Call) -> None:
    layer, p = call.layer, call.gradients.shape[1]
    assert layer.shape == (1, 1, p)
    per_channel = 1 if layer.approximation is None else len(layer.parameters)
    for blocks, size in (("full", p), ("channel", per_channel), ("diagonal", 1)):
        layer.configure(LayerOptions(norm_blocks=blocks))
        if type(layer) is layers["norm"]:
            assert layer.factors["A"].stored == (p // size, size, size)
        else:
            assert layer.factors["A"].stored == (p, 1, 1)
    if p > 3 and type(layer) is layers["norm"]:
        assert layer.configure(LayerOptions(norm_blocks="full", max_factor_dim=3)) is not None
        assert layer.factors["A"].size <= 3


def test_forward_with_is_the_forward(call: Call) -> None:
    layer, x = call.layer, call.part.x
    theta, other = layer.to_matrix(*layer.views), normal(*layer.shape, seed=5)
    # What the parameters contribute; a frozen scale or shift is no part of it.
    zero = layer.forward_with(x, torch.zeros_like(theta))
    assert torch.equal(zero, torch.zeros_like(zero))
    jacobian = call.gradients.sum(0)
    for vector in (theta, other):  # <g, J v> = <J^T g, v>
        product = (layer.forward_with(x, vector) * call.part.g).sum()
        agree(layer, "forward with Theta", product, jacobian @ vector.flatten(), 1e-12)
    both = layer.forward_with(x, theta + 2 * other)
    parts = layer.forward_with(x, theta) + 2 * layer.forward_with(x, other)
    assert torch.allclose(both, parts, rtol=0, atol=1e-11)


def test_per_sample_products_without_per_sample_gradients(call: Call) -> None:
    layer, vector = call.layer, normal(*call.layer.shape, seed=6)
    found = (layer.forward_with(call.part.x, vector) * call.part.g).flatten(1).sum(1)
    assert torch.allclose(found, call.gradients @ vector.flatten(), rtol=1e-11, atol=1e-12)


def test_parameter_gradient_is_autograds(call: Call) -> None:
    found = call.layer.parameter_gradient(call.part.x, call.part.g)
    assert found.shape == call.layer.shape
    wanted = call.gradients.sum(0)
    agree(call.layer, "sum of g a^T", found.flatten() / wanted.abs().max(), wanted / wanted.abs().max(), 1e-13)


def test_matrix_round_trip_and_gradients(call: Call) -> None:
    layer, theta = call.layer, normal(*call.layer.shape, seed=7)
    assert [part.shape for part in layer.parts(theta)] == [view.shape for view in layer.views]
    assert torch.equal(layer.to_matrix(*layer.parts(theta)), theta)
    for parameter in layer.parameters:
        parameter.grad = None
    assert layer.gradient() is None
    for number, parameter in enumerate(layer.parameters):
        parameter.grad = torch.full_like(parameter, float(number))
    gradients = [parameter.grad for parameter in layer.parameters]
    before = layer.gradient()
    layer.write_gradient(theta)
    assert all(g is p.grad for g, p in zip(gradients, layer.parameters, strict=True))
    assert torch.equal(layer.gradient(), theta)
    assert not torch.equal(before, theta)  # what was read before stays what it was


def test_there_are_no_rows(call: Call) -> None:
    for ask, tensor in ((call.layer.input_rows, call.part.x), (call.layer.output_rows, call.part.g)):
        with pytest.raises(TypeError, match="one factor of whole gradients"):
            ask(tensor)


def test_samples_that_cannot_be_told_apart() -> None:
    module = nn.Sequential(nn.LayerNorm(3), nn.BatchNorm1d(3)).double()
    for layer in find_layers(module).layers:
        message = rf"layer '{layer.name}' has an output of shape \(4, 3\) for 3 samples.*skip_layers"
        with pytest.raises(ValueError, match=message):
            layer.gradient_moment(normal(4, 3), normal(4, 3, seed=2), 3, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_normalised_in_float32(dtype: torch.dtype) -> None:
    for build in (lambda: nn.LayerNorm(64), lambda: nn.RMSNorm(64), lambda: nn.GroupNorm(4, 64)):
        module = build().to(dtype)
        (layer,) = find_layers(module).layers
        x = (0.01 * normal(4, 64)).to(dtype)
        found = layer.normalised(x)
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert torch.allclose(found, module(x).float(), rtol=0, atol=0.02)
        assert not torch.equal(found, found.to(dtype).float())
