"""Layer lists of well-known networks, for plans and tests that need no weights: ``networks["resnet50"]()``.

Each layer is listed as K-FAC's default options treat it (norms by 2 x 2 blocks, the token side of embeddings and tied
outputs by a diagonal), with its rows per sample: the locations at which a sample meets its weights. Pure Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kfac_dist.assignment import LayerCost
from kfac_dist.registry import Registry


@dataclass(frozen=True)
class LayerWork:
    """One layer and how much a sample makes of it.

    Attributes:
        cost: its sides and factors.
        rows: rows of its input per sample.
        joint: its one factor is made of whole gradients, one row per sample.
        multiplies: whether its forward is a product with the weight (an embedding looks rows up).
        plain: whether it is an nn.Linear whose weight no other module has.
    """

    cost: LayerCost
    rows: float = 1.0
    joint: bool = False
    multiplies: bool = True
    plain: bool = False

    @property
    def parameters(self) -> int:
        """Entries of Theta, the bias among them."""
        return self.cost.groups * self.cost.input_dim * self.cost.output_dim

    @property
    def flops(self) -> float:
        """Of the forward, per sample; a multiply-add is two."""
        return 2.0 * self.rows * self.parameters if self.multiplies and not self.joint else 0.0


@dataclass(frozen=True)
class Network:
    """A network as a plan sees it.

    Attributes:
        name: for people.
        layers: those that are preconditioned, in their order.
        uncovered: parameters of no layer.
        other_flops: of the forward, per sample, in no layer: the products of attention.
        batch: samples per rank that are usual for it.
    """

    name: str
    layers: tuple[LayerWork, ...]
    uncovered: int = 0
    other_flops: float = 0.0
    batch: int = 32

    @property
    def costs(self) -> list[LayerCost]:
        """What the assignment needs."""
        return [layer.cost for layer in self.layers]

    @property
    def parameters(self) -> int:
        """All trainable parameters."""
        return self.uncovered + sum(layer.parameters for layer in self.layers)

    @property
    def flops(self) -> float:
        """Of the forward, per sample."""
        return self.other_flops + sum(layer.flops for layer in self.layers)


networks: Registry[Callable[..., Network]] = Registry("layer list")


def linear(name: str, d_in: int, d_out: int, rows: float = 1.0) -> LayerWork:
    """A Linear with a bias."""
    return LayerWork(LayerCost(name, d_in + 1, d_out), rows, plain=True)


def convolution(name: str, d_patch: int, d_out: int, locations: float, bias: bool = False) -> LayerWork:
    """A convolution whose patches have ``d_patch`` entries."""
    return LayerWork(LayerCost(name, d_patch + bias, d_out), locations)


def norm(name: str, channels: int) -> LayerWork:
    """Scale and shift, by channel."""
    return LayerWork(LayerCost(name, 2 * channels, 1, factors={"A": (2, channels)}), joint=True)


def embedding(name: str, symbols: int, width: int, rows: float) -> LayerWork:
    """A table of ``symbols`` rows."""
    return LayerWork(
        LayerCost(name, symbols, width, factors={"A": (1, symbols), "G": (width, 1)}), rows, multiplies=False
    )


@networks.register("resnet50")
def resnet50(image: int = 224, classes: int = 1000, stem: int = 7) -> Network:
    """He et al. (2016), with the stride in the 3 x 3 convolutions.

    Args:
        image: width of the images.
        classes: logits.
        stem: 7: 7 x 7 with stride 2, and a pooling; 3: 3 x 3 with stride 1, for small images.
    """
    layers: list[LayerWork] = []

    def conv(name: str, d_in: int, d_out: int, kernel: int, side: int) -> None:
        layers.extend([convolution(name, d_in * kernel**2, d_out, side**2), norm(f"{name}.norm", d_out)])

    side = image if stem == 3 else image // 2
    conv("stem", 3, 64, stem, side)
    side, channels = (side if stem == 3 else side // 2), 64
    for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
        for block in range(depth):
            name = f"stage{stage}.{block}"
            conv(f"{name}.reduce", channels, width, 1, side)
            side = side // 2 if stage and not block else side
            conv(f"{name}.spatial", width, width, 3, side)
            conv(f"{name}.expand", width, 4 * width, 1, side)
            if not block:
                conv(f"{name}.shortcut", channels, 4 * width, 1, side)
            channels = 4 * width
    layers.append(linear("output", channels, classes))
    return Network("ResNet-50", tuple(layers))


def _block(name: str, width: int, rows: int, parts: Mapping[str, int]) -> list[LayerWork]:
    """A transformer's block: the projections of the attention, and a perceptron of four times the width."""
    return [
        norm(f"{name}.norm1", width),
        *(linear(f"{name}.{part}", width, d_out, rows) for part, d_out in parts.items()),
        linear(f"{name}.project", width, width, rows),
        norm(f"{name}.norm2", width),
        linear(f"{name}.widen", width, 4 * width, rows),
        linear(f"{name}.narrow", 4 * width, width, rows),
    ]


def _attention(depth: int, rows: int, width: int) -> float:
    """Products of queries with keys, and of weights with values."""
    return 4.0 * depth * rows**2 * width


@networks.register("vit_b_16")
def vit_b_16(image: int = 224, classes: int = 1000) -> Network:
    """ViT-B/16 (Dosovitskiy et al. 2021), queries, keys and values by one Linear."""
    width, depth, patches = 768, 12, (image // 16) ** 2
    rows = patches + 1
    layers = [convolution("patches", 3 * 16**2, width, patches, bias=True)]
    for number in range(depth):
        layers += _block(f"blocks.{number}", width, rows, {"qkv": 3 * width})
    layers += [norm("norm", width), linear("output", width, classes)]
    return Network("ViT-B/16", tuple(layers), (rows + 1) * width, _attention(depth, rows, width))


@networks.register("gpt2_small")
def gpt2_small(length: int = 1024, symbols: int = 50257) -> Network:
    """GPT-2 small (Radford et al. 2019); the table of the tokens is the output's weight, one layer with both uses."""
    width, depth = 768, 12
    layers = [embedding("positions", length, width, length)]
    for number in range(depth):
        layers += _block(f"blocks.{number}", width, length, {"qkv": 3 * width})
    tied = LayerCost("output", width, symbols, factors={"A": (width, 1), "G": (1, symbols)})
    layers += [norm("norm", width), LayerWork(tied, length)]
    return Network("GPT-2 small", tuple(layers), 0, _attention(depth, length, width), batch=8)


@networks.register("bert_large")
def bert_large(length: int = 512, symbols: int = 30522) -> Network:
    """BERT-large with its pooler (Devlin et al. 2019), without the heads of the pre-training."""
    width, depth = 1024, 24
    tables = {"tokens": symbols, "positions": 512, "types": 2}
    layers = [embedding(name, size, width, length) for name, size in tables.items()] + [norm("norm", width)]
    for number in range(depth):
        layers += _block(f"blocks.{number}", width, length, dict.fromkeys(("query", "key", "value"), width))
    layers.append(linear("pooler", width, width))
    return Network("BERT-large", tuple(layers), 0, _attention(depth, length, width), batch=8)
