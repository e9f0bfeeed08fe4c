"""Every registered layer family against brute force: rows read off the Jacobian of the module itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner
from kfac_dist.factors import FactorShape
from kfac_dist.layers import Layer, find_layers, layers
from tests.helpers.cases import Shared
from tests.helpers.conformance import agree
from tests.helpers.dense import output_rows, patches
from tests.test_joint_layers import EXAMPLES as JOINT
from tests.test_layers_of_several import SEVERAL


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Example:
    """A module, an input, and where the channels lie in its output."""

    build: Callable[[], nn.Module]
    x: Tensor
    channels: int


def conv(kind: type[nn.Module], *shape: object, x: tuple[int, ...] = (3, 4, 5, 6), **options: object) -> Example:
    return Example(lambda: kind(*shape, **options), normal(*x), -1 - len(kind(*shape).kernel_size))


def channels_last(kind: type[nn.Module], x: tuple[int, ...], layout: torch.memory_format) -> Example:
    def build() -> nn.Module:
        return kind(4, 2, 2, stride=2).to(memory_format=layout)

    return Example(build, normal(*x).to(memory_format=layout), 1 - len(x))


def tokens(*shape: int, **options: object) -> Example:
    indices = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(4))
    return Example(lambda: nn.Embedding(6, 3, **options), indices, -1)  # type: ignore[arg-type]


def stored(moments: Tensor, shape: FactorShape) -> Tensor:
    """The blocks that a factor keeps of dense (groups, d, d) matrices, block by block."""
    padded = nn.functional.pad(moments, (0, shape.size * shape.blocks - shape.dim) * 2)
    starts = [block * shape.size for block in range(shape.blocks)]
    return torch.stack([m[s : s + shape.size, s : s + shape.size] for m in padded for s in starts])


def frozen_bias(module: nn.Module) -> nn.Module:
    module.bias.requires_grad_(False)
    return module


def frozen_weight(module: nn.Module) -> nn.Module:
    module.weight.requires_grad_(False)
    return module


# A new family adds its examples here; without any the first test below fails.
EXAMPLES: dict[str, dict[str, Example]] = {
    "linear": {
        "2-d": Example(lambda: nn.Linear(3, 2), normal(5, 3), -1),
        "1-d": Example(lambda: nn.Linear(3, 2), normal(3), -1),
        "3-d": Example(lambda: nn.Linear(3, 2), normal(4, 5, 3), -1),
        "4-d without bias": Example(lambda: nn.Linear(3, 2, bias=False), normal(2, 2, 3, 3), -1),
        "transposed": Example(lambda: nn.Linear(3, 2), normal(4, 3, 5).mT, -1),
        "every other column": Example(lambda: nn.Linear(3, 2), normal(4, 6)[:, ::2], -1),
        "expanded": Example(lambda: nn.Linear(3, 2), normal(1, 3).expand(4, 3), -1),
        "frozen bias": Example(lambda: frozen_bias(nn.Linear(3, 2)), normal(5, 3), -1),
        "frozen weight": Example(lambda: frozen_weight(nn.Linear(3, 2)), normal(5, 3), -1),
    },
    "embedding": {
        "1-d": tokens(6),
        "2-d": tokens(4, 5),
        "3-d": tokens(2, 3, 4),
        "padding": tokens(4, 5, padding_idx=2),
        "padding from the end": tokens(4, 5, padding_idx=-1),
        "a token that never occurs": Example(lambda: nn.Embedding(6, 3), torch.tensor([[0, 5, 5], [1, 0, 0]]), -1),
    },
    "conv": {
        "plain": conv(nn.Conv2d, 4, 2, 3),
        "no bias": conv(nn.Conv2d, 4, 2, (2, 3), bias=False),
        "stride": conv(nn.Conv2d, 4, 2, 3, stride=(2, 1), padding=(1, 2)),
        "dilation": conv(nn.Conv2d, 4, 2, (2, 3), dilation=(2, 1), padding=1),
        "stride and dilation": conv(nn.Conv2d, 4, 2, 2, stride=2, dilation=(3, 2), padding=(2, 1)),
        "groups": conv(nn.Conv2d, 4, 6, 3, groups=2, padding=1),
        "depthwise": conv(nn.Conv2d, 4, 4, 3, groups=4, stride=2),
        "groups and dilation": conv(nn.Conv2d, 4, 4, 2, groups=2, dilation=2, bias=False),
        "same": conv(nn.Conv2d, 4, 2, (4, 3), padding="same", dilation=(1, 2)),
        "valid": conv(nn.Conv2d, 4, 2, 3, padding="valid"),
        "same, reflected": conv(nn.Conv2d, 4, 2, (2, 3), padding="same", padding_mode="reflect"),
        "reflect": conv(nn.Conv2d, 4, 2, 3, padding=(1, 2), padding_mode="reflect"),
        "replicate": conv(nn.Conv2d, 4, 2, 3, padding=(2, 1), padding_mode="replicate", groups=2),
        "circular": conv(nn.Conv2d, 4, 2, 3, padding=(2, 1), padding_mode="circular", stride=2),
        "one by one": conv(nn.Conv2d, 4, 2, 1),
        "unbatched": conv(nn.Conv2d, 4, 2, 3, x=(4, 5, 6), padding=1),
        "unbatched, groups": conv(nn.Conv2d, 4, 6, 3, x=(4, 5, 6), groups=2, padding_mode="circular", padding=1),
        "frozen bias": Example(lambda: frozen_bias(nn.Conv2d(4, 2, 3)), normal(3, 4, 5, 6), -3),
        "frozen weight": Example(lambda: frozen_weight(nn.Conv2d(4, 2, 3, groups=2)), normal(3, 4, 5, 6), -3),
        "channels last": channels_last(nn.Conv2d, (3, 4, 5, 6), torch.channels_last),
        "1-d": conv(nn.Conv1d, 4, 2, 3, x=(3, 4, 6), padding=1),
        "1-d, stride and dilation": conv(nn.Conv1d, 4, 2, 2, x=(3, 4, 9), stride=2, dilation=3, padding=2),
        "1-d, groups": conv(nn.Conv1d, 4, 6, 2, x=(3, 4, 5), groups=2, bias=False),
        "1-d, depthwise, same, circular": conv(
            nn.Conv1d, 4, 8, 4, x=(3, 4, 6), groups=4, padding="same", padding_mode="circular"
        ),
        "1-d, reflect": conv(nn.Conv1d, 4, 2, 3, x=(3, 4, 5), padding=2, padding_mode="reflect", stride=2),
        "1-d, unbatched": conv(nn.Conv1d, 4, 2, 3, x=(4, 6), padding=1),
        "1-d, frozen weight": Example(lambda: frozen_weight(nn.Conv1d(4, 2, 3)), normal(3, 4, 5), -2),
        "3-d": conv(nn.Conv3d, 2, 3, (1, 2, 3), x=(2, 2, 3, 3, 4), padding=(0, 1, 1)),
        "3-d, stride and dilation": conv(
            nn.Conv3d, 2, 3, 2, x=(2, 2, 3, 4, 5), stride=(1, 2, 1), dilation=(1, 2, 3), bias=False
        ),
        "3-d, groups, same": conv(nn.Conv3d, 4, 4, (2, 1, 2), x=(2, 4, 2, 3, 2), groups=2, padding="same"),
        "3-d, depthwise": conv(nn.Conv3d, 4, 4, 2, x=(2, 4, 3, 2, 3), groups=4),
        "3-d, valid": conv(nn.Conv3d, 2, 3, 2, x=(2, 2, 3, 3, 2), padding="valid"),
        "3-d, reflect": conv(nn.Conv3d, 2, 3, 3, x=(2, 2, 2, 3, 2), padding=1, padding_mode="reflect"),
        "3-d, replicate": conv(nn.Conv3d, 2, 3, 2, x=(2, 2, 2, 3, 2), padding=1, padding_mode="replicate"),
        "3-d, circular": conv(
            nn.Conv3d, 2, 3, 3, x=(2, 2, 3, 3, 3), padding=(2, 1, 0), padding_mode="circular", stride=2
        ),
        "3-d, unbatched": conv(nn.Conv3d, 2, 3, 2, x=(2, 3, 3, 2)),
        "3-d, frozen bias": Example(lambda: frozen_bias(nn.Conv3d(2, 3, 2)), normal(2, 2, 2, 3, 3), -4),
        "3-d, channels last": channels_last(nn.Conv3d, (2, 4, 3, 5, 4), torch.channels_last_3d),
    },
    "conv_transpose": {
        "plain": conv(nn.ConvTranspose2d, 4, 2, 3, x=(2, 4, 2, 3)),
        "stride": conv(nn.ConvTranspose2d, 4, 2, (3, 2), x=(2, 4, 2, 3), stride=(2, 3), padding=(1, 0)),
        "output padding": conv(
            nn.ConvTranspose2d, 4, 2, 3, x=(2, 4, 2, 3), stride=(2, 3), padding=1, output_padding=(1, 2)
        ),
        "more output padding than stride": conv(
            nn.ConvTranspose2d, 4, 2, 2, x=(2, 4, 2, 3), dilation=3, output_padding=(2, 1), padding=(2, 1)
        ),
        "stride and dilation": conv(nn.ConvTranspose2d, 4, 2, 2, x=(2, 4, 2, 2), stride=2, dilation=(3, 2), padding=2),
        "padding cuts into the input": conv(nn.ConvTranspose2d, 4, 2, 2, x=(2, 4, 4, 5), padding=(2, 1)),
        "groups": conv(nn.ConvTranspose2d, 4, 6, 2, x=(2, 4, 2, 3), groups=2, stride=2),
        "depthwise": conv(nn.ConvTranspose2d, 4, 4, 2, x=(2, 4, 2, 2), groups=4, bias=False, padding=1),
        "one by one": conv(nn.ConvTranspose2d, 4, 2, 1, x=(2, 4, 2, 3)),
        "unbatched": conv(nn.ConvTranspose2d, 4, 2, 3, x=(4, 2, 3), stride=2),
        "frozen bias": Example(lambda: frozen_bias(nn.ConvTranspose2d(4, 2, 2)), normal(2, 4, 2, 3), -3),
        "frozen weight": Example(
            lambda: frozen_weight(nn.ConvTranspose2d(4, 2, 2, groups=2, stride=2)), normal(2, 4, 2, 3), -3
        ),
        "channels last": channels_last(nn.ConvTranspose2d, (2, 4, 2, 3), torch.channels_last),
        "1-d": conv(nn.ConvTranspose1d, 4, 2, 3, x=(2, 4, 4), stride=2, padding=1, output_padding=1),
        "1-d, groups and dilation": conv(nn.ConvTranspose1d, 4, 6, 2, x=(2, 4, 3), groups=2, dilation=2, stride=3),
        "1-d, unbatched": conv(nn.ConvTranspose1d, 4, 2, 3, x=(4, 3), bias=False),
        "3-d": conv(
            nn.ConvTranspose3d,
            2,
            3,
            (1, 2, 3),
            x=(2, 2, 2, 2, 2),
            stride=(2, 1, 2),
            padding=(0, 0, 2),
            output_padding=(1, 0, 1),
        ),
        "3-d, groups": conv(nn.ConvTranspose3d, 4, 4, 2, x=(1, 4, 2, 2, 2), groups=2, dilation=(1, 2, 1), padding=1),
        "3-d, channels last": channels_last(nn.ConvTranspose3d, (1, 4, 2, 2, 2), torch.channels_last_3d),
    },
}
CASES = [(family, name) for family, examples in EXAMPLES.items() for name in examples]


def test_every_registered_family_has_examples() -> None:
    assert set(EXAMPLES) | set(JOINT) | set(SEVERAL) == set(layers)


@pytest.fixture(params=CASES, ids=[f"{family}: {name}" for family, name in CASES])
def case(request: pytest.FixtureRequest) -> tuple[Layer, Example, Tensor]:
    """The layer, its example, and a gradient of its output (in the strides that autograd may deliver)."""
    family, name = request.param
    example = EXAMPLES[family][name]
    torch.manual_seed(2)
    module = example.build().double()
    (layer,), _ = find_layers(module)
    assert type(layer) is layers[family]
    out = module(example.x)
    g = normal(*out.shape, seed=3)
    if "channels last" in name:
        return layer, example, g.movedim(example.channels, -1).contiguous().movedim(-1, example.channels)
    return layer, example, g.mT.contiguous().mT if g.dim() > 1 else g


def rows_by_jacobian(layer: Layer, example: Example) -> Tensor:
    """(groups, R, d_in): the derivative of every output of a group's first channel by that channel's own Theta."""
    out = layer.module(example.x)
    by_row = out.movedim(example.channels, -1).reshape(-1, layer.groups, layer.output_dim)
    rows = []
    for row in by_row:
        for group in range(layer.groups):
            gradients = torch.autograd.grad(row[group, 0], layer.parameters, retain_graph=True)
            theta = layer.to_matrix(*gradients)
            assert theta[group, 1:].abs().sum() == 0
            rows.append(theta[group, 0])
    return torch.stack(rows).view(len(by_row), layer.groups, -1).transpose(0, 1)


def test_moments_are_those_of_the_jacobian(case: tuple[Layer, Example, Tensor]) -> None:
    layer, example, g = case
    rows = rows_by_jacobian(layer, example)
    assert rows.shape[2] == layer.input_dim
    assert layer.rows(g) == rows.shape[1]
    moment = layer.input_moment(example.x, torch.float64)
    agree(layer, "moments", moment, stored(rows.mT @ rows, layer.factors["A"]), 1e-13)
    plain = rows[..., :-1] if layer.has_bias else rows
    if layer.has_weight:
        assert torch.allclose(layer.input_rows(example.x), plain, rtol=0, atol=1e-13)  # also in this order
    weights = torch.arange(rows.shape[1]) % 3 > 0
    masked = layer.input_moment(example.x, torch.float64, weights)
    wanted = stored(rows[:, weights].mT @ rows[:, weights], layer.factors["A"])
    assert torch.allclose(masked, wanted, rtol=0, atol=1e-12)
    outputs = g.movedim(example.channels, -1).reshape(-1, layer.groups, layer.output_dim).transpose(0, 1)
    assert torch.equal(layer.output_rows(g), outputs)
    agree(layer, "moments", layer.output_moment(g, torch.float64), outputs.mT @ outputs, 1e-13)


def test_forward_with_is_the_forward(case: tuple[Layer, Example, Tensor]) -> None:
    layer, example, _ = case
    out = layer.module(example.x)
    with torch.no_grad():  # what is frozen is left out
        for parameter in layer.module.parameters():
            if not parameter.requires_grad:
                parameter.zero_()
        out = layer.module(example.x)
    theta = layer.to_matrix(*layer.views)
    assert theta.shape == layer.shape
    agree(layer, "forward with Theta", layer.forward_with(example.x, theta).reshape(out.shape), out, 1e-13)
    other = normal(*layer.shape, seed=5)
    both = layer.forward_with(example.x, theta + other)
    assert torch.allclose(both - out, layer.forward_with(example.x, other), rtol=0, atol=1e-12)


def test_trap_4_samples_and_locations_lie_alike_on_both_sides(case: tuple[Layer, Example, Tensor]) -> None:
    """sum over rows of g a^T is autograd's gradient only when row r of one side belongs to row r of the other."""
    layer, example, g = case
    wanted = layer.to_matrix(*torch.autograd.grad(layer.module(example.x), layer.parameters, g))
    agree(layer, "sum of g a^T", layer.parameter_gradient(example.x, g), wanted, 1e-13)
    if layer.has_weight:
        product = layer.output_rows(g).mT @ layer.input_rows(example.x)
        assert torch.allclose(product, wanted[..., :-1] if layer.has_bias else wanted, rtol=0, atol=1e-12)


