from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.nn import functional as F

from kfac_dist import KFACPreconditioner
from kfac_dist.curvature import InverseExchange


def test_the_sums_are_let_go_before_the_inverses_are_made(monkeypatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    kfac = KFACPreconditioner(model, "categorical", inverse_every_n_steps=1, factor_every_n_steps=1)
    sums: list[weakref.ref] = []
    alive: list[int] = []
    refresh = InverseExchange.refresh

    def counted(self, *arguments):
        alive.append(sum(reference() is not None for reference in sums))
        return refresh(self, *arguments)

    monkeypatch.setattr(InverseExchange, "refresh", counted)
    for _ in range(2):
        model.zero_grad()
        logits = model(torch.randn(8, 5))
        kfac.accumulate()
        F.cross_entropy(logits, torch.randint(0, 3, (8,))).backward()
        statistics = kfac._fisher.statistics
        sums = [weakref.ref(moment) for side in ("A", "G") for moment in statistics.sums(side).values()]
        assert len(sums) == 4
        kfac.step()
    assert alive == [0, 0]
    assert kfac.metrics["factor_updates"] == 2
    kfac.close()
