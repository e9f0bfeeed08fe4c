"""Norms in whole networks: their blocks against the dense Fisher matrix, and what a batch norm is taken for."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner
from kfac_dist.layers import find_layers
from tests.helpers.cases import Case, cases
from tests.helpers.dense import exact_columns

CASE = cases()["norms"]
LAM = 0.03


def parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def dense_block(model: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
    """(1/B) sum over samples and classes of u u^T, sample by sample; u channel by channel, scale before shift."""
    own = parameters(module)
    block = torch.zeros(sum(p.numel() for p in own), sum(p.numel() for p in own)).double()
    for column, _ in exact_columns("categorical", model(x).detach()):
        for b in range(len(x)):
            found = torch.autograd.grad(model(x[b : b + 1]), own, column[b : b + 1])
            u = torch.stack([part.flatten() for part in found], dim=1).flatten()
            block += torch.outer(u, u) / len(x)
    return block


def by_channel(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.flatten() for tensor in tensors], dim=1).flatten()


def step(model: nn.Module, case: Case, **options: object) -> KFACPreconditioner:
    kfac = KFACPreconditioner(model, case.likelihood, fisher_samples="exact", damping=LAM, **options)  # type: ignore[arg-type]
    logits = model(case.x)
    kfac.accumulate()
    case.loss(logits, case.y).backward()
    kfac.step()
    return kfac


@pytest.mark.parametrize("method", ["factored", "eigen"])
@pytest.mark.parametrize("blocks", ["full", "channel", "diagonal"])
def test_the_block_is_that_of_the_dense_fisher(blocks: str, method: str) -> None:
    model = CASE.model()
    before = copy.deepcopy(model)
    CASE.loss(before(CASE.x), CASE.y).backward()
    layers = step(model, CASE, norm_blocks=blocks, damping_method=method).state_dict()["layers"]
    for name in ("0", "2", "4"):
        module = model.get_submodule(name)
        dense = dense_block(before, before.get_submodule(name), CASE.x)
        p = len(dense)
        size = {"full": p, "channel": len(parameters(module)), "diagonal": 1}[blocks]
        kept = torch.block_diag(*[dense[i : i + size, i : i + size] for i in range(0, p, size)])
        assert torch.allclose(torch.block_diag(*layers[name]["factors"]["A"]), kept, rtol=0, atol=1e-13)
        assert (kept.diagonal() > 1e-6).all()
        gradient = by_channel([p.grad for p in before.get_submodule(name).parameters()])
        wanted = torch.linalg.solve(kept + LAM * torch.eye(p).double(), gradient)
        found = by_channel([p.grad for p in module.parameters()])
        assert torch.allclose(found, wanted, rtol=0, atol=1e-11)


class BatchNormNet(nn.Module):
    def __init__(self, track: bool) -> None:
        super().__init__()
        self.body = nn.Conv1d(4, 3, 2).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3, track_running_stats=track)
        self.head = nn.Linear(15, 3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu_(self.norm(self.body(x))).flatten(1))  # in place: the edges are what counts


@pytest.mark.parametrize("mode", ["trained", "without running statistics", "evaluated"])
def test_the_statistics_of_a_batch_norm_are_constants(mode: str) -> None:
    case = Case(lambda: BatchNormNet("without" not in mode), 2.0 * CASE.x + 1.0, CASE.y, "categorical")
    model = case.model()
    if mode == "evaluated":
        with torch.no_grad():
            model(0.5 * case.x - 0.1)
        model.norm.eval()
    reference = copy.deepcopy(model)
    before = reference.body(case.x)
    if mode != "evaluated":
        reference.norm.running_mean = before.mean((0, 2))
        reference.norm.running_var = before.var((0, 2), unbiased=False)
    reference.norm.eval()
    kfac = step(model, case, norm_blocks="full")
    dense = dense_block(reference, reference.norm, case.x)
    factors = kfac.state_dict()["layers"]["norm"]["factors"]
    assert torch.allclose(factors["A"][0], dense, rtol=0, atol=1e-13)
    assert dense.diagonal().min() > 1e-4
    assert factors["locations"] == 1.0


def test_inputs_alone_tell_nothing_of_a_norm() -> None:
    found, refused = find_layers(CASE.model())
    assert [layer.name for layer in found if layer.joint] == ["0", "2", "4"]
    assert refused == {}
    model, plain = CASE.model(), CASE.model()
    with pytest.warns(UserWarning, match=r"keep their plain gradient: 0 \(its block needs output gradients"):
        step(model, CASE, factor_sides="input")
    CASE.loss(plain(CASE.x), CASE.y).backward()
    for number, (one, other) in enumerate(zip(model, plain, strict=True)):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad) == (number in (0, 2, 4))


def test_expand_and_reduce_are_the_same_to_a_norm() -> None:
    blocks = []
    for approximation in ("expand", "reduce"):
        layers = step(CASE.model(), CASE, kfac_approx=approximation).state_dict()["layers"]
        blocks.append([layers[name]["factors"]["A"] for name in ("0", "2", "4")])
    assert all(torch.equal(one, other) for one, other in zip(*blocks, strict=True))


def test_calls_of_a_shared_norm_add_up_as_independent() -> None:
    """As everywhere: the block is the sum of those of the calls, per sample of the batch."""

    class Twice(nn.Module):
        def __init__(self, second: bool) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)
            self.second = nn.LayerNorm(5) if second else self.norm

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(torch.tanh(self.norm(self.first(x))))).mean(1)

    blocks = {}
    for second in (True, False):
        model = Case(lambda second=second: Twice(second), CASE.x, CASE.y, "categorical")
        layers = step(model.model(), model, norm_blocks="full").state_dict()["layers"]
        blocks[second] = {name: layer["factors"]["A"] for name, layer in layers.items()}
    assert torch.allclose(blocks[False]["norm"], blocks[True]["norm"] + blocks[True]["second"], rtol=0, atol=1e-13)
