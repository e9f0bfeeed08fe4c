"""A convolutional network of the literature, chosen by name, as a classifier of 3 x 32 x 32 images."""

from __future__ import annotations

from torch import Tensor

from kfac_dist.study.convnets import convnet
from kfac_dist.study.problem import Classifier


class ImageClassifier(Classifier):
    """Classifies images; ``forward`` returns LOGITS.

    Logs the cross-entropy, in nats per image, as ``loss`` and ``val_loss`` and the share of images classified rightly
    as ``accuracy`` and ``val_accuracy``.

    Args:
        net: "cuda_convnet", "vgg11", "vgg11_bn", "resnet18", "resnet20", "resnet34" or "resnet50".
        classes: number of classes.
        lr: learning rate of the SGD that serves unless the command line or a configuration names an optimizer.
        momentum: of that SGD.
        uncovered_lr: for the learning-rate-free mode, in which lr is 1: rate of what K-FAC does not cover, to which
            the momentum then belongs; None: one rate and one momentum for all parameters.

    Raises:
        ValueError: an unknown network, fewer than two classes, or an uncovered_lr of 0 or less.
    """

    def __init__(
        self,
        net: str = "resnet20",
        classes: int = 10,
        lr: float = 0.05,
        momentum: float = 0.9,
        uncovered_lr: float | None = None,
    ) -> None:
        super().__init__(lr, momentum, uncovered_lr)
        self.net = convnet(net, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of ``images`` (B, 3, 32, 32)."""
        return self.net(images)
