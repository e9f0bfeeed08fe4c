"""``uncovered="diagonal"``: which modules are taken, what repeating a forward leaves alone, and what stays plain."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from kfac_dist import CoarseConfig, KFACPreconditioner, parameter_groups
from kfac_dist.config import LayerOptions
from kfac_dist.layers import find_layers
from tests.helpers.cases import Case, cases
from tests.helpers.dense_coarse import SEED
from tests.test_joint_layers import Affine, Container, Cube, LowRank

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(8) % 3


class Gate(nn.Module):
    """A parameter of its own, before and behind a body."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.gate = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * self.gate) * self.gate


class Counting(Gate):
    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Drifting(Counting):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.calls


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.ones(4))


class Noisy(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand_like(x)


class Centred(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x.mean(0)


class Pair(Gate):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Halved(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, 2)


class Second(Gate):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(x) * (1 if scale is None else scale)


class First(nn.Module):
    """Takes the first of several outputs, and gives a module several inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x, torch.ones(4, dtype=x.dtype)) if isinstance(self.inner, Second) else self.inner(x)
        return self.last((out[0] if isinstance(out, tuple) else out).reshape(len(x), 4))


def found_in(module: nn.Module, **options: Any) -> tuple[list[str], dict[str, str]]:
    found = find_layers(nn.Sequential(module, nn.Linear(4, 3)), LayerOptions(uncovered="diagonal", **options))
    covered = [id(p) for layer in found.layers for p in layer.parameters]
    assert len(covered) == len(set(covered))
    return [layer.name for layer in found.layers], found.refused


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "two inputs": (lambda: nn.Bilinear(4, 4, 4), {"0": "its forward takes 2 inputs"}),
    "no forward": (Holder, {"0": "it has no forward"}),
    "dropout": (lambda: Gate(nn.Dropout(0.1)), {"0": "only its own gate: its forward is random (Dropout)"}),
    "dropout of another module": (
        lambda: Gate(nn.Sequential(nn.MultiheadAttention(4, 2, dropout=0.1).requires_grad_(False))),
        {"0": "only its own gate: its forward is random (MultiheadAttention)"},
    ),
    "batch norm": (
        lambda: Gate(nn.BatchNorm1d(4, affine=False)),
        {"0": "only its own gate: its forward changes buffers or couples samples (BatchNorm1d)"},
    ),
    "old weight norm": (
        lambda: Gate(nn.utils.weight_norm(nn.Linear(4, 4)).requires_grad_(False)),
        {"0": "only its own gate: a hook of torch.nn.utils computes its weight; use torch.nn.utils.parametrizations"},
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_repeated_is_refused_at_once(name: str) -> None:
    build, wanted = REFUSED[name]
    layers, refused = found_in(build())
    assert layers == ["1"]
    assert refused.keys() == wanted.keys()
    assert all(refused[key].startswith(reason) for key, reason in wanted.items())


def test_every_parameter_belongs_to_one_layer() -> None:
    assert found_in(nn.PReLU()) == (["0", "1"], {})
    assert found_in(Gate(nn.Linear(4, 4))) == (["0", "0.body", "1"], {})
    assert found_in(Gate(nn.Dropout(0.0))) == (["0", "1"], {})
    assert found_in(LowRank()) == (["0", "0.base", "1"], {})
    assert found_in(parametrizations.weight_norm(nn.Linear(4, 4))) == (["0", "1"], {})
    assert found_in(parametrizations.weight_norm(nn.Linear(4, 4, bias=False))) == (["0", "1"], {})
    assert found_in(Gate(parametrizations.weight_norm(nn.Linear(4, 4)))) == (["0", "0.body", "1"], {})
    assert found_in(nn.PReLU(), skip_layers="PReLU") == (["1"], {})
    layers, refused = found_in(nn.PReLU(), factor_sides="input")
    assert (layers, list(refused)) == (["1"], ["0"])


def test_by_default_they_stay_plain() -> None:
    found, refused = find_layers(nn.Sequential(nn.PReLU(), Container(), LowRank()))
    assert [layer.name for layer in found] == ["1.inner", "2.base"]
    reasons = {"0": "PReLU", "1": "Container", "2": "LowRank"}
    wanted = {name: f"no layer type is registered for {kind}" for name, kind in reasons.items()}
    wanted["1"] = f"only its own token, positions: {wanted['1']}"
    assert refused == wanted | {"2.factors": f"2 computes with it: {wanted['2']}"}


def test_parameter_groups_put_them_among_the_covered() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 3))
    (covered,) = parameter_groups(model, 1.0, 0.1, uncovered="diagonal")
    assert {id(p) for p in covered["params"]} == {id(p) for p in model.parameters()}
    covered, rest = parameter_groups(model, 1.0, 0.1)
    assert [id(p) for p in rest["params"]] == [id(model[1].weight)]
    kfac = KFACPreconditioner(model, "categorical", uncovered="diagonal")
    assert len(kfac.parameter_groups(1.0, 0.1)) == 1


def step(model: nn.Module, likelihood: str = "categorical", x: Tensor = X, **options: Any) -> KFACPreconditioner:
    kfac = KFACPreconditioner(model, likelihood, seed=SEED, damping=0.03, uncovered="diagonal", **options)
    one_step(kfac, model, x)
    return kfac


def one_step(kfac: KFACPreconditioner, model: nn.Module, x: Tensor = X) -> None:
    model.zero_grad()
    logits = model(x)
    kfac.accumulate()
    F.cross_entropy(logits, Y[: len(x)]).backward()
    kfac.step()


TROUBLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "random": (lambda: Noisy(nn.Tanh()), "its forward is random"),
    "memory": (lambda: Drifting(nn.Tanh()), "its forward gives something else for a sample alone, or when it is rep"),
    "coupled samples": (lambda: Centred(nn.Tanh()), "its forward gives something else for a sample alone"),
    "several outputs": (lambda: Pair(nn.Tanh()), "it returned tuple, not a tensor"),
    "several inputs": (lambda: Second(nn.Tanh()), "it was called with Tensor, Tensor, not with one tensor"),
    "samples lost": (
        lambda: Halved(nn.Tanh()),
        r"it does not keep samples in the first dimension: it maps \(8, 4\) to \(16, 2\)",
    ),
}


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
@pytest.mark.parametrize("name", TROUBLE)
def test_what_only_a_call_can_tell_stays_plain_with_a_warning(name: str, likelihood: str) -> None:
    build, reason = TROUBLE[name]
    torch.manual_seed(0)
    model = First(build()).double()
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    F.cross_entropy(plain(X), Y).backward()
    stream = torch.get_rng_state()
    torch.manual_seed(1)
    kfac = KFACPreconditioner(model, likelihood, uncovered="diagonal", factor_every_n_steps=1)
    with pytest.warns(UserWarning, match=rf"^these layers keep their plain gradient: inner \({reason}"):
        one_step(kfac, model)
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(model.inner.gate.grad, plain.inner.gate.grad)
    assert not torch.equal(model.last.weight.grad, plain.last.weight.grad)
    for one, other in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)
    (row,) = [row for row in kfac.summary().rows if row.name == "inner"]
    assert not row.covered
    assert re.match(reason, row.treatment)
    assert kfac.summary().share < 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(kfac, model)


class Ticking(nn.Module):
    """A child whose calls can be counted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


class OldCube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
@pytest.mark.parametrize("kind", ["root", "inner", "sample by sample"])
def test_a_repeated_forward_is_not_recorded_and_leaves_no_trace(likelihood: str, kind: str) -> None:
    """The children's statistics, gradients, buffers and the random stream are what they are without it."""
    torch.manual_seed(0)
    inner = Counting(nn.Sequential(Ticking(), OldCube()) if kind == "sample by sample" else Ticking())
    root = Gate(nn.Sequential(Ticking(), nn.Tanh()))
    model = (root if kind == "root" else nn.Sequential(inner, nn.Linear(4, 4))).double()
    other = copy.deepcopy(model)
    covered = step(model, likelihood, fisher_samples=2)
    states = torch.get_rng_state()
    kfac = KFACPreconditioner(other, likelihood, seed=SEED, damping=0.03, fisher_samples=2, skip_layers="Gate")
    one_step(kfac, other)
    assert torch.equal(torch.get_rng_state(), states)
    ticking, plain = (next(m for m in net.modules() if isinstance(m, Ticking)) for net in (model, other))
    assert ticking.calls > plain.calls == 1
    layers, wanted = covered.state_dict()["layers"], kfac.state_dict()["layers"]
    assert len(layers) == len(wanted) + 1
    for name, layer in wanted.items():
        assert torch.equal(layers[name]["factors"]["A"], layer["factors"]["A"])
        assert torch.equal(layers[name]["factors"]["G"], layer["factors"]["G"])
    gates = [next(m for m in net.modules() if isinstance(m, Gate)).gate.grad for net in (model, other)]
    assert not torch.equal(*gates)
    assert all(torch.equal(one, two) for one, two in zip(model.buffers(), other.buffers(), strict=True))
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad) or "gate" in name
        assert type(one) is nn.Parameter


class Mixed(nn.Module):
    """Raw parameters around layers of every other kind."""

    def __init__(self) -> None:
        super().__init__()
        self.container = Container()
        self.low_rank = LowRank()
        self.affine = Affine(2, torch.tanh)
        self.head = parametrizations.weight_norm(nn.Linear(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.affine(self.low_rank(self.container(x))).relu_())


def reference(model: nn.Module, case: Case, name: str) -> Tensor:
    """The diagonal of the exact Fisher block of one unit, by a backward for every sample and class."""
    own = [
        p for n, p in model.named_parameters() if n.startswith(name) and not n.endswith(("inner.weight", "inner.bias"))
    ]
    own = [p for p in own if all(p is not q for q in model.low_rank.base.parameters())]
    total = torch.zeros(sum(p.numel() for p in own)).double()
    for b in range(len(case.x)):
        logits = model(case.x[b : b + 1])
        p = logits.softmax(1).detach()[0]
        for target in range(3):
            loss = F.cross_entropy(logits, torch.tensor([target]))
            u = torch.cat([g.flatten() for g in torch.autograd.grad(loss, own, retain_graph=True)])
            total += p[target] * u**2 / len(case.x)
    return total


def mixed() -> tuple[nn.Module, Case]:
    x = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    case = Case(Mixed, x, torch.arange(6) % 3, "categorical")
    return case.model(), case


def test_blocks_are_the_diagonal_of_the_dense_fisher() -> None:
    model, case = mixed()
    plain = copy.deepcopy(model)
    case.loss(plain(case.x), case.y).backward()
    kfac = KFACPreconditioner(model, "categorical", fisher_samples="exact", damping=0.03, uncovered="diagonal")
    logits = model(case.x)
    kfac.accumulate()
    case.loss(logits, case.y).backward()
    kfac.step()
    layers = kfac.state_dict()["layers"]
    assert set(layers) == {"container", "container.inner", "low_rank", "low_rank.base", "affine", "head"}
    for layer in kfac.layers:
        if layer.joint:
            wanted = reference(plain, case, layer.name)
            found = layers[layer.name]["factors"]["A"].flatten()
            assert torch.allclose(found, wanted, rtol=0, atol=1e-13 * float(wanted.max()))
            gradients = [plain.get_submodule(layer.name).get_parameter(name).grad for name in layer.names]
            direction = layer.to_matrix(*gradients).flatten() / (wanted + 0.03)
            assert torch.allclose(layer.gradient().flatten(), direction, rtol=1e-11, atol=1e-13)


def test_kept_samples_stay_those_of_their_call() -> None:
    """Between curvature batches the parameters move; the products with U are those of the old ones."""
    model, case = mixed()
    kfac = KFACPreconditioner(
        model, "categorical", uncovered="diagonal", coarse=CoarseConfig(space="layer_step", max_samples=None), seed=1
    )
    logits = model(case.x)
    kfac.accumulate()
    case.loss(logits, case.y).backward()
    kfac.step()
    samples = kfac._samples
    vector = {layer.name: torch.ones(layer.shape).double() for layer in kfac.layers}
    before = samples.along(vector)
    shapes = {layer.name: layer.shape for layer in kfac.layers}
    combined = samples.combine(before, shapes)
    assert torch.allclose(
        sum((combined[name] * v).sum() for name, v in vector.items()), before.square().sum(), rtol=1e-11, atol=0
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3)
    assert torch.equal(samples.along(vector), before)
    assert all(torch.equal(v, combined[name]) for name, v in samples.combine(before, shapes).items())


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
def test_under_autocast_and_in_half_precision(likelihood: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), Affine(4), nn.Linear(4, 3))
    half = copy.deepcopy(model).bfloat16()
    kfac = KFACPreconditioner(model, likelihood, uncovered="diagonal")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(X.float())
        kfac.accumulate()
        loss = F.cross_entropy(logits, Y)
    loss.backward()
    kfac.step()
    assert all(layer.trouble is None for layer in kfac.layers)
    kfac = KFACPreconditioner(half, likelihood, uncovered="diagonal", coarse="layer_step")
    one_step(kfac, half, X.bfloat16())
    assert all(layer.trouble is None for layer in kfac.layers)
    for net in (model, half):
        assert all(bool(p.grad.isfinite().all()) for p in net.parameters())


def test_a_closed_preconditioner_leaves_the_parameters_where_they_were() -> None:
    case = cases()["slopes"]
    model = case.model()
    before = {name: id(p) for name, p in model.named_parameters()}
    kfac = KFACPreconditioner(model, "categorical", uncovered="diagonal")
    logits = model(case.x)
    kfac.accumulate()
    case.loss(logits, case.y).backward()
    kfac.step()
    kfac.close()
    assert {name: id(p) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("fisher", ["categorical", "empirical"])
def test_a_first_batch_without_samples_tells_nothing_of_the_module(fisher: str) -> None:
    """As on a rank whose first batch is empty: the module is tried at the first batch with samples."""

    def slope(parts: list[int]) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3))
        kfac = KFACPreconditioner(model, fisher, uncovered="diagonal", seed=3)
        ids, x = torch.arange(6), torch.randn(6, 4)
        for part in ids.split(parts):
            logits = model(x[part])
            kfac.accumulate(sample_ids=part)
            (F.cross_entropy(logits, part % 3, reduction="sum") / 6).backward()
        kfac.step()
        state = kfac.state_dict()["layers"]["1"]
        kfac.close()
        return state

    found, wanted = slope([0, 6]), slope([6])
    assert found["updates"] == 1
    assert torch.equal(found["factors"]["A"], wanted["factors"]["A"])
