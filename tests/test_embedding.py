"""nn.Embedding: counts instead of a V x V factor, padding, averaged sequences, large tables."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.coarse import coarse_spaces
from kfac_dist.layers import Layer, find_layers
from tests.helpers.cases import cases


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(3))


def one_step(kfac: KFACPreconditioner, x: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
    kfac.model.zero_grad()
    logits = kfac.model(x)
    kfac.accumulate(mask=mask)
    F.cross_entropy(logits, y).backward()
    kfac.step()


@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_reduce_is_the_diagonal_of_the_averaged_one_hot_vectors(padding: int | None, masked: bool) -> None:
    (layer,), _ = find_layers(nn.Embedding(5, 3, padding_idx=padding).double())
    x = integers(5, 4, 6)
    weights = integers(2, 24) if masked else None
    if weights is not None:
        weights[6:12] = 0  # a sample of which nothing counts
    found = layer.input_moment(x, torch.float64, weights, samples=4)
    tokens = [v for v in range(5) if v != padding]
    wanted = torch.zeros(len(tokens), dtype=torch.float64)
    for b in range(4):
        kept = torch.ones(6) if weights is None else weights.view(4, 6)[b]
        shares = [float(((x[b] == v) * kept).sum()) / max(float(kept.sum()), 1.0) for v in tokens]
        wanted += torch.tensor(shares, dtype=torch.float64) ** 2
    assert found.shape == (len(tokens), 1, 1)
    assert torch.allclose(found.flatten(), wanted, rtol=1e-14)
    layer.factors["A"] = type(layer.factors["A"])(1, len(tokens), len(tokens))
    assert torch.allclose(found, Layer.input_moment(layer, x, torch.float64, weights, samples=4), rtol=1e-14)


class Reader(nn.Module):
    """Logits (B, 3, S) of every token alone."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4, padding_idx=padding), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x))).mT


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
@pytest.mark.parametrize("padding", [None, 4])
def test_masked_and_padded_places_are_no_rows(padding: int | None, likelihood: str) -> None:
    torch.manual_seed(0)
    x, mask = integers(6, 8, 5), integers(3, 8, 5) > 0
    kfac = KFACPreconditioner(Reader(padding).double(), likelihood=likelihood)
    kfac.model.zero_grad()
    logits = kfac.model(x)
    kfac.accumulate(mask=mask)
    losses = F.cross_entropy(logits, integers(3, 8, 5), reduction="none")
    ((losses * mask).sum() / mask.any(1).sum()).backward()
    kfac.step()
    real = x[mask & (x != padding)] if padding is not None else x[mask]
    counts = torch.bincount(real, minlength=6).double()
    counts = counts[torch.arange(6) != padding] if padding is not None else counts
    factors = kfac.state_dict()["layers"]["table"]["factors"]
    assert torch.allclose(factors["A"].flatten(), counts / len(real), rtol=1e-14)
    assert factors["locations"] == len(real) / int(mask.any(1).sum())


def test_the_block_is_exact_where_derivatives_do_not_depend_on_the_token() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3)).double()
    x, lam = integers(6, 20), 0.02
    kfac = KFACPreconditioner(model, likelihood="gaussian", fisher_samples="exact", damping=lam, damping_method="eigen")
    block = torch.zeros(24, 24, dtype=torch.float64)
    for token in x:
        for output in model(token[None])[0]:
            (u,) = torch.autograd.grad(output, model[0].weight, retain_graph=True)
            block += torch.outer(u.flatten(), u.flatten()) / len(x)
    outputs = model(x)
    kfac.accumulate()
    outputs.square().sum().backward()
    gradient = model[0].weight.grad.clone()
    kfac.step()
    factors = kfac.state_dict()["layers"]["0"]["factors"]
    found = torch.kron(torch.diag(factors["A"].flatten()), factors["G"][0])  # row-major in (V, d)
    assert torch.allclose(found, block, rtol=0, atol=1e-12 * float(block.abs().max()))
    wanted = torch.linalg.solve(block + lam * torch.eye(24, dtype=torch.float64), gradient.flatten())
    assert torch.allclose(model[0].weight.grad.flatten(), wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))


@pytest.mark.parametrize("space", list(coarse_spaces))
def test_no_coarse_space_moves_the_row_of_padding(space: str) -> None:
    case = cases()["tokens"]
    model = case.model()
    with torch.no_grad():
        model.tokens.weight[2] = 5.0  # torch allows any value there
    before = model(case.x)
    kfac = KFACPreconditioner(model, case.likelihood, coarse=CoarseConfig(space=space, correction="additive"))
    for _ in range(2):
        one_step(kfac, case.x, case.y)
        assert kfac.metrics["corrected"]
        assert kfac.metrics["coarse/failures"] == 0
        assert model.tokens.weight.grad[2].tolist() == [0.0] * 4
        assert (model.tokens.weight.grad[0] != 0).any()
    assert torch.equal(model(case.x), before)


