"""Levenberg-Marquardt: a damping that follows how well the quadratic model predicts the loss.

Martens and Grosse 2015, section 6.5, with omega = (19/20)^5 every 5 steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfac_dist.layers.watch import silence

INTERVAL = 5
OMEGA = 0.95**INTERVAL
WARM_UP = 20
REJECTION = 4.0
MAX_REJECTIONS = 8
LOWEST, HIGHEST = 1e-12, 1e12


@dataclass
class LevenbergMarquardt:
    """A damping and the rule that moves it.

    Every 5 steps, rho = true decrease of the loss / predicted decrease: above 3/4 the damping is multiplied by omega,
    below 1/4 divided by it. A step that would INCREASE the loss is rejected: four times the damping, and another try,
    up to 8 of them; then no step is taken.
    The first 20 steps are all checked, as the damping is a guess at first, and so is the step after a rejection.

    Attributes:
        damping: the current value.
        again: whether the next step is checked in any case.
    """

    damping: float
    again: bool = False

    def due(self, step: int) -> bool:
        """Whether the step (0, 1, ..) is checked."""
        return self.again or step < WARM_UP or step % INTERVAL == 0

    def judge(self, ratio: float) -> bool:
        """Move the damping by the ratio rho; False where the step is rejected (rho below 0, or not finite)."""
        accepted = math.isfinite(ratio) and ratio >= 0.0
        if not accepted:
            factor = REJECTION
        elif ratio < 0.25:
            factor = 1.0 / OMEGA
        else:
            factor = OMEGA if ratio > 0.75 else 1.0
        self.again = not accepted or ratio < 0.25
        self.damping = min(max(self.damping * factor, LOWEST), HIGHEST)
        return accepted


@contextmanager
def unchanged(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Leave the model's buffers, the given parameters and the random streams bitwise as they were; hooks are silent."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    saved = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), silence():
            yield
    finally:
        with torch.no_grad():
            for tensor, value in [*buffers, *saved]:
                tensor.copy_(value)


def loss_before(model: nn.Module, closure: Callable[[], Tensor | float]) -> float:
    """The loss as the model is; what the evaluation changes in it is taken back."""
    with unchanged(model, ()):
        return float(closure())


def loss_after(
    model: nn.Module,
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    closure: Callable[[], Tensor | float],
) -> float:
    """The loss on the same batch after an update, with the random numbers of :func:`loss_before`.

    Args:
        model: its buffers are restored.
        parameters: what the update changes: parameters, or views of them.
        updates: what is SUBTRACTED from each of them, in its shape.
        closure: returns the loss of the batch; it is called without gradients.
    """
    with unchanged(model, parameters):
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.sub_(update.to(parameter.dtype))
        return float(closure())
