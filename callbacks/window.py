"""Which backwards belong to an optimizer step, and whether Lightning's hooks came in an order that K-FAC can follow."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer


class Window:
    """The backwards since the last optimizer step, and the steps since the last batch began."""

    def __init__(self) -> None:
        self._backwards = 0
        self._stepped = False

    def begin_batch(self) -> None:
        """A new batch; backwards of earlier micro-batches still wait for their step."""
        self._stepped = False

    def add_backward(self) -> None:
        """A backward is about to run."""
        self._backwards += 1

    def end(self, pl_module: pl.LightningModule, optimizer: Optimizer) -> bool:
        """An optimizer step is about to run: whether there are gradients to precondition.

        Raises:
            MisconfigurationException: the optimizer runs several backwards per step, or one ran that did not call us.
        """
        backwards, self._backwards = self._backwards, 0
        if pl_module.automatic_optimization:
            if backwards and self._stepped:
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} evaluates its closure several times per step, and each gradient would "
                    "be preconditioned: use an optimizer that evaluates it once, such as torch.optim.SGD"
                )
            self._stepped = True
        elif not backwards and any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            raise MisconfigurationException(
                "optimizer.step() came without a backward that KFAC was told of: in manual optimization call "
                "self.manual_backward(loss) instead of loss.backward()"
            )
        return backwards > 0  # none where training_step returned None
