"""Images of 3 x 32 x 32: CIFAR-10, CIFAR-100 or SVHN through ``torchvision``, or scikit-learn's digits enlarged."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kfac_dist.study.digits import small_digits
from kfac_dist.study.in_memory import InMemoryDataModule, Split, already_collated

SIDE = 32
"""Pixels along one side of an image."""
PADDING = 4
"""Pixels around an image from which a random crop is cut."""
CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10, "digits": 10}
CIFAR10_FOLDER = "cifar-10-batches-py"
"""What torchvision unpacks CIFAR-10 into, below its root."""


def torchvision_images(name: str, root: str | Path | None, download: bool = False) -> tuple[Split, Split]:
    """Training and test images of "cifar10", "cifar100" or "svhn", in the split of their authors.

    Args:
        name: of the data set.
        root: the folder of torchvision's files.
        download: fetch the files that are not there.

    Returns:
        (images (N, 3, 32, 32) uint8, labels (N,) int64) of the training and of the test split.

    Raises:
        ValueError: no root is given, torchvision cannot be imported, or the files are not under ``root``.
    """
    if root is None:
        raise ValueError(f"dataset={name!r} needs root, the folder of torchvision's files; or set dataset='digits'")
    try:
        from torchvision import datasets  # noqa: PLC0415  optional: the extra "vision"
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        raise ValueError(
            f"dataset={name!r} needs torchvision, which cannot be imported ({error}): pip install "
            "'kfac-dist[vision]'; or set dataset='digits'"
        ) from error
    splits = []
    for train in (True, False):
        which: dict[str, Any] = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
        try:
            files = getattr(datasets, name.upper())(str(root), download=download, **which)
        except RuntimeError as error:
            raise ValueError(
                f"no {name} files under root={str(root)!r} ({error}): give the folder that holds them, set "
                "download=True, or set dataset='digits'"
            ) from error
        images = torch.as_tensor(files.data)
        if name != "svhn":
            images = images.movedim(-1, 1)
        splits.append((images.contiguous(), torch.as_tensor(files.labels if name == "svhn" else files.targets).long()))
    return splits[0], splits[1]


def enlarged_digits(seed: int = 0) -> tuple[Split, Split]:
    """Scikit-learn's 1,500 and 297 digits, enlarged bilinearly and repeated to three channels.

    Returns:
        (images (N, 3, 32, 32) float32 in [0, 1], labels (N,) int64) of the training and of the held-out split.
    """
    train, val = small_digits(seed)

    def enlarge(images: Tensor) -> Tensor:
        return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear").repeat(1, 3, 1, 1)

    return (enlarge(train[0]), train[1]), (enlarge(val[0]), val[1])


def normalised(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Both splits (N, 3, H, W) with the TRAINING images' mean taken off and divided by their deviation, per channel."""
    mean = train.mean((0, 2, 3), keepdim=True)
    deviation = train.std((0, 2, 3), keepdim=True)
    return (train - mean) / deviation, (val - mean) / deviation


def augmented(images: Tensor, flip: bool) -> Tensor:
    """Random crops of the padded images, each flipped left to right with probability 1/2 if ``flip``.

    The padding is the mean colour: 0 in normalised images. The draws come from the global random stream, as the order
    of the samples does; so a seeded run repeats them.

    Args:
        images: (B, C, H, W), normalised.
        flip: whether a mirror image belongs to the same class.

    Returns:
        (B, C, H, W)
    """
    count, _, height, width = images.shape
    down, right = torch.randint(0, 2 * PADDING + 1, (2, count, 1), device="cpu").to(images.device)
    sample = torch.arange(count, device=images.device)[:, None, None]
    rows = down + torch.arange(height, device=images.device)  # (B, H)
    columns = right + torch.arange(width, device=images.device)
    padded = F.pad(images, (PADDING,) * 4).movedim(1, -1)
    crops = padded[sample, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    if flip:
        mirrored = (torch.rand(count, device="cpu") < 0.5).to(images.device)
        crops = torch.where(mirrored[:, None, None, None], crops.flip(-1), crops)
    return crops.contiguous()


def augmented_batch(batch: tuple[Tensor, Tensor], flip: bool) -> tuple[Tensor, Tensor]:
    """A batch (images, labels) with :func:`augmented` images: a ``collate_fn`` of InMemoryDataset."""
    return augmented(batch[0], flip), batch[1]


class CIFARImages(InMemoryDataModule):
    """Small colour images as batches (images (B, 3, 32, 32) normalised per channel, labels (B,)).

    Args:
        batch_size: samples per batch and process.
        seed: of the split of the digits; the other data sets bring their own split.
        dataset: "cifar10", "cifar100", "svhn", "digits" (scikit-learn's 1,797 digits, enlarged), or "auto": CIFAR-10
            where its files are under root, else digits; which one it took is logged.
        root: the folder of torchvision's files; not for "digits".
        download: fetch the files of a named data set that are not there, on one process of each node.
        augment: random crops (padding 4) of the training images, and flips where the class allows it (CIFAR).

    Raises:
        ValueError: an unknown data set, or download=True without the name of one that can be fetched.
    """

    def __init__(
        self,
        batch_size: int = 128,
        seed: int = 0,
        dataset: Literal["auto", "cifar10", "cifar100", "svhn", "digits"] = "auto",
        root: str | None = None,
        download: bool = False,
        augment: bool = False,
    ) -> None:
        super().__init__(batch_size, seed)
        if dataset != "auto" and dataset not in CLASSES:
            raise ValueError(f"dataset={dataset!r} is unknown; choose one of auto, {', '.join(CLASSES)}")
        if download and dataset in ("auto", "digits"):
            raise ValueError(f"download=True with dataset={dataset!r}: say dataset='cifar10', 'cifar100' or 'svhn'")
        self.root = root
        self.download = download
        self.augment = augment
        self.dataset = self._found() if dataset == "auto" else dataset

    def _found(self) -> str:
        if self.root is not None and (Path(self.root) / CIFAR10_FOLDER).is_dir():
            rank_zero_info(f"CIFARImages: dataset='auto' takes CIFAR-10 from {self.root!r}")
            return "cifar10"
        where = "no root is given" if self.root is None else f"{self.root!r} holds no {CIFAR10_FOLDER}"
        rank_zero_info(f"CIFARImages: dataset='auto' takes scikit-learn's digits, enlarged to 32 x 32: {where}")
        return "digits"

    @property
    def classes(self) -> int:
        """Number of classes."""
        return CLASSES[self.dataset]

    def prepare_data(self) -> None:
        """Fetch what is not there, if ``download``; Lightning calls this on one process of each node."""
        if self.download:
            torchvision_images(self.dataset, self.root, download=True)

    def load(self) -> tuple[Split, Split]:
        """Both splits, normalised."""
        if self.dataset == "digits":
            train, val = enlarged_digits(self.seed)
        else:
            train, val = torchvision_images(self.dataset, self.root)
        images = normalised(*(part[0].float() for part in (train, val)))
        return (images[0], train[1]), (images[1], val[1])

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of the training split, augmented if so wished."""
        flip = self.dataset.startswith("cifar")  # a mirrored digit is none
        collate = partial(augmented_batch, flip=flip) if self.augment else already_collated
        return self._loader(self.train_set, shuffle=True, collate=collate)
