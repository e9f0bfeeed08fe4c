"""The two-level update of a step: corrected, clipped and, with adaptive damping, tried on the loss first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_dist.correction import Correction
from kfac_dist.fine import Fine
from kfac_dist.one_level import OneLevel
from kfac_dist.samples import Samples
from kfac_dist.trust import MAX_REJECTIONS
from kfac_dist.two_level import TwoLevel
from kfac_dist.update import Update, plan_update, reduction_ratio


@dataclass(frozen=True)
class Step:
    """What the caller said of this step.

    Attributes:
        number: 0, 1, ..
        damping: of the fine level.
        lr: the outer optimizer or its rate; None: 1.
        closure: the training loss on the same batch, for adaptive damping.
    """

    number: int
    damping: float
    lr: float | Optimizer | None
    closure: Callable[[], Tensor] | None


def plan_two_levels(
    model: nn.Module,
    one: OneLevel,
    two: TwoLevel,
    samples: Samples,
    gradients: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    step: Step,
) -> Update:
    """The update that is to be written; nothing is written yet.

    Where the adaptive damping is due, an update that would raise the loss is made anew with more damping; if none of
    the attempts is any good, no step is taken, and the next batch has another try.

    Args:
        model: for the trial; it is left as it was.
        one: the fine level.
        two: the coarse level.
        samples: the kept samples of the last curvature batch, on this rank.
        gradients: layer -> gradient of the mean loss.
        directions: layer -> zeta.
        step: this step.
    """
    layers = [layer for layer in one.layers if layer.name in directions]
    joint = frozenset(layer.name for layer in layers if layer.joint)
    taken = True
    for _ in range(MAX_REJECTIONS):
        lam = two.damping(step.number, step.damping)
        fine = Fine(
            gradients,
            directions,
            one.states,
            samples,
            one.exchange,
            one.assignment,
            one.world,
            step.damping,
            lam,
            joint,
        )
        correction = two.correct(fine, samples, lam, step.number)
        update = plan_update(layers, gradients, directions, correction, one.config.kl_clip, step.lr)
        if step.closure is None or not _to_be_judged(two, step.number, correction, update):
            break
        ratio = reduction_ratio(model, update, gradients, samples, one.world, lam, one.loss_scale, step.closure)
        if ratio is None:
            break
        two.report |= {"coarse/reduction_ratio": ratio}
        if two.trust.judge(ratio):
            break
        two.discard()
    else:
        update, taken = update.abandoned(), False
        two.abandoned += 1
    two.report_coefficients(correction)
    two.report |= {"coarse/damping": lam, "coarse/dimension": two.dimension}
    two.report |= {"coarse/failures": two.failures, "coarse/abandoned": two.abandoned}
    finite = two.space.uses_momentum and taken and bool(torch.isfinite(update.products).all())
    two.remember(update.directions, update.scale, update.corrected, finite)
    return update


def _to_be_judged(two: TwoLevel, step: int, correction: Correction | None, update: Update) -> bool:
    """Whether the loss has a say in this step: lam_c has no part in a one-level step, nor in one that is not finite."""
    if not two.adaptive or not two.trust.due(step) or correction is None or not correction.solved:
        return False
    return bool(torch.isfinite(update.products).all())