def test_matrix_round_trip_and_gradients(case: tuple[Layer, Example, Tensor]) -> None:
    layer, example, g = case
    theta = normal(*layer.shape, seed=6)
    weight, bias = layer.from_matrix(theta)
    assert (weight is None) == (not layer.has_weight)
    assert (bias is None) == (not layer.has_bias)
    assert [part.shape for part in layer.parts(theta)] == [view.shape for view in layer.views]
    assert torch.equal(layer.to_matrix(weight, bias), theta)
    if layer.has_bias:  # [W | b]: the bias is the last column of its own row
        assert torch.equal(theta[..., -1].flatten(), bias)
    assert layer.gradient() is None
    (layer.module(example.x) * g).sum().backward()
    gradients = [p.grad for p in layer.parameters]
    kept = layer.gradient()
    assert kept is not None
    layer.write_gradient(theta)
    assert all(a is p.grad for a, p in zip(gradients, layer.parameters, strict=True))
    assert torch.equal(layer.to_matrix(*gradients), theta)
    assert not torch.equal(kept, theta)  # what was read before stays what it was


BY_HAND = [
    (family, name)
    for family in ("conv", "conv_transpose")
    for name in EXAMPLES[family]
    if "valid" not in name and "frozen" not in name and "unbatched" not in name
]


