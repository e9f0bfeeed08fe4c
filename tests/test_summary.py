"""The table of modules: every parameter in one row, sizes that are really held, owners that really work."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import nn

from kfac_dist import DistributionConfig, KFACPreconditioner
from kfac_dist.config import KFACConfig
from kfac_dist.summary import inspect


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def model() -> nn.Module:
    torch.manual_seed(0)
    last = nn.Linear(9, 3)
    last.requires_grad_(False)
    return nn.Sequential(nn.Linear(5, 6), Scale(), nn.Tanh(), nn.Linear(6, 9, bias=False), nn.Linear(9, 9), last)


def test_every_module_with_parameters_has_a_row_with_its_reason() -> None:
    summary = inspect(model(), KFACConfig(skip_layers=("^4$",), max_factor_dim=5))
    rows = {row.name: row for row in summary.rows}
    assert {name: row.treatment for name, row in rows.items()} == {
        "0": "K-FAC",
        "1": "no layer type is registered for Scale",
        "3": "K-FAC",
        "4": "skip_layers",
        "5": "frozen",
    }
    assert (summary.parameters, summary.covered) == (36 + 6 + 54 + 90, 36 + 54)
    assert summary.share == 90 / 186
    assert rows["0"].cells()[4:6] == ["2 x 3", "2 x 3"]
    text = str(summary)
    assert "K-FAC covers 90 of 186 trainable parameters (48.4%)" in text
    assert all(name in text for name in ("Scale", "skip_layers", "frozen", "2 x 3"))


def test_a_tied_weight_has_one_row_that_counts_and_one_for_each_other_use() -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    net[1].weight = net[0].weight
    summary = inspect(net, KFACConfig())
    assert [(row.name, row.treatment, row.parameters) for row in summary.rows] == [
        ("0", "K-FAC, as a use of 1", 0),
        ("1", "K-FAC", 28),
    ]
    assert summary.rows[1].cells()[4:6] == ["4", "7 diag"]
    assert summary.share == 1.0


def test_bytes_are_those_of_the_tensors_that_are_held() -> None:
    for options in ({"damping_method": "factored"}, {"damping_method": "eigen"}, {"factor_sides": "input"}):
        net = model().double()
        kfac = KFACPreconditioner(net, "categorical", max_factor_dim=5, skip_layers=["^1$"], **options)
        logits = net(torch.randn(8, 5, dtype=torch.float64))
        kfac.accumulate()
        logits.logsumexp(1).mean().backward()
        kfac.step()
        summary = kfac.summary()
        rows = {row.name: row for row in summary.rows if row.covered}
        for name, state in kfac._one.states.items():
            factors = [factor for factor in state.factors.sides().values()]
            held = [t for inverse in state.inverses.values() for t in vars(inverse).values()]
            assert rows[name].factor_bytes == sum(t.numel() * t.element_size() for t in factors)
            assert rows[name].inverse_bytes == sum(t.numel() * t.element_size() for t in held)


def test_owners_at_a_world_size_without_any_rank() -> None:
    summary = inspect(model(), KFACConfig(), DistributionConfig(strategy="mem_opt"), world_size=4)
    (first, *_) = summary.rows
    assert first.owner.count(":") == 2
    assert "; used on " in first.owner
    assert {row.owner.rsplit(" ", 1)[1] for row in summary.rows if row.covered} <= {"0", "1", "2", "3"}
    one = inspect(model(), KFACConfig(), DistributionConfig(), world_size=1)
    assert one.rows[0].owner == "A: 0, G: 0"


def test_rich_prints_the_same_table() -> None:
    summary = inspect(model(), KFACConfig())
    console = Console(record=True, width=160, color_system=None)
    console.print(summary)
    assert console.export_text() == str(summary)
