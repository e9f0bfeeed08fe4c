"""From directions to ``param.grad``: the KL clip, the fall back to one level, and the numbers of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_dist.clip import kl_clip_scale, learning_rates
from kfac_dist.comm import Communicator
from kfac_dist.config import KFACConfig
from kfac_dist.layers import Layer
from kfac_dist.metrics import MetricValue
from kfac_dist.samples import Samples
from kfac_dist.trust import trial_losses
from kfac_dist.two_level import Correction


@dataclass(frozen=True)
class Update:
    """What was written.

    Attributes:
        layers: the layers, in order.
        directions: layer -> direction before the clip's scale.
        scale: the clip's factor, on the device.
        corrected: whether the corrected direction was taken, on the device.
        products: (layers,), <direction, gradient> before the scale.
        rates: (layers,), the outer optimizer's rates.
    """

    layers: Sequence[Layer]
    directions: Mapping[str, Tensor]
    scale: Tensor
    corrected: Tensor
    products: Tensor
    rates: Tensor

    def metrics(self, gradients: Mapping[str, Tensor]) -> dict[str, MetricValue]:
        """Norms of the step; nothing is computed until it is read."""
        directions, scale = self.directions, self.scale
        return {
            "direction_dot_gradient": self.products.sum() * scale,
            "kl_clip_scale": scale,
            "corrected": self.corrected,
            "grad_norm": lambda: _norm(gradients.values()),
            "direction_norm": lambda: _norm(directions.values()) * float(scale),
        }


def _norm(tensors: object) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())  # type: ignore[attr-defined]


def write_directions(
    layers: Sequence[Layer],
    gradients: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    correction: Correction | None,
    config: KFACConfig,
    lr: float | Optimizer | None,
) -> Update:
    """Overwrite ``param.grad`` by the clipped direction.

    With a KL clip, a corrected direction that does not descend (<zeta_2, grad> <= 0) is replaced by the one-level one.

    Args:
        layers: the layers that have a direction.
        gradients: layer -> gradient.
        directions: layer -> zeta.
        correction: the coarse level's, or None.
        config: for the clip.
        lr: the outer optimizer or its rate; None: 1.
    """
    products = torch.stack([torch.sum(directions[layer.name] * gradients[layer.name]) for layer in layers])
    rates = learning_rates(layers, 1.0 if lr is None else lr, products)
    corrected = torch.zeros((), dtype=torch.bool, device=products.device)
    final = directions
    if correction is not None and correction.solved:
        better = correction.products(gradients).to(products)
        final = correction.direction()
        corrected = torch.ones_like(corrected)
        if config.kl_clip is not None:
            corrected = (better * rates**2).sum() > 0
            final = {name: torch.where(corrected, zeta, directions[name]) for name, zeta in final.items()}
        products = torch.where(corrected, better, products)
    scale = torch.ones((), dtype=products.dtype, device=products.device)
    if config.kl_clip is not None:
        scale = kl_clip_scale(config.kl_clip, products, rates)
    for layer in layers:
        zeta = final[layer.name]
        layer.write_gradient(zeta if config.kl_clip is None else zeta * scale)
    return Update(layers, final, scale, corrected, products, rates)


def reduction_ratio(
    model: nn.Module,
    update: Update,
    gradients: Mapping[str, Tensor],
    samples: Samples,
    communicator: Communicator,
    damping: float,
    loss_scale: float,
    closure: Callable[[], Tensor | float],
) -> float:
    """True decrease of the loss over the one that the damped quadratic model predicts (Martens and Grosse, 6.5).

    The prediction is <d, grad> - d^T F_l d / 2 for the step d that the outer optimizer is about to subtract, with the
    F of the kept samples. One all-reduce of four numbers: every rank gets the same verdict.

    Args:
        model: for the trial; it is left as it was.
        update: what was written.
        gradients: layer -> gradient of the mean loss.
        samples: the kept samples.
        communicator: over all ranks; the ranks' losses count alike.
        damping: lam_c.
        loss_scale: the training loss over the mean one.
        closure: the training loss on the same batch.
    """
    steps = {
        layer.name: update.directions[layer.name] * (update.scale * rate).to(gradients[layer.name])
        for layer, rate in zip(update.layers, update.rates, strict=True)
    }
    parameters = [parameter for layer in update.layers for parameter in layer.parameters]
    parts = [part for layer in update.layers for part in layer.from_matrix(steps[layer.name]) if part is not None]
    before, after = trial_losses(model, parameters, parts, closure)
    like = next(iter(steps.values()))
    w = torch.stack([rows[0] for rows in samples.project({n: [d] for n, d in steps.items()}, like).values()]).sum(0)
    sums = torch.stack([w.double().square().sum(), w.new_tensor(samples.valid).double()]).cpu()
    sums = torch.cat([sums, torch.tensor([before, after], dtype=torch.float64)]).to(like.device)
    communicator.all_reduce(sums, phase="adaptive")
    energy, count, before, after = sums.tolist()
    slope = float(torch.stack([(steps[name] * gradients[name]).sum().double() for name in steps]).sum())
    length = float(torch.stack([step.double().square().sum() for step in steps.values()]).sum())
    if not count > 0:
        return float("nan")
    predicted = slope - 0.5 * (energy / count + damping * length)
    decrease = (before - after) / communicator.size / loss_scale
    return decrease / predicted if predicted > 0 else float("nan")
