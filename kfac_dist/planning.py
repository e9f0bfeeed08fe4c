"""The update of a step: corrected, clipped and, where a damping follows the loss, tried on the loss first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_dist.fine import Fine
from kfac_dist.fine_damping import FineDamping
from kfac_dist.kept_rows import Rows
from kfac_dist.metrics import MetricValue
from kfac_dist.one_level import OneLevel
from kfac_dist.samples import Samples
from kfac_dist.trust import MAX_REJECTIONS, loss_before
from kfac_dist.two_level import TwoLevel
from kfac_dist.update import Update, plan_update, reduction_ratio


@dataclass(frozen=True)
class Step:
    """What the caller said of this step.

    Attributes:
        number: 0, 1, ..
        lr: the outer optimizer or its rate; None: 1.
        closure: the training loss on the same batch, for adaptive damping.
        loss: what it returns now, where that is known.
    """

    number: int
    lr: float | Optimizer | None
    closure: Callable[[], Tensor] | None
    loss: Tensor | float | None = None


def plan_step(
    model: nn.Module,
    one: OneLevel,
    two: TwoLevel | None,
    samples: Samples | None,
    gradients: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    rows: Mapping[str, Rows],
    step: Step,
) -> Update:
    """The update that is to be written; nothing is written yet.

    Where an adaptive damping is due, an update that would raise the loss is made anew with more damping; if none of
    the attempts is any good, no step is taken, and the next batch has another try.

    Args:
        model: for the trial; it is left as it was.
        one: the fine level.
        two: the coarse level; None: there is none.
        samples: the kept samples of the last curvature batch, on this rank; None: there are none, nor a coarse level.
        gradients: layer -> gradient of the mean loss.
        directions: layer -> zeta.
        rows: layer -> the rows that make its gradient, where they are known.
        step: this step.
    """
    layers = [layer for layer in one.layers if layer.name in directions]
    joint = frozenset(layer.name for layer in layers if layer.joint)
    report: dict[str, MetricValue] = {}
    correction, taken, before = None, True, None
    judged = _judged(one, two) if step.closure is not None else None
    for _ in range(MAX_REJECTIONS):
        damping = one.damping.value(step.number)
        report["damping"] = damping
        if two is not None and samples is not None:
            lam = two.damping(step.number, damping)
            two.report["coarse/damping"] = lam
            fine = Fine(
                gradients,
                directions,
                one.states,
                samples,
                one.exchange,
                one.assignment,
                one.world,
                damping,
                lam,
                joint,
            )
            correction = two.correct(fine, samples, lam, step.number)
        update = plan_update(layers, gradients, directions, correction, one.config.kl_clip, step.lr)
        rule = None if judged is None else judged.trust
        if rule is None or samples is None or step.closure is None or not rule.due(step.number):
            break
        if judged is two and (correction is None or not correction.solved):  # lam_c has no part in a one-level step
            break
        if not bool(torch.isfinite(update.products).all()):
            break
        if before is None:  # and not at every attempt
            before = loss_before(model, step.closure) if step.loss is None else float(step.loss)
        ratio = reduction_ratio(
            model, update, gradients, samples, one.world, rule.damping, one.loss_scale, step.closure, before
        )
        if ratio is None:
            break
        if two is not None and judged is two:
            two.report["coarse/reduction_ratio"] = ratio
        else:
            report["reduction_ratio"] = ratio
        if rule.judge(ratio):
            break
        if judged is one.damping:
            directions = one.precondition(gradients, rule.damping, rows)
        if two is not None:
            two.discard()
    else:
        update, taken = update.abandoned(), False
        if judged is not None:
            judged.abandoned += 1
    if one.damping.adaptive:
        report["abandoned"] = one.damping.abandoned
    if two is not None:
        two.report_coefficients(correction)
        two.report |= {"coarse/dimension": two.dimension}
        two.report |= {"coarse/failures": two.failures, "coarse/abandoned": two.abandoned}
        finite = two.space.uses_momentum and taken and bool(torch.isfinite(update.products).all())
        two.remember(update.directions, update.scale, update.corrected, finite)
    return replace(update, report=report)


def _judged(one: OneLevel, two: TwoLevel | None) -> FineDamping | TwoLevel | None:
    """Whose damping follows the loss."""
    if two is not None and two.adaptive:
        return two
    return one.damping if one.damping.adaptive else None
