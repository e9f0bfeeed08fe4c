"""What a configured model makes of a sample: rows and flops per layer, by one forward of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kfac_dist.config import KFACConfig
from kfac_dist.layers import FoundLayers, covered_parameters, find_layers
from kfac_dist.layers.watch import Split
from kfac_dist.networks import LayerWork, Network
from kfac_dist.one_level import layer_cost
from kfac_dist.rank_b import plain_linears


class _Rows:
    """Counts the rows of every layer's calls."""

    def __init__(self, found: FoundLayers) -> None:
        self.count = {layer.name: 0 for layer in found.layers}

    def wanted(self, names: Sequence[str]) -> bool:
        """All of them."""
        return True

    def __call__(self, names: Sequence[str], outputs: Sequence[Tensor], split: Split) -> None:
        """Take the parts of a call, with zeros for gradients."""
        for layer, _, g in split([torch.zeros_like(output) for output in outputs]):
            self.count[layer.name] += 1 if layer.joint else layer.rows(g)


def workload(module: pl.LightningModule, data: pl.LightningDataModule, config: KFACConfig) -> Network:
    """The layers of ``module`` and what they do with one batch of the training data."""
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    size = len(next(_tensors(batch)))
    found = find_layers(module, config)
    rows = _Rows(found)
    hooks = [hook for layer in found.layers for use in (layer, *layer.uses) for hook in use.watch(rows)]
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*self.log.*")
            module.training_step(batch, 0)
    finally:
        for hook in hooks:
            hook.remove()
    plain = {layer.name for layer in plain_linears(module, found.layers)}
    layers = tuple(
        LayerWork(
            layer_cost(layer),
            rows.count[layer.name] / size,
            layer.joint,
            not isinstance(layer.module, nn.Embedding),
            layer.name in plain,
        )
        for layer in found.layers
    )
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    covered = sum(parameter.numel() for parameter in covered_parameters(found.layers))
    inside = sum(layer.flops for layer in layers)
    name = type(module).__name__
    return Network(name, layers, trained - covered, max(counter.get_total_flops() / size - inside, 0.0), size)


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a nested batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)
