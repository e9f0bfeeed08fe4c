"""From directions to ``param.grad``: the KL clip, the fall back to one level, and how well the step was predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_dist.clip import kl_clip_scale, learning_rates
from kfac_dist.coarse import inner
from kfac_dist.comm import Communicator
from kfac_dist.correction import Correction
from kfac_dist.layers import Layer
from kfac_dist.metrics import MetricValue
from kfac_dist.samples import Samples
from kfac_dist.trust import loss_after


@dataclass(frozen=True)
class Update:
    """What is to be written.

    Attributes:
        layers: the layers, in order.
        directions: layer -> direction, clipped.
        scale: the clip's factor, on the device.
        corrected: whether the corrected direction was taken, on the device.
        products: (layers,), <direction, gradient>, on the device; (0,) where nobody needs them and they would cost.
        rates: (layers,), the outer optimizer's rates.
        gradient_norm: of the gradients, on the device; None where they are not formed.
        report: what else is to be said of the step.
    """

    layers: Sequence[Layer]
    directions: Mapping[str, Tensor]
    scale: Tensor
    corrected: Tensor
    products: Tensor
    rates: Tensor
    gradient_norm: Tensor | None
    report: Mapping[str, MetricValue] = field(default_factory=dict)

    def write(self) -> None:
        """Overwrite ``param.grad``."""
        for layer in self.layers:
            layer.write_gradient(self.directions[layer.name])

    def abandoned(self) -> Update:
        """No step at all: zeros in the place of the directions."""
        directions = {name: torch.zeros_like(direction) for name, direction in self.directions.items()}
        return replace(self, directions=directions, scale=0.0 * self.scale, products=torch.zeros_like(self.products))

    def metrics(self) -> dict[str, MetricValue]:
        """Norms of the step, on the device; the directions themselves are not held."""
        values: dict[str, MetricValue] = {
            **self.report,
            "kl_clip_scale": self.scale,
            "corrected": self.corrected,
            "direction_norm": _norm(list(self.directions.values())),
        }
        if self.products.numel():
            values["direction_dot_gradient"] = self.products.sum()
        if self.gradient_norm is not None:
            values["grad_norm"] = self.gradient_norm
        return values


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norms: tuple[Tensor, ...] = torch._foreach_norm(list(tensors))
    norm: Tensor = torch.stack(norms).norm()
    return norm


def _products(
    layers: Sequence[Layer],
    gradients: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    known: Mapping[str, Tensor],
) -> Tensor:
    if any(layer.name not in gradients and layer.name not in known for layer in layers):
        return directions[layers[0].name].new_zeros(0)
    return torch.stack(
        [
            known[layer.name] if layer.name in known else torch.sum(directions[layer.name] * gradients[layer.name])
            for layer in layers
        ]
    )


def plan_update(
    layers: Sequence[Layer],
    gradients: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    correction: Correction | None,
    kl_clip: float | None,
    lr: float | Optimizer | None,
    known: Mapping[str, Tensor] | None = None,
) -> Update:
    """The clipped direction; nothing is written yet. Without a correction it is made in the memory of ``directions``.

    With a KL clip, a corrected direction that does not descend (<zeta_2, grad> <= 0) is replaced by the one-level one.

    Args:
        layers: the layers that have a direction.
        gradients: layer -> gradient.
        directions: layer -> zeta.
        correction: the coarse level's, or None.
        kl_clip: bound of the clip; None: off.
        lr: the outer optimizer or its rate; None: 1.
        known: layer -> <zeta, gradient>, for layers whose gradients are not formed; with a clip it is needed of them.
    """
    like = next(iter(directions.values()))
    mine = None if correction is None or not correction.solved else correction.one_level_products(gradients)
    products = _products(layers, gradients, directions, known or {}) if mine is None else mine.to(like)
    rates = learning_rates(layers, 1.0 if lr is None else lr, products)
    corrected = torch.zeros((), dtype=torch.bool, device=products.device)
    solved = correction is not None and correction.solved
    if correction is not None and solved:
        better = correction.products(gradients).to(products)
        corrected = torch.ones_like(corrected)
        if kl_clip is not None:
            corrected = (better * rates**2).sum() > 0
        products = torch.where(corrected, better, products)
    scale = torch.ones((), dtype=products.dtype, device=products.device)
    if kl_clip is not None:
        scale = kl_clip_scale(kl_clip, products, rates)
    if correction is not None and solved:
        final = correction.direction(corrected, scale)
    elif kl_clip is None:
        final = dict(directions)
    elif correction is None:  # nobody else asks for zeta
        final = {name: zeta.mul_(scale) for name, zeta in directions.items()}
    else:
        final = {name: zeta * scale for name, zeta in directions.items()}
    norm = _norm(list(gradients.values())) if len(gradients) == len(layers) else None
    return Update(layers, final, scale, corrected, products * scale, rates, norm)


def reduction_ratio(
    model: nn.Module,
    update: Update,
    gradients: Mapping[str, Tensor],
    samples: Samples,
    communicator: Communicator,
    damping: float,
    loss_scale: float,
    closure: Callable[[], Tensor | float],
    before: float,
) -> float | None:
    """True decrease of the loss over the one that the damped quadratic model predicts (Martens and Grosse, 6.5).

    The prediction is <d, grad> - d^T F_l d / 2 for the step d that the outer optimizer is about to subtract, with the
    F of the kept samples. One all-reduce of seven numbers: every rank gets the same verdict, bit by bit.

    Args:
        model: for the trial; it is left as it was.
        update: what is to be written.
        gradients: layer -> gradient of the mean loss.
        samples: the kept samples.
        communicator: over all ranks; the ranks' losses count alike. One that is not finite BEFORE the update says
            nothing about it (a rank without samples), and counts as zero, as its gradients did.
        damping: the one that is judged, in the model's F + damping I.
        loss_scale: the training loss over the mean one.
        closure: the training loss on the same batch.
        before: what it is without the update.

    Returns:
        The ratio; NaN where the model predicts no decrease; None where no rank has a finite loss before the update.
    """
    steps = {
        layer.name: update.directions[layer.name] * rate.to(gradients[layer.name])
        for layer, rate in zip(update.layers, update.rates, strict=True)
    }
    views = [view for layer in update.layers for view in layer.views]
    parts = [part for layer in update.layers for part in layer.parts(steps[layer.name])]
    after = loss_after(model, views, parts, closure)
    like = next(iter(steps.values()))
    w = samples.along(steps)
    known = math.isfinite(before)
    losses = [before, after, 1.0] if known else [0.0, 0.0, 0.0]
    mine = [float(w.double().square().sum()), samples.valid, *losses, 0.0, 0.0]
    if communicator.rank == 0:  # the same on all ranks, but for the last bits where their hardware is not alike
        mine[-2] = float((update.products * update.rates).sum())
        mine[-1] = float(torch.stack([inner(step, step) for step in steps.values()]).sum())
    sums = torch.tensor(mine, dtype=torch.float64, device=like.device)
    communicator.all_reduce(sums, phase="adaptive")
    energy, count, before, after, ranks, slope, length = sums.tolist()
    if not ranks:
        return None
    if not count > 0:
        return float("nan")
    predicted = slope - 0.5 * (energy / count + damping * length)
    decrease = (before - after) / communicator.size / loss_scale
    return decrease / predicted if predicted > 0 else float("nan")
