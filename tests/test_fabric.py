"""K-FAC in a loop of Lightning Fabric, whose wrappers it looks through: the weights are those of plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from kfac_dist import KFACPreconditioner
from kfac_dist.compat import unwrap
from tests.helpers.cases import mlp
from tests.helpers.ranks import RankPool

STEPS, BATCH = 3, 8
LAYERS = ["0", "2", "4"]


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, BATCH, 5, generator=generator)
    return x, torch.randint(0, 3, (STEPS, BATCH), generator=generator)


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = mlp()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def preconditioner(model: nn.Module) -> KFACPreconditioner:
    return KFACPreconditioner(
        model, "categorical", factor_every_n_steps=2, inverse_every_n_steps=1, kl_clip=1e-3, damping=0.1
    )


def with_fabric(rank: int, world_size: int, precision: Any, **options: Any) -> tuple[dict[str, Tensor], list[str]]:
    fabric = Fabric(accelerator="cpu", devices=world_size, precision=precision, **options)
    fabric.launch()
    model, optimizer = fabric.setup(*build())
    kfac = preconditioner(model)
    share = BATCH // world_size
    part = slice(share * rank, share * (rank + 1))
    for x, y, ids in zip(*problem(), torch.arange(STEPS * BATCH).view(STEPS, BATCH), strict=True):
        optimizer.zero_grad()
        logits = model(x[part])
        kfac.accumulate(sample_ids=ids[part])
        fabric.backward(F.cross_entropy(logits, y[part]))
        kfac.step(lr=optimizer)
        optimizer.step()
    weights = {name: p.detach().clone() for name, p in unwrap(model).named_parameters()}
    names = [layer.name for layer in kfac.layers]
    kfac.close()
    return weights, names


def plain(precision: str) -> dict[str, Tensor]:
    model, optimizer = build()
    kfac = preconditioner(model)
    mixed = precision == "bf16-mixed"
    for x, y, ids in zip(*problem(), torch.arange(STEPS * BATCH).view(STEPS, BATCH), strict=True):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = model(x.to(torch.bfloat16) if mixed else x)  # Fabric rounds the inputs as well
        kfac.accumulate(sample_ids=ids)
        F.cross_entropy(logits.float(), y).backward()
        kfac.step(lr=optimizer)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_one_process(precision: str) -> None:
    weights, names = with_fabric(0, 1, precision)
    assert names == LAYERS
    torch.testing.assert_close(weights, plain(precision), rtol=0, atol=0)


def test_two_ranks(ranks: RankPool) -> None:
    wanted = plain("32-true")
    for weights, names in ranks.run(2, with_fabric, "32-true", strategy="ddp", init=False):
        assert names == LAYERS  # a checkpoint of one process fits
        torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-6)
