"""Weights that several modules share: one layer with all their calls, or a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import CoarseConfig, KFACPreconditioner, parameter_groups
from kfac_dist.config import LayerOptions
from kfac_dist.layers import find_layers
from tests.helpers.cases import Tied, cases
from tests.helpers.dense import cotangents, kronecker_factors
from tests.helpers.dense_coarse import Dense


class Two(nn.Module):
    """Two modules in a row, or one of them twice."""

    def __init__(self, first: nn.Module, second: nn.Module, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.first, self.second, self.after = before, first, second, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.second(torch.tanh(self.first(self.before(x)))))


class TwoTables(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.after = first, second, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.first(x[:, :2])).sum(1) * self.second(x[:, 2]))


def share(first: nn.Module, second: nn.Module, *names: str) -> tuple[nn.Module, nn.Module]:
    for name in names:
        setattr(second, name, getattr(first, name))
    return first, second


def linears(twice: bool, bias: bool) -> nn.Module:
    pair = share(nn.Linear(4, 4, bias=bias), nn.Linear(4, 4, bias=bias), "weight", "bias")
    return Two(pair[0], pair[0 if twice else 1], nn.Linear(5, 4), nn.Linear(4, 3))


def convolutions(twice: bool, bias: bool) -> nn.Module:
    options = {"padding": 1, "groups": 2, "bias": bias}
    pair = share(nn.Conv2d(4, 4, 3, **options), nn.Conv2d(4, 4, 3, **options), "weight", "bias")
    after = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    return Two(pair[0], pair[0 if twice else 1], nn.Conv2d(2, 4, 2), after)


def tables(twice: bool, padding: int | None) -> nn.Module:
    pair = share(nn.Embedding(6, 4, padding_idx=padding), nn.Embedding(6, 4, padding_idx=padding), "weight")
    return TwoTables(pair[0], pair[0 if twice else 1])


def inputs(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if kind == "tables":
        return torch.randint(0, 6, (9, 3), generator=generator)
    return torch.randn(*((9, 5) if kind == "linears" else (9, 2, 4, 4)), generator=generator, dtype=torch.float64)


Y = torch.randint(0, 3, (9,), generator=torch.Generator().manual_seed(3))
TWINS: dict[str, Callable[[bool], nn.Module]] = {
    "linears": lambda twice: linears(twice, True),
    "linears, no bias": lambda twice: linears(twice, False),
    "convolutions": lambda twice: convolutions(twice, True),
    "tables": lambda twice: tables(twice, None),
    "tables, padding": lambda twice: tables(twice, 1),
}
SPACES = [None, "layer_step_residual", CoarseConfig(space="spectral", vectors_per_layer=2)]


@pytest.mark.parametrize("coarse", SPACES)
@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
@pytest.mark.parametrize("name", TWINS)
def test_two_modules_with_one_weight_are_one_module_called_twice(
    name: str, likelihood: str, coarse: str | CoarseConfig | None
) -> None:
    found = []
    for twice in (False, True):
        torch.manual_seed(1)
        model = TWINS[name](twice).double()
        kfac = KFACPreconditioner(model, likelihood=likelihood, coarse=coarse, damping_method="eigen", seed=3)
        assert len(kfac.layers) == (2 if "tables" in name else 3)
        logits = model(inputs(name.split(",")[0]))
        kfac.accumulate()
        F.cross_entropy(logits, Y).backward()
        kfac.step()
        found.append((kfac.state_dict()["layers"], [p.grad for p in model.parameters()]))
        kfac.close()
    (layers, gradients), (wanted_layers, wanted_gradients) = found
    assert layers.keys() == wanted_layers.keys()
    for layer, state in layers.items():
        factors, wanted = state["factors"], wanted_layers[layer]["factors"]
        assert factors["locations"] == wanted["locations"]
        assert all(torch.allclose(factors[side], wanted[side], rtol=1e-12, atol=1e-14) for side in "AG"), layer
    for gradient, wanted in zip(gradients, wanted_gradients, strict=True):
        assert torch.linalg.norm(gradient - wanted) <= 1e-10 * torch.linalg.norm(wanted)


def test_biases_of_their_own_stay_plain_and_are_named() -> None:
    torch.manual_seed(1)
    first, second = share(nn.Linear(4, 4), nn.Linear(4, 4), "weight")
    model = Two(first, second, nn.Linear(5, 4), nn.Linear(4, 3)).double()
    x = inputs("linears")
    F.cross_entropy(model(x), Y).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    hidden: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda m, args: hidden.append(args[0].detach())) for m in (first, second)]
    model.zero_grad()
    with pytest.warns(
        UserWarning, match=r"first \(only its bias: the weight is shared with 'second', the bias is not\);"
    ):
        kfac = KFACPreconditioner(model, likelihood="categorical")
    logits = model(x)
    kfac.accumulate()
    F.cross_entropy(logits, Y).backward()
    kfac.step()
    for handle in handles:
        handle.remove()
    assert torch.equal(first.bias.grad, plain["first.bias"])
    assert torch.equal(second.bias.grad, plain["second.bias"])
    assert not torch.allclose(first.weight.grad, plain["first.weight"])
    rows = torch.cat(hidden)
    A = kfac.state_dict()["layers"]["first"]["factors"]["A"]
    assert torch.allclose(A, (rows.mT @ rows / len(rows))[None], rtol=1e-12)
    groups = parameter_groups(model, lr=1.0, uncovered_lr=0.1)
    assert {id(p) for p in groups[1]["params"]} == {id(first.bias), id(second.bias)}


def test_a_table_and_an_output_layer_are_one_layer() -> None:
    model = Tied()
    found = find_layers(model)
    assert [layer.name for layer in found.layers] == ["inner", "head"]
    assert found.refused == {}
    head = found.layers[1]
    assert head.shape == (1, 6, 5)
    assert head.factors["G"].stored == (6, 1, 1)  # diagonal, whatever max_factor_dim
    assert head.factors["A"].stored == (1, 5, 5)
    cut = find_layers(model, LayerOptions(max_factor_dim=3))
    assert cut.reduced["head"] == "A of order 5 becomes 2 diagonal blocks"
    (covered,) = parameter_groups(model, lr=1.0, uncovered_lr=0.1)
    assert sorted(map(id, covered["params"])) == sorted(map(id, model.parameters()))  # each once


def test_calls_of_the_table_in_the_map_s_matrix() -> None:
    model = Tied().double()
    use = find_layers(model).layers[1].uses[0]
    x, generator = cases()["tied"].x, torch.Generator().manual_seed(0)
    theta = torch.randn(1, 6, 5, generator=generator, dtype=torch.float64)
    g = torch.randn(12, 4, 4, generator=generator, dtype=torch.float64)
    out = use.forward_with(x, theta)
    assert torch.equal(out[x != 2], theta[0, x[x != 2], :4])
    assert (x == 2).any()
    assert (out[x == 2] == 0).all()
    (gradient,) = torch.autograd.grad(model.tokens(x), model.tokens.weight, g)
    assert torch.allclose(use.parameter_gradient(x, g), F.pad(gradient, (0, 1))[None], rtol=0, atol=1e-13)
    counts = torch.bincount(x[x != 2], minlength=6).double()
    assert torch.equal(use.input_moment(x, torch.float64).flatten(), counts)
    rows = g.flatten(0, 1)
    assert torch.allclose(use.output_moment(g, torch.float64), F.pad(rows.mT @ rows, (0, 1, 0, 1))[None], rtol=1e-13)
    assert use.rows(g) == 48


def test_directions_of_both_uses_are_nearer_to_the_exact_one_than_those_of_the_output_use() -> None:
    case = cases(40)["tied"]
    model = case.model()
    with torch.no_grad():
        model.tokens.weight.mul_(0.3)
    dense = Dense(case, model, 0.03, 0.05, "true", "exact")
    start = dense.shapes["inner"].numel()
    block, gradient = dense.F[start:, start:], dense.grad[start:]
    damping = 0.1 * block.diagonal().mean() * torch.eye(len(block)).double()
    exact = torch.linalg.solve(block + damping, gradient)
    errors = {}
    for sides in ("both", "input"):  # in the reference the latter leaves the table's calls out
        A, G, T = kronecker_factors(case, copy.deepcopy(dense.model), case.x, dense._cotangents, sides=sides)["head"]
        e = torch.linalg.solve(T * torch.kron(G[0], A[0]) + damping, gradient) - exact
        errors[sides] = float((e @ (block + damping) @ e / (exact @ gradient)).sqrt())
    assert errors["both"] < 0.4 * errors["input"]


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_a_gradient_scaler_leaves_counts_and_inputs_alone(approximation: str) -> None:
    case, found = cases()["tied"], []
    for scale in (1.0, 2.0**10):
        model = case.model()
        kfac = KFACPreconditioner(
            model, likelihood="empirical", kfac_approx=approximation, coarse="layer_step_residual"
        )
        (case.loss(model(case.x), case.y) * scale).backward()
        for p in model.parameters():
            p.grad /= scale
        kfac.step(grad_scale=scale)
        factors = kfac.state_dict()["layers"]["head"]["factors"]
        found.append([factors["A"], factors["G"], *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.linalg.norm(one - other) <= 1e-12 * torch.linalg.norm(one)


def test_reduced_factors_of_a_tied_weight() -> None:
    """Averaged inputs and one-hot vectors, summed gradients: one row per sample and use."""
    case = cases()["tied"]
    model = case.model()
    kfac = KFACPreconditioner(model, "categorical", fisher_samples="exact", kfac_approx="reduce")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        getattr(model, name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out)}))
        for name in ("tokens", "head")
    ]
    logits = model(case.x)
    for handle in handles:
        handle.remove()
    A, G = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    h = F.pad(seen["head"][0].detach().mean(1), (0, 1), value=1.0)
    A += h.mT @ h
    for b in range(12):
        real = case.x[b][case.x[b] != 2]
        G += (torch.bincount(real, minlength=6) / max(len(real), 1)).double() ** 2
    for cotangent, weight in cotangents(case, logits, case.y, "true", "exact", 3, 0, torch.arange(12)):
        outs = [seen["tokens"][1], seen["head"][1]]
        table, head = torch.autograd.grad(logits, outs, cotangent, retain_graph=True)
        table = F.pad((table * (case.x != 2)[..., None]).sum(1), (0, 1))
        A += weight * table.mT @ table
        G += weight * head.sum(1).square().sum(0)
    kfac.accumulate()
    case.loss(logits, case.y).backward()
    kfac.step()
    factors = kfac.state_dict()["layers"]["head"]["factors"]
    assert factors["locations"] == 2.0
    assert torch.allclose(factors["A"][0], A / 24, rtol=1e-12)
    assert torch.allclose(factors["G"].flatten(), G / 24, rtol=1e-12)


def norms() -> nn.Module:
    return nn.Sequential(*share(nn.LayerNorm(4), nn.LayerNorm(4), "weight"))


def only_biases() -> nn.Module:
    return nn.Sequential(*share(nn.Linear(4, 4), nn.Linear(4, 4), "bias"))


def crosswise() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    net[1].weight = net[0].bias
    return net


def chain() -> nn.Module:
    """The first two share a weight, and the second its bias with a third."""
    net = nn.Sequential(*share(nn.Linear(4, 4), nn.Linear(4, 4), "weight"), nn.Linear(4, 4))
    net[2].bias = net[1].bias
    return net


def other_padding() -> nn.Module:
    return nn.ModuleList(share(nn.Embedding(6, 4, padding_idx=0), nn.Embedding(6, 4, padding_idx=1), "weight"))


def attention() -> nn.Module:
    """Maps that modules compute with themselves, without a call."""
    first, second = nn.MultiheadAttention(4, 2, bias=False), nn.MultiheadAttention(4, 2, bias=False)
    second.out_proj.weight = first.out_proj.weight
    return nn.ModuleList([first, second])


def sparse() -> nn.Module:
    return nn.ModuleList(share(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 6, bias=False), "weight"))


def twice_in_one() -> nn.Module:
    module = nn.Linear(4, 4, bias=False)
    module.register_parameter("again", module.weight)
    return nn.Sequential(module)


UNTREATED: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "norms": (norms, {"0.0": "'0.1'", "0.1": "'0.0'"}),
    "only biases": (only_biases, {"0.0": "'0.1'", "0.1": "'0.0'"}),
    "crosswise": (crosswise, {"0.0": "'0.1'", "0.1": "'0.0'"}),
    "other groups of padding": (other_padding, {"0.0": "'0.1'", "0.1": "'0.0'"}),
    "a table that is refused": (sparse, {"0.0": "'0.1'", "0.1": "'0.0'"}),
    "twice in one module": (twice_in_one, {"0.0": "itself"}),
}


def test_maps_that_a_module_computes_with_itself_are_no_ties_of_their_own() -> None:
    found = find_layers(attention())
    assert found.layers == []
    reason = "it shares a parameter with '1' in a way that no layer covers"
    assert found.refused["0"] == reason
    assert found.refused["0.out_proj"] == f"0 computes with it: {reason}"


@pytest.mark.parametrize("name", UNTREATED)
def test_ties_that_cannot_be_treated_are_named(name: str) -> None:
    build, others = UNTREATED[name]
    model = nn.ModuleList([build(), nn.Linear(4, 3)])
    found = find_layers(model)
    assert [layer.name for layer in found.layers] == ["1"]
    assert found.refused == {
        module: f"it shares a parameter with {other} in a way that no layer covers" for module, other in others.items()
    }
    covered, rest = parameter_groups(model, lr=1.0, uncovered_lr=0.1)
    assert sorted(map(id, covered["params"] + rest["params"])) == sorted(map(id, model.parameters()))


def test_a_chain_of_ties_has_one_layer_for_its_weight_at_most() -> None:
    found = find_layers(chain())
    assert found.layers == []
    assert set(found.refused) == {"0", "1", "2"}


def test_a_skipped_module_takes_the_weight_with_it() -> None:
    found = find_layers(Tied(), LayerOptions(skip_layers=("Embedding",)))
    assert [layer.name for layer in found.layers] == ["inner"]
    assert found.skipped == {"tokens": "skip_layers"}
    assert found.refused == {"head": "it shares a parameter with 'tokens' in a way that no layer covers"}


def test_a_frozen_weight_is_no_tie() -> None:
    first, second = share(nn.Linear(4, 4), nn.Linear(4, 4), "weight")
    first.weight.requires_grad_(False)
    found = find_layers(nn.Sequential(first, second))
    assert [(layer.name, layer.shape) for layer in found.layers] == [("0", (1, 4, 1)), ("1", (1, 4, 1))]
    assert found.refused == {}


def test_three_tables_and_two_outputs_of_one_weight() -> None:
    model = nn.ModuleList([nn.Embedding(6, 4), nn.Linear(4, 6), nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 6)])
    for module in model[1:]:
        module.weight = model[0].weight
    model[3].bias = model[1].bias
    (layer,), refused = find_layers(model)
    assert (layer.name, layer.shape, len(layer.uses)) == ("1", (1, 6, 5), 3)
    assert refused == {}
