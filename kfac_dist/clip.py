"""The KL clip: a bound on how far one update may move the model's predictions.

Martens and Grosse 2015, section 6.6 in spirit; the form with the learning rate is that of Ba, Grosse and Martens 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from kfac_dist.layers import Layer


def kl_clip_scale(kappa: float, products: Tensor, learning_rates: Tensor) -> Tensor:
    """The factor nu = min(1, sqrt(kappa / sum_i lr_i^2 <zeta_i, grad_i>)), a scalar on the device.

    The sum is SIGNED and taken once over all layers: absolute values per layer would hide an ascent direction.

    Args:
        kappa: the bound, in nats.
        products: (layers,), <zeta_i, grad_i> of the direction and the un-preconditioned gradient.
        learning_rates: (layers,), the rate with which the outer optimizer will apply each direction.
    """
    change = (products * learning_rates**2).sum()
    scale = (kappa / change).sqrt().clamp_max(1.0)
    return torch.where(change > 0, scale, torch.where(change.isnan(), change, torch.ones_like(change)))


def learning_rates(layers: Sequence[Layer], lr: float | Optimizer, like: Tensor) -> Tensor:
    """(layers,): one rate for all of them, or the rates of the groups that hold their weights.

    Raises:
        ValueError: the optimizer lacks a layer's weight.
    """
    if not isinstance(lr, Optimizer):
        return like.new_full((len(layers),), float(lr))
    rates = {id(p): float(group["lr"]) for group in lr.param_groups for p in group["params"]}
    missing = [layer.name for layer in layers if id(layer.parameters[0]) not in rates]
    if missing:
        raise ValueError(f"the optimizer given as lr does not hold the weights of {', '.join(missing)}")
    return like.new_tensor([rates[id(layer.parameters[0])] for layer in layers])
