"""The KL clip: a bound on how far one update may move the model's predictions.

Martens and Grosse 2015, section 6.6 in spirit; the form with the learning rate is that of Ba, Grosse and Martens 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