class Twice(nn.Module):
    """One table called twice for the same samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x[:, :3]).sum(1)) * self.table(x[:, 3]))


def test_calls_of_one_table_count_as_locations() -> None:
    torch.manual_seed(0)
    x = integers(6, 9, 4)
    kfac = KFACPreconditioner(Twice().double(), likelihood="categorical")
    one_step(kfac, x, integers(3, 9))
    state = kfac.state_dict()["layers"]["table"]
    assert (state["updates"], state["factors"]["locations"]) == (1, 4.0)
    counts = torch.bincount(x.flatten(), minlength=6).double()
    assert torch.allclose(state["factors"]["A"].flatten(), counts / 36, rtol=1e-14)


class Positions(nn.Module):
    def __init__(self, expand: bool, flat: bool) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(6, 4), nn.Embedding(8, 4), nn.Linear(4, 3)
        self.expand, self.flat = expand, flat

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1]) if self.flat else torch.arange(x.shape[1])[None]
        if self.expand:
            positions = positions.expand(len(x), -1)
        return self.head(torch.tanh(self.tokens(x) + self.positions(positions)).sum(1))


SHARED_REFUSED = {
    "empirical": ({"likelihood": "empirical"}, "this Fisher"),
    "exact": ({"likelihood": "categorical", "fisher_samples": "exact"}, "this Fisher"),
    "two levels": ({"likelihood": "categorical", "coarse": "layer_step"}, "the coarse level"),
}


@pytest.mark.parametrize("kind", SHARED_REFUSED)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("batch", [3, 4])
def test_positions_that_all_samples_share_are_named(batch: int, flat: bool, kind: str) -> None:
    """Also where their number is a multiple of the batch."""
    x, y = integers(6, batch, 8), integers(3, batch)
    shape = r"\(8,\)" if flat else r"\(1, 8\)"
    options, who = SHARED_REFUSED[kind]
    kfac = KFACPreconditioner(Positions(False, flat), **options)
    with pytest.raises(
        ValueError,
        match=rf"'positions' was called with an input of shape {shape} for {batch} samples.*{who} must tell .* apart. "
        r"Expand the input, as in positions.expand\(batch, -1\), or add the layer to skip_layers",
    ):
        one_step(kfac, x, y)
    kfac.close()
    one_step(KFACPreconditioner(Positions(True, flat), **options), x, y)
    one_step(KFACPreconditioner(Positions(False, flat), **options, skip_layers="positions"), x, y)
    one_step(KFACPreconditioner(Positions(False, flat), **options), x[:1], y[:1])  # one sample: its own


@pytest.mark.parametrize(
    ("flat", "batch", "approximation"), [(True, 4, "expand"), (False, 8, "expand"), (True, 3, "reduce")]
)
def test_shared_positions_have_in_expectation_the_factors_of_expanded_ones(
    flat: bool, batch: int, approximation: str
) -> None:
    """A and T are the same; G of one draw is made of sums over the samples, whose cross terms average out."""
    x, y = integers(6, batch, 8), integers(3, batch)

    def factors(expand: bool, draws: int) -> dict:
        torch.manual_seed(3)
        kfac = KFACPreconditioner(
            Positions(expand, flat).double(), "categorical", fisher_samples=draws, kfac_approx=approximation
        )
        one_step(kfac, x, y)
        return kfac.state_dict()["layers"]["positions"]["factors"]

    shared, own = factors(False, 800), factors(True, 800)
    assert torch.allclose(shared["A"], own["A"], rtol=1e-12)
    assert shared["locations"] == own["locations"]
    error = (shared["G"] - own["G"]).norm() / own["G"].norm()
    assert error < 0.08  # of 800 draws
    assert (factors(False, 1)["G"] - own["G"]).norm() > 2 * error * own["G"].norm()  # one draw is far noisier


class Largest(TorchDispatchMode):
    """The largest tensor that anything returns, in elements."""

    elements, calls = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("coarse", [None, "layer_step_residual", CoarseConfig(space="spectral", vectors_per_layer=2)])
@pytest.mark.parametrize("method", ["factored", "eigen"])
def test_a_large_table_makes_nothing_larger_than_a_few_tables(
    approximation: str, coarse: str | CoarseConfig | None, method: str
) -> None:
    V, d = 50_000, 8
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, d), nn.Flatten(), nn.Linear(4 * d, 3))
    kfac = KFACPreconditioner(
        model,
        likelihood="categorical",
        damping_method=method,
        coarse=coarse,
        kfac_approx=approximation,  # type: ignore[arg-type]
    )
    x, y = integers(V, 32, 4), integers(3, 32)
    with Largest() as largest:
        one_step(kfac, x, y)
    factors = kfac.state_dict()["layers"]["0"]["factors"]
    assert factors["A"].shape == (V, 1, 1)
    assert factors["G"].shape == (1, d, d)
    assert math.prod(kfac.layers[0].shape) <= largest.elements <= 4 * V * d
    assert largest.calls < 5000  # nothing loops over tokens
    assert not torch.equal(model[0].weight.grad[x[0, 0]], torch.zeros(d))
