"""Convolutional classifiers of 3 x 32 x 32 images, by name: :func:`convnet`.

Every one takes (B, 3, 32, 32) and returns logits (B, classes). Biases are left out where BatchNorm follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from kfac_dist.registry import Registry

convnets: Registry[Callable[[int], nn.Module]] = Registry("network")
"""Name -> function that builds the network for a number of classes."""


def convnet(name: str, classes: int) -> nn.Module:
    """The network ``name``, with the convolutions drawn as in He et al. (2015).

    Raises:
        ValueError: an unknown name, which the message answers with the known ones, or fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"classes={classes} must be at least 2")
    net = convnets[name](classes)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net


@convnets.register("cuda_convnet")
def cuda_convnet(classes: int) -> nn.Module:
    """Krizhevsky's net for CIFAR-10 from cuda-convnet: three 5 x 5 convolutions with poolings, and one Linear.

    It is the net of his 18 % configuration without the local response normalisation.
    """
    pool: dict[str, int | bool] = {"kernel_size": 3, "stride": 2, "ceil_mode": True}  # 32 -> 16 -> 8 -> 4
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2),
        nn.MaxPool2d(**pool),  # type: ignore[arg-type]
        nn.ReLU(),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(**pool),  # type: ignore[arg-type]
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(**pool),  # type: ignore[arg-type]
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, classes),
    )


VGG11 = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")
"""Configuration A of Simonyan & Zisserman (2015): channels of the 3 x 3 convolutions, and poolings that halve."""


def vgg11(classes: int, norm: bool) -> nn.Module:
    """VGG-11 for 32 x 32 images: after five poolings one pixel is left, and one Linear takes the place of three."""
    layers: list[nn.Module] = []
    channels = 3
    for entry in VGG11:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, entry, 3, padding=1, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm2d(entry))
        layers.append(nn.ReLU())
        channels = entry
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes))


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)): the block of He et al. (2016)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Output of the block, from x (B, channels, height, width)."""
        return F.relu(self.body(x) + self.shortcut(x))


class PaddedShortcut(nn.Module):
    """Every second pixel, and channels of zeros in equal numbers before and after: option A of He et al. (2016)."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + extra, H / 2, W / 2)."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


def conv(d_in: int, d_out: int, size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution that keeps the image's size up to the stride, and BatchNorm."""
    return [nn.Conv2d(d_in, d_out, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(d_out)]


def basic(d_in: int, width: int, stride: int, padded: bool) -> Residual:
    """Two convolutions of 3 x 3; where the shape changes, the shortcut is parameter-free (``padded``) or 1 x 1."""
    body = nn.Sequential(*conv(d_in, width, 3, stride), nn.ReLU(), *conv(width, width, 3))
    shortcut: nn.Module = nn.Identity()
    if stride != 1 or d_in != width:
        shortcut = PaddedShortcut(width - d_in) if padded else nn.Sequential(*conv(d_in, width, 1, stride))
    return Residual(body, shortcut)


def bottleneck(d_in: int, width: int, stride: int) -> Residual:
    """1 x 1, 3 x 3 (with the stride) and 1 x 1 convolutions to 4 x width channels, with 1 x 1 shortcuts."""
    d_out = 4 * width
    body = nn.Sequential(
        *conv(d_in, width, 1), nn.ReLU(), *conv(width, width, 3, stride), nn.ReLU(), *conv(width, d_out, 1)
    )
    same = stride == 1 and d_in == d_out
    return Residual(body, nn.Identity() if same else nn.Sequential(*conv(d_in, d_out, 1, stride)))


def resnet(
    classes: int, widths: Sequence[int], depths: Sequence[int], block: Callable[..., Residual], expansion: int = 1
) -> nn.Module:
    """Stages of residual blocks; the first block of every stage but the first one halves the image.

    The stem is one 3 x 3 convolution with stride 1 and no pooling, as 32 x 32 images want it.

    Args:
        classes: number of logits.
        widths: of the stages.
        depths: blocks in each stage.
        block: makes a block of (channels in, width, stride).
        expansion: channels of a block's output over its width.
    """
    layers: list[nn.Module] = [*conv(3, widths[0], 3), nn.ReLU()]
    channels = widths[0]
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for number in range(depth):
            layers.append(block(channels, width, 2 if stage and not number else 1))
            channels = width * expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


WIDTHS = (64, 128, 256, 512)

convnets.register("vgg11")(partial(vgg11, norm=False))
convnets.register("vgg11_bn")(partial(vgg11, norm=True))
# He et al. (2016), section 4.2: parameter-free shortcuts (option A), three stages.
convnets.register("resnet20")(partial(resnet, widths=(16, 32, 64), depths=(3, 3, 3), block=partial(basic, padded=True)))
# Table 1 of the same paper, with 1 x 1 shortcuts where the shape changes (option B) and the stem above.
convnets.register("resnet18")(partial(resnet, widths=WIDTHS, depths=(2, 2, 2, 2), block=partial(basic, padded=False)))
convnets.register("resnet34")(partial(resnet, widths=WIDTHS, depths=(3, 4, 6, 3), block=partial(basic, padded=False)))
convnets.register("resnet50")(partial(resnet, widths=WIDTHS, depths=(3, 4, 6, 3), block=bottleneck, expansion=4))
