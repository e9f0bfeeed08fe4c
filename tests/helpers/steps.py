"""One step on a whole case, and what is compared after it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner
from tests.helpers.cases import Case


def one_step(case: Case, model: nn.Module, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Layer -> gradient matrix after the step, and the layers' states."""
    cut = options.pop("micro_batches", 1)
    mask = options.pop("mask", None)
    kfac = KFACPreconditioner(model, **({"likelihood": "categorical", "damping": 0.03, "seed": 3} | options))
    ids = torch.arange(len(case.x))
    for part in ids.chunk(cut):
        logits = model(case.x[part])
        kfac.accumulate(sample_ids=part, loss_divisor=cut, mask=None if mask is None else mask[part])
        losses = F.cross_entropy(logits, case.y[part], reduction="none")
        kept = torch.ones_like(losses) if mask is None else mask[part]
        samples = kept.flatten(1).any(1) if kept.dim() > 1 else kept
        ((losses * kept).sum() / samples.sum() / cut).backward()
    kfac.step()
    kfac.close()
    return {layer.name: layer.gradient() for layer in kfac.layers}, kfac.state_dict()["layers"]


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.linalg.norm(found[name] - value) <= tolerance * torch.linalg.norm(value), name
