"""What the callback has to amount to: K-FAC in a training loop of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_dist import DistributionConfig, KFACPreconditioner
from tests.callbacks.tiny import loader, weights

Batch = Sequence[Tensor]


def preconditioner(model: nn.Module, **options: Any) -> KFACPreconditioner:
    """The same settings as tiny.kfac(sample_ids_key=2), on one process."""
    defaults = {"likelihood": "categorical", "factor_every_n_steps": 1, "inverse_every_n_steps": 1}
    return KFACPreconditioner(model, distribution=DistributionConfig(backend="single"), **defaults | options)


def train(
    model: nn.Module,
    windows: Iterable[Sequence[Batch]] | None = None,
    divisor: Callable[[int], int] = lambda step: 1,
    lr: Callable[[int], float] = lambda step: 0.1,
    clip: Callable[[Iterable[Tensor]], Any] = lambda parameters: None,
    optimizer: Optimizer | None = None,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """Train on the ``windows``, by default on each batch of the loader once.

    Args:
        model: called with a batch's first tensor; the second one holds labels, the third one global ids.
        windows: the micro-batches of every optimizer step.
        divisor: step -> what the losses of its window are divided by.
        lr: step -> learning rate.
        clip: applied to the parameters between K-FAC and the optimizer.
        optimizer: default: SGD.
        options: of the preconditioner.

    Returns:
        The weights before the first step and after every step.
    """
    kfac = preconditioner(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    states = [weights(model)]
    for step, window in enumerate([[batch] for batch in loader()] if windows is None else windows):
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.zero_grad()
        for x, y, ids in window:
            loss = F.cross_entropy(model(x), y) / divisor(step)
            kfac.accumulate(sample_ids=ids, loss_divisor=divisor(step))
            loss.backward()
        kfac.step(lr=optimizer)
        clip(model.parameters())
        optimizer.step()
        states.append(weights(model))
    kfac.close()
    return states
