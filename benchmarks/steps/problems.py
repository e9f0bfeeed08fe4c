"""The nets that are timed, each with one batch and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.study import Autoencoder
from kfac_dist.study.convnets import basic, resnet
from kfac_dist.study.mnist import mnist_digits


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        widths: of the autoencoder's encoder; the first one is the number of pixels that are taken.
        batch: its samples per step.
        large: its samples per step where the batch is large; at most the 4,500 digits.
        stages: widths of the ResNet's stages.
        depth: its blocks per stage.
        images: samples per step of the ResNet.
        side: pixels along one side of these images.
    """

    widths: tuple[int, ...] = (784, 1000, 500, 250, 30)
    batch: int = 256
    large: int = 4096
    stages: tuple[int, ...] = (16, 32, 64)
    depth: int = 3
    images: int = 64
    side: int = 32


SMOKE = Sizes(widths=(49, 12, 4), batch=32, large=64, stages=(4, 8), depth=1, images=2, side=8)


@dataclass(frozen=True)
class Problem:
    """A net and a batch.

    Attributes:
        build: makes the net, always with the same weights.
        x: the inputs (B, ..).
        y: the targets (B, ..).
        loss: of logits and targets, a mean over samples.
        likelihood: that it belongs to.
    """

    build: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    likelihood: str


def autoencoder(sizes: Sizes, batch: int, first: int = 0) -> Problem:
    """The MNIST autoencoder on ``batch`` real digits, from number ``first`` on."""
    images = mnist_digits()[0][0]
    x = images[first : first + batch, :: images.shape[1] // sizes.widths[0]][:, : sizes.widths[0]].contiguous()
    if len(x) < batch:
        raise ValueError(f"a batch of {batch} from digit {first} on needs more than the {first + len(x)} digits")

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Autoencoder(sizes.widths).net

    def loss(logits: Tensor, images: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)

    return Problem(build, x, x, loss, "bernoulli")


def resnet20(sizes: Sizes) -> Problem:
    """ResNet-20 on noise of the shape of CIFAR-10: what a step costs does not depend on the images."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sizes.images, 3, sizes.side, sizes.side, generator=generator)
    y = torch.randint(0, 10, (sizes.images,), generator=generator)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return resnet(10, sizes.stages, (sizes.depth,) * len(sizes.stages), partial(basic, padded=True))

    return Problem(build, x, y, F.cross_entropy, "categorical")
