"""The loss of the current window once more, without a trace: for an adaptive damping.

``training_step`` runs on a deep copy of the module with a Trainer whose loggers are dummies, so that BatchNorm
statistics, metrics, lists that the user fills and logs stay exactly as they are; the random streams are put back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor


class SilentTrainer:
    """The Trainer as a copy of the module sees it: everything is there, but nothing is logged."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self.logger = DummyLogger()
        self.loggers = [self.logger]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


class Trial:
    """Called without arguments, it returns the loss at the module's present parameters, averaged over the window.

    Args:
        trainer: the Trainer.
        pl_module: its module.
        required: whether a module that cannot be copied is an error; else a warning, and the loss is NaN, which gives
            the damping no verdict.

    Raises:
        MisconfigurationException: manual optimization, where ``training_step`` itself makes steps.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, required: bool) -> None:
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "an adaptive damping evaluates training_step once more, which makes steps itself in manual "
                "optimization: choose a number, damping=.. or CoarseConfig(damping=..)"
            )
        self._trainer = trainer
        self._module = pl_module
        self._required = required
        self._possible = True
        self._batches: list[tuple[Any, int]] = []

    def keep(self, batch: Any, batch_idx: int) -> None:
        """Remember a micro-batch of the window."""
        self._batches.append((batch, batch_idx))

    def clear(self) -> None:
        """Forget the window."""
        self._batches.clear()

    def _copy(self) -> pl.LightningModule | None:
        try:
            replica = copy.deepcopy(self._module)  # which leaves the Trainer out
        except Exception as error:
            message = (
                f"{type(self._module).__name__} cannot be copied ({error!r}), which an adaptive damping needs "
                "to evaluate its loss without a trace: choose a number, damping=.. or CoarseConfig(damping=..)"
            )
            if self._required:
                raise MisconfigurationException(message) from error
            rank_zero_warn(f"the coarse damping stays where it is: {message}")
            self._possible = False
            return None
        replica._trainer = SilentTrainer(self._trainer)  # type: ignore[assignment]
        replica.log = replica.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
        return replica

    def __call__(self) -> Tensor:
        """The loss, a scalar; NaN where the module skipped every micro-batch."""
        replica = self._copy() if self._possible else None
        if replica is None:
            return torch.tensor(float("nan"))
        losses = []
        with torch.no_grad(), isolate_rng():
            for batch, batch_idx in self._batches:
                with self._trainer.precision_plugin.train_step_context():
                    output = replica.training_step(batch, batch_idx)
                loss = output["loss"] if isinstance(output, Mapping) else output
                if isinstance(loss, Tensor):
                    losses.append(loss.detach().float() if loss.dtype in (torch.float16, torch.bfloat16) else loss)
        return torch.stack(losses).mean() if losses else torch.tensor(float("nan"))
