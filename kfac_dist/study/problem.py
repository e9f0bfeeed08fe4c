"""What the problems share: the three steps, the optimizer that serves by default, and the loss of a classifier."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from kfac_dist.rate_free import parameter_groups


class Problem(pl.LightningModule):
    """A network with a loss; a subclass says how the loss is formed and logged.

    Args:
        lr: learning rate of the SGD that serves unless the command line or a configuration names an optimizer.
        momentum: of that SGD.
        uncovered_lr: rate of the parameters that K-FAC does not cover; None: ``lr``. It is there for the
            learning-rate-free mode, in which ``lr`` is 1: with it, only the uncovered ones have a momentum.

    Raises:
        ValueError: an uncovered_lr of 0 or less.
    """

    def __init__(self, lr: float, momentum: float, uncovered_lr: float | None = None) -> None:
        super().__init__()
        if uncovered_lr is not None and uncovered_lr <= 0:
            raise ValueError(f"uncovered_lr={uncovered_lr} must be above 0, or None: the same rate for all parameters")
        self.lr = lr
        self.momentum = momentum
        self.uncovered_lr = uncovered_lr

    @abstractmethod
    def loss(self, batch: Any, prefix: str) -> Tensor:
        """The loss of one batch; its metrics are logged under names that begin with ``prefix``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        return self.loss(batch, "")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the held-out metrics."""
        self.loss(batch, "val_")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the test metrics."""
        self.loss(batch, "test_")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        if self.uncovered_lr is None:
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)
        return torch.optim.SGD(parameter_groups(self, self.lr, self.uncovered_lr, self.momentum), lr=self.lr)

    def log_means(self, metrics: dict[str, Tensor], prefix: str, count: int) -> None:
        """Log means over an epoch's samples, ``count`` of which are in this batch."""
        self.log_dict(
            {f"{prefix}{name}": value for name, value in metrics.items()},
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            sync_dist=True,
            batch_size=count,
        )


class Classifier(Problem):
    """Cross-entropy of logits (B, classes, ..), averaged over all labels (B, ..).

    Logs it, in nats per label, as ``loss`` and ``val_loss``, and the share of labels that have the largest logit as
    ``accuracy`` and ``val_accuracy``.
    """

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Class probabilities (B, classes, ..)."""
        return self(batch[0]).softmax(1)

    def loss(self, batch: tuple[Tensor, Tensor], prefix: str) -> Tensor:
        """Cross-entropy of one batch (inputs, labels)."""
        inputs, labels = batch
        logits = self(inputs)
        loss = F.cross_entropy(logits, labels)
        accuracy = multiclass_accuracy(logits.detach(), labels, num_classes=logits.shape[1], average="micro")
        self.log_means({"loss": loss.detach(), "accuracy": accuracy}, prefix, len(inputs))
        return loss
