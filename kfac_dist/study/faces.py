"""Faces of 25 x 25 grey pixels: the Olivetti faces where scikit-learn has them, else those that travel with skimage.

Hinton & Salakhutdinov (2006) made their FACES of the 400 Olivetti faces (40 people, 10 pictures of each) by many random
rotations, crops and contrasts. Here the pictures themselves are taken, scaled down, the training ones also mirrored;
where Olivetti's file is not there, the 100 faces of the LFW data set in scikit-image's ``lfw_subset``, whose 100 other
images are backgrounds and are left out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kfac_dist.study.in_memory import InMemoryDataModule, Split

SIDE = 25
"""Pixels along one side of an image."""
PICTURES = 10
"""Of each person among the Olivetti faces, one after the other."""
OLIVETTI_HELD_OUT = 10
"""People held out, of 40."""
LFW_FACES = 100
"""Of the 200 images: those at the beginning."""
LFW_HELD_OUT = 20
"""Faces held out, of 100."""


def olivetti_faces() -> Tensor | None:
    """The Olivetti faces, person after person, averaged down to 25 x 25; nothing is fetched.

    Returns:
        (400, 25, 25) float32 in [0, 1], or None where scikit-learn or its file is not there.
    """
    try:
        from sklearn.datasets import fetch_olivetti_faces  # noqa: PLC0415  optional: the extra "study"
    except ModuleNotFoundError:
        return None
    try:
        images = torch.from_numpy(fetch_olivetti_faces(download_if_missing=False).images).float()
    except OSError:
        return None
    return F.interpolate(images[:, None], size=(SIDE, SIDE), mode="area")[:, 0].clamp(0, 1)


def lfw_faces() -> Tensor:
    """The 100 faces of ``skimage.data.lfw_subset``, in its order.

    Returns:
        (100, 25, 25) float32 in [0, 1].

    Raises:
        ModuleNotFoundError: scikit-image is not installed.
    """
    try:
        from skimage.data import lfw_subset  # noqa: PLC0415  optional: the extra "study"
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the faces need scikit-image: pip install 'kfac-dist[study]'; or the Olivetti faces, which "
            "sklearn.datasets.fetch_olivetti_faces() fetches once"
        ) from error
    return torch.from_numpy(lfw_subset()[:LFW_FACES]).float()  # type: ignore[no-untyped-call]


def faces(source: Literal["auto", "olivetti", "lfw"] = "auto", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Training faces, each followed by its mirror image, and held-out ones.

    Args:
        source: "olivetti" (300 faces of 30 people, 100 of 10 others), "lfw" (80 and 20) or "auto": Olivetti where its
            file is there.
        seed: decides who is held out.

    Returns:
        (600 or 160, 625) and (100 or 20, 625) float32 in [0, 1].

    Raises:
        ValueError: an unknown source.
        FileNotFoundError: "olivetti" without its file.
    """
    if source not in ("auto", "olivetti", "lfw"):
        raise ValueError(f"source={source!r} is unknown; choose one of 'auto', 'olivetti', 'lfw'")
    images = None if source == "lfw" else olivetti_faces()
    generator = torch.Generator().manual_seed(seed)
    if images is not None:
        people = images.view(-1, PICTURES, SIDE, SIDE)
        people = people[torch.randperm(len(people), generator=generator)]
        train, val = people[:-OLIVETTI_HELD_OUT].flatten(0, 1), people[-OLIVETTI_HELD_OUT:].flatten(0, 1)
    elif source == "olivetti":
        raise FileNotFoundError(
            "scikit-learn has no file of the Olivetti faces: call sklearn.datasets.fetch_olivetti_faces() once where "
            "there is a network, or set source='lfw'"
        )
    else:
        images = lfw_faces()
        images = images[torch.randperm(len(images), generator=generator)]
        train, val = images[:-LFW_HELD_OUT], images[-LFW_HELD_OUT:]
    return torch.stack([train, train.flip(-1)], 1).flatten(0, 1).flatten(1), val.flatten(1)


class Faces(InMemoryDataModule):
    """Faces as batches (images (B, 625) in [0, 1],).

    Args:
        batch_size: samples per batch and process.
        seed: decides who is held out.
        source: "olivetti", "lfw", or "auto": Olivetti where scikit-learn has its file.
    """

    def __init__(
        self, batch_size: int = 40, seed: int = 0, source: Literal["auto", "olivetti", "lfw"] = "auto"
    ) -> None:
        super().__init__(batch_size, seed)
        self.source = source

    def load(self) -> tuple[Split, Split]:
        """Both splits of :func:`faces`."""
        train, val = faces(self.source, self.seed)
        return (train,), (val,)
