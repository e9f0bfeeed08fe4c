"""Recurrent modules in models: what is refused, what is not treated, and what training is left with."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from kfac_dist import KFACPreconditioner
from kfac_dist.layers import find_layers
from tests.helpers.cases import Case
from tests.helpers.explicit import explicit
from tests.helpers.steps import assert_equal, one_step

FISHERS = ("categorical", "empirical")
X = torch.randn(12, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(12) % 3


class Own(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Own(3, 2), "Own is a recurrent module with a forward of its own"),
        (lambda: nn.LSTM(3, 2, num_layers=2, dropout=0.1), "the dropout between its layers cannot be drawn a second"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.GRU(3, 2), "weight_hh_l0"), "a parametrization"),
    ],
)
def test_what_cannot_be_treated_is_named(build: Any, reason: str) -> None:
    found, refused = find_layers(nn.Sequential(build()))
    assert not found
    assert reason in refused["0"]


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_dropout_behind_the_only_layer_is_none() -> None:
    found, refused = find_layers(nn.LSTM(3, 2, dropout=0.1))
    assert [layer.name for layer in found] == ["ih_l0", "hh_l0"]
    assert not refused


class Model(nn.Module):
    """What of the LSTM's outputs leads to the logits is chosen: "output", "h", "c", or a packed sequence's "h"."""

    def __init__(self, used: str) -> None:
        super().__init__()
        self.used = used
        self.lstm = nn.LSTM(3, 2, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.used == "packed":
            lengths = torch.arange(len(x)) % 3 + 2
            _, (h, _) = self.lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
            return self.head(torch.cat([h[2], h[3]], 1))
        output, (h, c) = self.lstm(x)
        if self.used == "in place":
            return self.head(output.relu_().sum(1) + torch.cat([h[0], c[3]], 1))
        last = {"output": output[:, 1], "h": torch.cat([h[0], h[3]], 1), "c": torch.cat([c[1], c[2]], 1)}
        return self.head(last[self.used])


@pytest.mark.parametrize("used", ["output", "h", "c", "in place"])
@pytest.mark.parametrize("likelihood", FISHERS)
def test_gradients_of_every_output_count(used: str, likelihood: str) -> None:
    case = Case(lambda: Model(used), X, Y, "categorical")
    found, states = one_step(case, case.model(), likelihood=likelihood, coarse="layer_step")
    wanted, _ = one_step(case, explicit(case.model()), likelihood=likelihood, coarse="layer_step")
    for name in [name for name, value in wanted.items() if not value.any()]:  # never reached, such as the last c of l0
        assert not found.pop(name).any()
        del wanted[name]
    assert_equal(found, wanted)
    assert len(states) == 9


@pytest.mark.parametrize("likelihood", FISHERS)
def test_packed_sequences_keep_their_plain_gradient_and_are_named(likelihood: str) -> None:
    case = Case(lambda: Model("packed"), X, Y, "categorical")
    model = case.model()
    kfac = KFACPreconditioner(model, likelihood)
    plain = case.model()
    case.loss(plain(case.x), case.y).backward()
    with pytest.warns(UserWarning, match="lstm.ih_l0, .*: a PackedSequence is not treated"):
        logits = model(case.x)
    kfac.accumulate()
    case.loss(logits, case.y).backward()
    kfac.step()
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(model.lstm.parameters(), plain.lstm.parameters(), strict=True)
    )
    assert not torch.equal(model.head.weight.grad, plain.head.weight.grad)


class Looped(nn.Module):
    """Cells in a loop over the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm, self.head = nn.GRUCell(3, 2), nn.LSTMCell(2, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, state = x.new_zeros(len(x), 2), None
        for t in range(x.shape[1]):
            h = self.gru(x[:, t], h)
            state = self.lstm(h, state)
        return self.head(state[0])


@pytest.mark.parametrize("likelihood", FISHERS)
def test_cells_in_a_loop_are_calls_of_one_layer(likelihood: str) -> None:
    case = Case(Looped, X, Y, "categorical")
    found, states = one_step(case, case.model(), likelihood=likelihood, coarse="layer_step", damping_method="eigen")
    wanted, _ = one_step(
        case, explicit(case.model()), likelihood=likelihood, coarse="layer_step", damping_method="eigen"
    )
    assert_equal(found, wanted)
    assert states["gru.hh"]["factors"]["locations"] == 4


def test_autocast_and_half_precision_modules_are_run_again_in_float32() -> None:
    torch.manual_seed(0)
    model = Model("output").float()
    exact, low = copy.deepcopy(model), copy.deepcopy(model)
    factors = []
    for one, dtype in ((exact, None), (low, torch.bfloat16)):
        kfac = KFACPreconditioner(one, "empirical")
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(one(X.float()), Y)
        loss.backward()
        kfac.step()
        factors.append({n: s["factors"] for n, s in kfac.state_dict()["layers"].items()})
    for name, wanted in factors[0].items():
        for side in "AG":
            found = factors[1][name][side]
            assert found.dtype == torch.float32
            assert torch.linalg.norm(found - wanted[side]) < 0.05 * torch.linalg.norm(wanted[side]), (name, side)


@pytest.mark.parametrize("likelihood", FISHERS)
def test_a_window_is_left_alone_by_evaluation_and_by_copies(likelihood: str) -> None:
    case = Case(lambda: Model("h"), X, Y, "categorical")
    wanted, _ = one_step(case, case.model(), likelihood=likelihood)
    model = case.model()
    kfac = KFACPreconditioner(model, likelihood, damping=0.03, seed=3)
    logits = model(case.x)
    with torch.no_grad():
        model(case.x * 100)
    copy.deepcopy(model)(case.x * 100).sum().backward()
    kfac.accumulate(sample_ids=torch.arange(12))
    case.loss(logits, case.y).backward()
    kfac.step()
    assert_equal({layer.name: layer.gradient() for layer in kfac.layers}, wanted, 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac.close()
    assert not model.lstm._forward_hooks
