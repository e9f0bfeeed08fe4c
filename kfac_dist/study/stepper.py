"""A training step in plain PyTorch, the same lines for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from kfac_dist import KFACPreconditioner


def nothing() -> None:
    """What most optimizers do between the forward and the backward."""


def unchanged(closure: Callable[[], Tensor], loss: Tensor) -> None:
    """What most optimizers do to the gradient."""


@dataclass(frozen=True)
class Stepper:
    """Optimizers, and what a preconditioner does before them.

    Attributes:
        optimizers: they step one after the other.
        accumulate: called between the forward and the backward.
        precondition: called after the backward, with a closure that returns the loss of the same batch, and that loss.
        preconditioner: K-FAC, where that is what rewrites the gradient; for looking at it.
    """

    optimizers: Sequence[Optimizer]
    accumulate: Callable[[], None] = nothing
    precondition: Callable[[Callable[[], Tensor], Tensor], None] = unchanged
    preconditioner: KFACPreconditioner | None = None

    def step(self, loss: Callable[[], Tensor], closure: Callable[[], Tensor]) -> Tensor:
        """One step.

        Args:
            loss: the loss of the batch, with its graph.
            closure: the same loss again, for methods that try a step out.

        Returns:
            The loss before the step, detached.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        value = loss()
        self.accumulate()
        value.backward()
        self.precondition(closure, value.detach())
        for optimizer in self.optimizers:
            optimizer.step()
        return value.detach()
