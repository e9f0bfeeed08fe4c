"""Modules that hold several layers: what each of them is given, against a copy that is written out in nn.Linear.

The copy is run by autograd and read off by hooks on its maps, samples outermost, so that equality here says that rows
are the right ones, in the right order, on both sides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist.layers import Layer, Part, find_layers, layers
from kfac_dist.layers.watch import Split
from tests.helpers.conformance import agree
from tests.helpers.explicit import explicit, linear

B = 3


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Example:
    """A module and the arguments of a call."""

    build: Callable[[], nn.Module]
    args: Sequence[Any]
    options: dict[str, Any] = field(default_factory=dict)


X, Y, Z = normal(5, B, 4), normal(6, B, 4, seed=2), normal(6, B, 4, seed=3)
PADDING = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
STATE = normal(4, B, 2, seed=4)


def attention(*args: Tensor, options: dict[str, Any] | None = None, **settings: Any) -> Example:
    return Example(lambda: nn.MultiheadAttention(4, 2, **settings), args, options or {})


def freeze(module: nn.Module, *names: str) -> nn.Module:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in names)
    return module


def frozen_attention(*names: str) -> Example:
    return Example(lambda: freeze(nn.MultiheadAttention(4, 2), *names), (X, X, X))


def recurrent(kind: type[nn.Module], *args: Any, **settings: Any) -> Example:
    return Example(lambda: kind(4, 2, **settings), args)


SEVERAL: dict[str, dict[str, Example]] = {
    "attention": {
        "self": attention(X, X, X),
        "self, without weights": attention(X, X, X, options={"need_weights": False}),
        "key is value": attention(X, Y, Y),
        "all different": attention(X, Y, Z),
        "query is key": attention(Y, Y, Z),
        "batch first": attention(*(t.transpose(0, 1).contiguous() for t in (X, Y, Y)), batch_first=True),
        "batch first, self": attention(*([X.transpose(0, 1)] * 3), batch_first=True),
        "unbatched": attention(X[:, 0], Y[:, 0], Z[:, 0]),
        "unbatched, self": attention(X[:, 0], X[:, 0], X[:, 0], batch_first=True),
        "no bias": attention(X, X, X, bias=False),
        "weights of their own": attention(X, Y[..., :3], Z[..., :2], kdim=3, vdim=2),
        "weights of their own, no bias": attention(X, Y[..., :3], Z, kdim=3, bias=False),
        "padding": attention(X, Y, Z, options={"key_padding_mask": PADDING}),
        "padding, without weights": attention(X, Y, Y, options={"key_padding_mask": PADDING, "need_weights": False}),
        "only the inputs' weights": frozen_attention("in_proj_bias", "out_proj.weight", "out_proj.bias"),
        "only the inputs' bias": frozen_attention("in_proj_weight", "out_proj.weight", "out_proj.bias"),
        "only the output's": frozen_attention("in_proj_weight", "in_proj_bias"),
        "only the key's weight": Example(
            lambda: freeze(nn.MultiheadAttention(4, 2, kdim=3, vdim=2, bias=False), "q_proj_weight", "v_proj_weight"),
            (X, Y[..., :3], Z[..., :2]),
        ),
    },
    "recurrent": {
        "LSTM": recurrent(nn.LSTM, X),
        "LSTM, two layers, two directions": recurrent(
            nn.LSTM, X, (STATE, 2 * STATE), num_layers=2, bidirectional=True, batch_first=False
        ),
        "LSTM, batch first": recurrent(nn.LSTM, X.transpose(0, 1), batch_first=True, bias=False),
        "LSTM, projection": Example(
            lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True, proj_size=2), (X, (STATE, normal(4, B, 3)))
        ),
        "GRU": recurrent(nn.GRU, X, STATE[:1]),
        "GRU, two layers, two directions": recurrent(nn.GRU, X, num_layers=2, bidirectional=True),
        "GRU, batch first": recurrent(nn.GRU, X.transpose(0, 1), STATE[:2], batch_first=True, bidirectional=True),
        "RNN": recurrent(nn.RNN, X, STATE[:2], num_layers=2),
        "RNN, relu": recurrent(nn.RNN, X, nonlinearity="relu", bidirectional=True, num_layers=2),
        "one step": recurrent(nn.LSTM, X[:1]),
        "frozen input weights": Example(lambda: freeze(nn.GRU(4, 2), "weight_ih_l0", "bias_ih_l0"), (X,)),
        "frozen biases": Example(lambda: freeze(nn.LSTM(4, 2), "bias_ih_l0", "bias_hh_l0"), (X,)),
        "LSTMCell": recurrent(nn.LSTMCell, X[0], (STATE[0], STATE[1])),
        "LSTMCell without states": recurrent(nn.LSTMCell, X[0]),
        "GRUCell": recurrent(nn.GRUCell, X[0], STATE[0]),
        "RNNCell": recurrent(nn.RNNCell, X[0], STATE[0]),
        "RNNCell, relu": recurrent(nn.RNNCell, X[0], nonlinearity="relu", bias=False),
    },
}
CASES = [(family, name) for family, examples in SEVERAL.items() for name in examples]


def run(module: nn.Module, example: Example) -> Any:
    """What the module returns, without attention weights."""
    output = module(*example.args, **example.options)
    return output[0] if isinstance(example.build(), nn.MultiheadAttention) else output


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in tensors(part)]


class Recorded:
    """A record that takes everything down."""

    def __init__(self) -> None:
        self.calls: list[tuple[Sequence[str], Sequence[Tensor], Split]] = []

    def wanted(self, names: Sequence[str]) -> bool:
        return True

    def __call__(self, names: Sequence[str], outputs: Sequence[Tensor], split: Split) -> None:
        self.calls.append((names, outputs, split))


def scalar(output: Any, unused: int | None = None) -> Tensor:
    """A random combination of the outputs, or of all but one."""
    terms = [
        (out * normal(*out.shape, seed=20 + number)).sum()
        for number, out in enumerate(t for t in tensors(output) if t.requires_grad)
    ]
    return sum(term for number, term in enumerate(terms) if number != unused)  # type: ignore[return-value]


def parts_of(found: Sequence[Layer], run: Callable[[], Any], unused: int | None = None) -> tuple[dict, Any]:
    """Layer -> its parts, in the order of the calls; and what the module returned."""
    record = Recorded()
    handles = [handle for layer in found for handle in layer.watch(record)]
    output = run()
    for handle in handles:
        handle.remove()
    edges = [out for _, outputs, _ in record.calls for out in outputs]
    arrived = iter(torch.autograd.grad(scalar(output, unused), edges, retain_graph=True, allow_unused=True))
    parts: dict[str, list[Part]] = {layer.name: [] for layer in found}
    for names, outputs, split in record.calls:
        at_outputs = [next(arrived) for _ in outputs]
        made = split(at_outputs)
        assert [part.layer.name for part in made] == list(names)
        for part in made:
            parts[part.layer.name].append(part)
    return parts, output


def rows_of(module: nn.Module, example: Example, unused: int | None = None) -> dict[str, tuple[Tensor, ...]]:
    """Map -> (input, output, output gradient) of the written-out copy, (B, rows, ..), in the order of the places."""
    twin, seen = explicit(module), dict[str, list[tuple[Tensor, Tensor]]]()
    for name, child in twin.named_children():
        seen[name] = []
        child.register_forward_hook(lambda m, args, out, name=name: seen[name].append((args[0], out)))
    total = scalar(run(twin, example), unused)
    result = {}
    for name, calls in seen.items():
        outputs = [out for _, out in calls]
        if not outputs[0].requires_grad:  # frozen, and nothing trained before it
            continue
        gradients = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows = [(x, out, g) for (x, out), g in zip(calls, gradients, strict=True)]
        if rows[0][0].dim() == 2:  # one call a step
            rows = [tuple(t[:, None] for t in row) for row in rows]
            if name.endswith("_reverse"):
                rows.reverse()
        result[name] = tuple(torch.cat(each, 1) for each in zip(*rows, strict=True))
    return result


@pytest.fixture(params=CASES, ids=[f"{family}: {name}" for family, name in CASES])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Example, list[Layer]]:
    family, name = request.param
    example = SEVERAL[family][name]
    torch.manual_seed(2)
    module = example.build().double()
    with torch.no_grad():
        for parameter in module.parameters():  # biases of attention begin at zero
            parameter.normal_()
    found, refused = find_layers(module)
    assert not refused
    assert {type(layer) for layer in found} == {layers[family]}
    return module, example, found


def test_inputs_and_gradients_are_those_of_the_maps_written_out(case: tuple[nn.Module, Example, list[Layer]]) -> None:
    module, example, found = case
    plain = tensors(run(module, example))
    parts, output = parts_of(found, lambda: run(module, example))
    assert all(torch.equal(a, b) for a, b in zip(tensors(output), plain, strict=True))
    wanted = rows_of(module, example)
    trained = {
        name for name, child in explicit(module).named_children() if any(p.requires_grad for p in child.parameters())
    }
    assert set(parts) == trained
    for layer in found:
        (part,) = parts[layer.name]
        x, out, g = wanted[layer.name]
        assert part.x.shape[:2] == part.g.shape[:2] == x.shape[:2]
        agree(layer, "x and g", part.x, x, 1e-12)
        agree(layer, "x and g", part.g, g, 1e-12)
        assert g.abs().max() > 1e-3 or layer.name == "k_proj"  # the softmax does not see a constant
        theta = layer.to_matrix(*layer.views)
        frozen = linear(layer.part(layer.weight), None)
        rest = out - layer.forward_with(part.x, theta)  # what is frozen is left out
        if layer.has_weight and layer.has_bias:
            agree(layer, "forward with Theta", rest, torch.zeros_like(rest), 1e-12)
        elif layer.has_bias:
            assert torch.allclose(rest, frozen(x), rtol=0, atol=1e-12)
        other = normal(*layer.shape, seed=6)
        both = layer.forward_with(part.x, theta + other) - layer.forward_with(part.x, theta)
        assert torch.allclose(both, layer.forward_with(part.x, other), rtol=0, atol=1e-12)
        columns = [x] * layer.has_weight + [torch.ones_like(x[..., :1])] * layer.has_bias
        a = torch.cat(columns, -1).flatten(0, 1)
        agree(layer, "moments", layer.input_moment(part.x, torch.float64)[0], a.T @ a, 1e-12)
        rows = g.flatten(0, 1)
        agree(layer, "moments", layer.output_moment(part.g, torch.float64)[0], rows.T @ rows, 1e-12)


def test_sums_of_g_a_are_the_gradients_of_autograd(case: tuple[nn.Module, Example, list[Layer]]) -> None:
    module, example, found = case
    outputs = sum(t.requires_grad for t in tensors(run(module, example)))
    for unused in (None, *(range(outputs) if outputs > 1 else ())):
        parts, _ = parts_of(found, lambda: run(module, example), unused)
        trained = [p for p in module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(
            scalar(run(module, example), unused), trained, allow_unused=True, materialize_grads=True
        )
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        for layer in found:
            total = sum(layer.parameter_gradient(part.x, part.g) for part in parts[layer.name])
            agree(layer, "sum of g a^T", total, layer.gradient(), 1e-12)


def test_the_layers_hold_every_trained_entry_once(case: tuple[nn.Module, Example, list[Layer]]) -> None:
    module, _, found = case
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.full_like(parameter, torch.nan)
    thetas = {layer.name: normal(*layer.shape, seed=7 + number) for number, layer in enumerate(found)}
    for layer in found:
        assert [view.shape for view in layer.views] == [part.shape for part in layer.parts(thetas[layer.name])]
        layer.write_gradient(thetas[layer.name])
    for layer in found:
        assert torch.equal(layer.gradient(), thetas[layer.name])
    assert not any(parameter.grad.isnan().any() for parameter in trained)
    assert sum(theta.numel() for theta in thetas.values()) == sum(p.numel() for p in trained)


def test_other_arguments_by_name_and_a_copy_of_the_module(case: tuple[nn.Module, Example, list[Layer]]) -> None:
    """The hooks take arguments by name, and leave a deep copy of the module alone."""
    module, example, found = case
    record = Recorded()
    handles = [handle for layer in found for handle in layer.watch(record)]
    run(copy.deepcopy(module), example)
    assert not record.calls
    names = ("query", "key", "value") if isinstance(module, nn.MultiheadAttention) else ("input", "hx")
    if isinstance(module, nn.MultiheadAttention):  # its own forward hands them on by place
        run(module, example)
    else:
        module(**dict(zip(names, example.args, strict=False)))
    for handle in handles:
        handle.remove()
    assert sorted({name for call, *_ in record.calls for name in call}) == sorted(layer.name for layer in found)
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
