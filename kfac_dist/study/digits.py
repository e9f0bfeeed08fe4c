"""The 1,797 handwritten digits of 8 x 8 pixels that travel with scikit-learn."""

from __future__ import annotations

import torch

from kfac_dist.study.in_memory import InMemoryDataModule, Split

HELD_OUT = 297
"""Samples held out, in the proportions of the ten digits."""


def small_digits(seed: int = 0) -> tuple[Split, Split]:
    """Scikit-learn's digits, split by a seed and stratified by label.

    Returns:
        (images (N, 1, 8, 8) float32 in [0, 1], labels (N,) int64) for N = 1,500 and N = 297.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  optional: the extra "study"
        from sklearn.model_selection import train_test_split  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the small digits need scikit-learn: pip install 'kfac-dist[study]'") from error
    pixels, digits = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(digits).long()
    train, val = train_test_split(range(len(labels)), test_size=HELD_OUT, stratify=digits, random_state=seed)
    return (images[train], labels[train]), (images[val], labels[val])


class Digits(InMemoryDataModule):
    """Scikit-learn's digits as batches (images (B, 1, 8, 8) in [0, 1], labels (B,)).

    Args:
        batch_size: samples per batch and process.
        seed: of the split.
        flat: images as rows (B, 64).
    """

    def __init__(self, batch_size: int = 256, seed: int = 0, flat: bool = False) -> None:
        super().__init__(batch_size, seed)
        self.flat = flat

    def load(self) -> tuple[Split, Split]:
        """Both splits of :func:`small_digits`."""
        train, val = small_digits(self.seed)
        if self.flat:
            return (train[0].flatten(1), train[1]), (val[0].flatten(1), val[1])
        return train, val
