"""The problems of the study by name: a network, its data, and what K-FAC has to know about the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kfac_dist.study.autoencoder import Autoencoder
from kfac_dist.study.curves import Curves
from kfac_dist.study.digits import Digits
from kfac_dist.study.digits_cnn import DigitsCNN
from kfac_dist.study.in_memory import InMemoryDataModule
from kfac_dist.study.mnist import MNISTDigits
from kfac_dist.study.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One problem of the study.

    Attributes:
        title: for tables.
        model: makes the network; its weights come from the global random stream.
        data: makes the data module, the batch size included.
        loss: the metric that is compared, of those that the model logs.
        kfac: K-FAC's keywords that belong to the loss (likelihood, loss_reduction, class_dim).
        dense: at most 20,000 covered parameters, and no layer mixes samples: the natural gradient can be had exactly.
    """

    title: str
    model: Callable[[], Problem]
    data: Callable[[], InMemoryDataModule]
    loss: str = "pixel_loss"
    kfac: Mapping[str, Any] = field(default_factory=lambda: {"likelihood": "bernoulli"})
    dense: bool = False

    @property
    def unit(self) -> str:
        """What the metric is, for tables."""
        return UNITS[self.loss]


UNITS = {"pixel_loss": "binary cross-entropy per pixel (nats)", "loss": "cross-entropy per label (nats)"}

PROBLEMS: dict[str, Entry] = {
    "mnist_autoencoder": Entry(
        title="MNIST autoencoder 784-1000-500-250-30, Xavier", model=Autoencoder, data=MNISTDigits
    ),
    "mnist_autoencoder_kaiming": Entry(
        title="MNIST autoencoder 784-1000-500-250-30, Kaiming",
        model=partial(Autoencoder, init="kaiming"),
        data=MNISTDigits,
    ),
    "curves_autoencoder": Entry(
        title="CURVES autoencoder 784-400-200-100-50-25-6, 4,500 images",
        model=partial(Autoencoder, widths=(784, 400, 200, 100, 50, 25, 6), init="kaiming"),
        data=partial(Curves, train_samples=4_500, val_samples=500),  # as many as there are digits
    ),
    "curves_autoencoder_20000": Entry(
        title="CURVES autoencoder 784-400-200-100-50-25-6, 20,000 images",
        model=partial(Autoencoder, widths=(784, 400, 200, 100, 50, 25, 6), init="kaiming"),
        data=Curves,
    ),
    "digits_cnn": Entry(
        title="small CNN on digits",
        model=DigitsCNN,
        data=partial(Digits, batch_size=64),
        kfac={"likelihood": "categorical"},
        loss="loss",
        dense=True,
    ),
    # For trying things out, and for the tests: a step takes a millisecond.
    "tiny": Entry(
        title="CURVES autoencoder 784-12-4, 96 images",
        model=partial(Autoencoder, widths=(784, 12, 4)),
        data=partial(Curves, batch_size=32, train_samples=96, val_samples=32),
        dense=True,
    ),
}
