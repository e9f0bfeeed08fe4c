"""Attention and recurrent modules: a step with them is that with their linear maps written out."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner
from kfac_dist.compat import current_function_mode
from kfac_dist.layers import find_layers
from tests.helpers.cases import Case, cases
from tests.helpers.explicit import explicit
from tests.helpers.steps import assert_equal, one_step

FISHERS = ("categorical", "empirical")
NAMES = ("attention", "recurrent")


MASK = torch.arange(12) % 3 > 0
OPTIONS: list[dict[str, Any]] = [
    {"likelihood": "empirical"},
    {"mask": MASK, "coarse": "layer_step"},
    {"micro_batches": 3, "coarse": "layer_step", "fisher_samples": 2},
    {"max_factor_dim": 3},
]
# The written-out recurrence calls its maps once a step: "reduce" means something else there.
REDUCED: list[dict[str, Any]] = [
    {"kfac_approx": "reduce"},
    {"likelihood": "empirical", "kfac_approx": "reduce", "coarse": "layer_step"},
    {"mask": MASK, "kfac_approx": "reduce", "coarse": "layer_step"},
]
NAMED = [(name, options) for name in ("attention", "recurrent") for options in OPTIONS]
NAMED += [("attention", options) for options in REDUCED]


@pytest.mark.parametrize(("name", "options"), NAMED)
def test_a_step_is_that_of_the_maps_written_out(name: str, options: dict[str, Any]) -> None:
    case = cases()[name]
    found, _ = one_step(case, case.model(), **options)
    wanted, _ = one_step(case, explicit(case.model()), **options)
    assert_equal(found, wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("likelihood", FISHERS)
def test_micro_batches_add_up_to_the_whole_batch(name: str, likelihood: str) -> None:
    case = cases()[name]
    found, _ = one_step(case, case.model(), micro_batches=4, likelihood=likelihood, fisher_samples="exact")
    wanted, _ = one_step(case, case.model(), likelihood=likelihood, fisher_samples="exact")
    assert_equal(found, wanted)


class Positions(nn.Module):
    """One target per position, in modules whose own order of dimensions is (T, B, ..); logits (B, classes, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.attend = nn.GRU(3, 2, bidirectional=True), nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(x.transpose(0, 1))
        return self.head(self.attend(h, h, h)[0]).permute(1, 2, 0)


def positions() -> tuple[Case, Tensor]:
    x = torch.randn(12, 4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = torch.rand(12, 4, generator=torch.Generator().manual_seed(4)) > 0.4
    return Case(Positions, x, torch.arange(48).view(12, 4) % 3, "categorical"), mask


@pytest.mark.parametrize("likelihood", FISHERS)
def test_a_mask_of_positions_finds_their_rows(likelihood: str) -> None:
    """Every map has one row for each target: the mask applies entry by entry, in (B, T)."""
    case, mask = positions()
    kept: list[Tensor] = []
    model = case.model()
    layers = {layer.name: layer for layer in find_layers(model).layers}
    _, states = one_step(case, model, mask=mask, likelihood=likelihood)
    twin = explicit(case.model())
    twin.rnn.ih_l0.register_forward_hook(lambda m, args, out: kept.append(args[0].detach()))
    twin.attend.v_proj.register_forward_hook(lambda m, args, out: kept.append(args[0].detach()))
    twin(case.x)
    inputs = {"rnn.ih_l0": torch.stack(kept[:4], 1), "attend.v_proj": kept[4]}
    for name, x in inputs.items():
        rows = torch.cat([x[mask], torch.ones(int(mask.sum()), 1).double()], 1)
        factor = states[name]["factors"]["A"][0]
        assert torch.allclose(factor, rows.T @ rows / mask.sum(), rtol=0, atol=1e-12), name
        assert layers[name].input_dim == len(factor)


def test_reduce_averages_the_inputs_of_a_sequence_and_sums_its_gradients() -> None:
    case, _ = positions()
    twin, seen = explicit(case.model()), list[tuple[Tensor, Tensor]]()
    twin.rnn.hh_l0.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    gradients = torch.autograd.grad(case.sum_loss(twin(case.x), case.y), [out for _, out in seen])
    rows = torch.stack([x for x, _ in seen], 1).mean(1).detach()
    rows = torch.cat([rows, torch.ones(12, 1).double()], 1)
    sums = torch.stack(gradients, 1).sum(1)
    _, states = one_step(case, case.model(), likelihood="empirical", kfac_approx="reduce")
    factors = states["rnn.hh_l0"]["factors"]
    assert torch.allclose(factors["A"][0], rows.T @ rows / 12, rtol=0, atol=1e-12)
    assert torch.allclose(factors["G"][0], sums.T @ sums / 12, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("likelihood", FISHERS)
def test_training_goes_on_bitwise_as_without_capture(name: str, likelihood: str) -> None:
    case = cases()[name]
    gradients = []
    for watched in (True, False):
        model = case.model()
        kfac = KFACPreconditioner(model, likelihood) if watched else None
        logits = model(case.x)
        if kfac is not None:
            kfac.accumulate()
        case.loss(logits, case.y).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("likelihood", FISHERS)
def test_compiled_models(name: str, likelihood: str) -> None:
    case = cases()[name]
    wanted, _ = one_step(case, case.model(), likelihood=likelihood)
    model = case.model()
    torch._dynamo.reset()
    found, states = one_step(case, torch.compile(model, backend="eager"), likelihood=likelihood)
    assert_equal(found, wanted, 1e-12)
    assert {state["updates"] for state in states.values()} == {1}
    assert current_function_mode() is None
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["attention", "recurrent"])
@pytest.mark.parametrize("likelihood", FISHERS)
@pytest.mark.parametrize("trained", [True, False])
def test_activations_and_graphs_are_freed_at_once(name: str, likelihood: str, trained: bool) -> None:
    """Without the garbage collector, which sees no cycle through a graph."""
    case = cases()[name]
    model = case.model()
    kfac = KFACPreconditioner(model, likelihood, factor_every_n_steps=1)
    gc.disable()
    try:
        seen: list[weakref.ref] = []
        module = model.itself if name == "attention" else model.lstm
        module.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
        for _ in range(2):
            x = case.x.clone().requires_grad_()
            loss = case.loss(model(x), case.y)
            if trained:
                kfac.accumulate()
                loss.backward()
                kfac.step()
            else:
                kfac.forget()
            del loss, x
        assert len(seen) == 2
        assert not [ref for ref in seen if ref() is not None]
    finally:
        gc.enable()
