"""Where the network computes in 16 bits: statistics of every kind of layer in float32, and nearly those of float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kfac_dist import KFACPreconditioner
from tests.helpers.cases import cases
from tests.helpers.training import EVERY_KIND

CASE = cases()["every kind"]
SCALE = 2.0**12
# mode -> the type of the parameters, that of autocast, what a gradient scaler multiplies by, and the largest error.
MODES: dict[str, tuple[torch.dtype, torch.dtype | None, float, float]] = {
    "bf16-mixed": (torch.float32, torch.bfloat16, 1.0, 0.03),
    "bf16-true": (torch.bfloat16, None, 1.0, 0.03),
    "16-mixed": (torch.float32, torch.float16, SCALE, 0.01),
}


def one_step(
    fisher: str, dtype: torch.dtype = torch.float32, autocast: torch.dtype | None = None, scale: float = 1.0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The layers' states after a step, and its metrics."""
    model = CASE.model().to(dtype)
    samples: dict[str, Any] = {"fisher_samples": "exact"} if fisher == "categorical" else {}
    kfac = KFACPreconditioner(model, fisher, **EVERY_KIND | samples)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = model(CASE.x.to(dtype))
        loss = CASE.loss(logits, CASE.y)
    kfac.accumulate()
    (loss * scale).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad /= scale
    kfac.step(grad_scale=scale)
    kfac.close()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    return kfac.state_dict()["layers"], dict(kfac.metrics)


@pytest.mark.filterwarnings("ignore:factors larger")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fisher", ["categorical", "empirical"])
def test_statistics_of_every_kind_of_layer(fisher: str, mode: str) -> None:
    *how, tolerance = MODES[mode]
    found, metrics = one_step(fisher, *how)
    assert (metrics["factor_updates"], metrics["dropped_statistics"], metrics["inverse_fallbacks"]) == (1, 0, 0)
    wanted, _ = one_step(fisher)
    assert found.keys() == wanted.keys()
    for name, state in found.items():
        for side, there in wanted[name]["factors"].items():
            here = state["factors"][side]
            if not isinstance(there, torch.Tensor):  # a norm has no G, and both have the same number of locations
                assert here == there
                continue
            assert here.dtype == torch.float32, (name, side)
            sums = here * (len(CASE.x) * state["factors"]["locations"])
            # 16 bits hold only the counts of positions, which are small integers.
            rounded = torch.allclose(sums.to(torch.bfloat16).float(), sums, rtol=1e-5, atol=0)
            assert rounded == ((name, side) == ("positions", "A")), (name, side)
            assert torch.linalg.norm(here - there) <= tolerance * torch.linalg.norm(there), (name, side)
