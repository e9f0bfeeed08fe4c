"""A small convolutional classifier for 8 x 8 digits: the quickest problem with Conv2d layers."""

from __future__ import annotations

from torch import Tensor, nn

from kfac_dist.study.problem import Classifier

CLASSES = 10


class DigitsCNN(Classifier):
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
        super().__init__(lr, momentum)
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

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of ``images`` (B, 1, 8, 8)."""
        return self.net(images)
