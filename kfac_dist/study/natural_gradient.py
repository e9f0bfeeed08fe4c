"""The exact natural gradient of small networks: what K-FAC approximates, by Woodbury's identity in float64.

Everything but the matrix is as in K-FAC: the sampled targets, the constant damping, the KL clip and the layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from kfac_dist.clip import kl_clip_scale, learning_rates
from kfac_dist.config import KFACConfig
from kfac_dist.layers import find_layers
from kfac_dist.study.dense_fisher import DenseFisher, check_small, matrices, sampled_cotangents
from kfac_dist.study.stepper import Stepper


class NaturalGradient:
    """Overwrites ``param.grad`` with nu (F + damping I)^-1 grad, F that of the last forward's batch.

    Args:
        model: without layers that mix samples.
        config: the likelihood, the draws, the seed, the damping (a number) and the KL clip.

    Raises:
        ValueError: more than 20,000 covered parameters, a damping that is no number, or a loss that is not the mean
            over the samples of their negative log-likelihood.
    """

    def __init__(self, model: nn.Module, config: KFACConfig) -> None:
        if config.loss_reduction != "mean":
            raise ValueError(f'loss_reduction={config.loss_reduction!r}: the exact natural gradient knows "mean" only')
        if not isinstance(config.damping, (int, float)):
            raise ValueError(f"damping={config.damping!r} must be a number for the exact natural gradient")
        self._model = model
        self._config = config
        self._damping = float(config.damping)
        self._layers = find_layers(model, config).layers
        check_small(self._layers)
        self._step = 0
        self._seen: tuple[Tensor, Tensor] | None = None
        self._listening = True
        model.register_forward_hook(self._listen)

    def _listen(self, model: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        if self._listening:
            self._seen = (inputs[0].detach(), logits.detach())

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        """Between the backward and the step of ``optimizer``, whose learning rates enter the clip.

        Raises:
            RuntimeError: there was no forward pass.
        """
        if self._seen is None:
            raise RuntimeError("no forward pass was seen: call the model before step()")
        (x, logits), self._seen = self._seen, None
        self._listening = False  # the passes of single samples
        try:
            cotangents = sampled_cotangents(self._config, self._step, logits)
            fisher = DenseFisher(self._model, self._layers, x, cotangents)
        finally:
            self._listening = True
        gradients = matrices(self._layers)
        directions = fisher.unflatten(fisher.solve(fisher.flatten(gradients), self._damping))
        scale = torch.ones((), dtype=torch.float64, device=x.device)
        if self._config.kl_clip is not None:
            products = torch.stack([(directions[name] * gradient).sum() for name, gradient in gradients.items()])
            scale = kl_clip_scale(self._config.kl_clip, products, learning_rates(self._layers, optimizer, products))
        for layer in self._layers:
            layer.write_gradient((directions[layer.name] * scale).to(layer.dtype))
        self._step += 1


def build_natural_gradient(
    model: nn.Module, kfac: Mapping[str, Any], settings: Mapping[str, Any], seed: int
) -> Stepper:
    """The exact natural gradient under SGD with momentum."""
    keywords = dict(settings)
    optimizer = SGD(model.parameters(), lr=keywords.pop("lr"), momentum=keywords.pop("momentum"))
    exact = NaturalGradient(model, KFACConfig(seed=seed, **kfac, **keywords))
    return Stepper([optimizer], precondition=lambda closure, loss: exact.step(optimizer))