@pytest.mark.parametrize(("family", "name"), BY_HAND)
def test_patches_cut_out_one_by_one(family: str, name: str) -> None:
    """A second reference, entry by entry: (B, T, groups, d_in), samples outermost."""
    example = EXAMPLES[family][name]
    module = example.build().double()
    (layer,), _ = find_layers(module)
    wanted = patches(module, example.x)
    found = layer.input_moment(example.x, torch.float64)
    assert torch.allclose(found, torch.einsum("btgi,btgj->gij", wanted, wanted), rtol=0, atol=1e-12)
    g = normal(*module(example.x).shape, seed=3)
    rows = output_rows(module, g)
    assert torch.allclose(layer.output_moment(g, torch.float64), torch.einsum("btgi,btgj->gij", rows, rows), atol=1e-12)


def test_trap_14_dilated_and_grouped_convolutions_have_factors_of_their_own() -> None:
    x = normal(3, 4, 7, 7)
    moments = {}
    for name, options in {
        "plain": {"padding": 1},
        "dilated": {"dilation": 2, "padding": 2},
        "grouped": {"padding": 1, "groups": 2},
    }.items():
        (layer,), _ = find_layers(nn.Conv2d(4, 2, 3, **options).double())
        moments[name] = layer.input_moment(x, torch.float64)
    # Kernel 3 at dilation 2 sees the corners, edge centres and the centre of what a kernel of 5 sees.
    (wide,), _ = find_layers(nn.Conv2d(4, 2, 5, padding=2).double())
    seen = torch.arange(100).view(4, 5, 5)[:, ::2, ::2].flatten()
    seen = torch.cat([seen, torch.tensor([100])])
    assert torch.allclose(moments["dilated"], wide.input_moment(x, torch.float64)[:, seen][:, :, seen])
    assert (moments["plain"] - moments["dilated"]).norm() > 0.1 * moments["plain"].norm()
    assert moments["grouped"].shape == (2, 19, 19)  # two blocks, and no cross-covariance
    half = torch.cat([torch.arange(18), torch.tensor([36])])
    assert torch.allclose(moments["grouped"][0], moments["plain"][0][half][:, half])


def test_trap_15_a_shared_module_updates_once_with_both_calls() -> None:
    torch.manual_seed(1)
    model = Shared().double()
    kfac = KFACPreconditioner(model, likelihood="categorical")
    logits = model(normal(6, 5))
    kfac.accumulate()
    logits.logsumexp(1).mean().backward()
    kfac.step()
    assert kfac.metrics["factor_updates"] == 1
    states = kfac.state_dict()["layers"]
    assert {name: state["updates"] for name, state in states.items()} == {"first": 1, "twice": 1, "last": 1}
    assert {name: state["factors"]["locations"] for name, state in states.items()} == {
        "first": 1,
        "twice": 2,
        "last": 1,
    }
