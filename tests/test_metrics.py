"""Milliseconds per phase: which phases a step has, and that their times are those of the clock."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F

from kfac_dist import CoarseConfig, KFACPreconditioner
from kfac_dist.metrics import PhaseTimer
from tests.helpers.cases import mlp

ALWAYS = {"capture", "factors", "precondition", "write"}


@pytest.mark.parametrize("coarse", [None, CoarseConfig(space="layer_step", damping=0.1)])
def test_the_phases_of_a_step_are_timed_and_fit_into_it(coarse: CoarseConfig | None) -> None:
    torch.manual_seed(0)
    model = mlp()
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    kfac = KFACPreconditioner(model, "categorical", factor_every_n_steps=1, inverse_every_n_steps=2, coarse=coarse)
    for number in range(4):
        logits = model(x)
        start = time.perf_counter()
        kfac.accumulate()
        F.cross_entropy(logits, y).backward()
        kfac.step(lr=0.1)
        elapsed = 1e3 * (time.perf_counter() - start)
        phases = {name.removeprefix("ms/"): value for name, value in kfac.metrics.items() if name.startswith("ms/")}
        inverses = set() if number % 2 else {"inverses"}
        two_level = set() if coarse is None else {"coarse"}
        assert set(phases) == ALWAYS | inverses | two_level
        assert all(value > 0 for value in phases.values())
        assert sum(phases.values()) < elapsed


def test_repeated_phases_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 0.25, 1.0, 1.5, 2.0, 2.125])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    timer = PhaseTimer(torch.device("cpu"))
    for phase in ("capture", "factors", "capture"):
        with timer(phase):
            pass
    assert timer.milliseconds() == {"capture": 375.0, "factors": 500.0}
