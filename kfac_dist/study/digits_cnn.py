"""A small convolutional classifier for 8 x 8 digits: the quickest problem with Conv2d layers."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

CLASSES = 10


class DigitsCNN(pl.LightningModule):
    """Two convolutions and one Linear layer; ``forward`` returns LOGITS.

    Logs the cross-entropy, in nats per image, as ``loss`` and ``val_loss`` and the share of images classified rightly
    as ``accuracy`` and ``val_accuracy``.

    Args:
        channels: of the first convolution; the second one has twice as many.
        lr: learning rate of the SGD that serves unless the command line or a configuration names an optimizer.
        momentum: of that SGD.

    Raises:
        ValueError: fewer than one channel.
    """

    def __init__(self, channels: int = 16, lr: float = 0.05, momentum: float = 0.9) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels={channels} must be at least 1")
        self.net = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * 4 * 4, CLASSES),
        )
        self.lr = lr
        self.momentum = momentum

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of ``images`` (B, 1, 8, 8)."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch (images, labels)."""
        return self._loss(batch, "")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the held-out loss and accuracy."""
        self._loss(batch, "val_")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the test loss and accuracy."""
        self._loss(batch, "test_")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Class probabilities (B, 10)."""
        return self(batch[0]).softmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)

    def _loss(self, batch: tuple[Tensor, Tensor], prefix: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = multiclass_accuracy(logits.detach(), labels, num_classes=CLASSES, average="micro")
        self.log_dict(
            {f"{prefix}loss": loss.detach(), f"{prefix}accuracy": accuracy},
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            sync_dist=True,
            batch_size=len(images),
        )
        return loss
