"""Data sets that fit in memory, served as whole batches, as LightningDataModules."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kfac_dist.study.resumable import ResumableLoader

Batch = TypeVar("Batch")
Split = tuple[Tensor, ...]
"""Tensors of one split, all with the same number of samples in dimension 0."""


class InMemoryDataset(Dataset[tuple[Tensor, ...]]):
    """Tensors that are indexed a batch at a time.

    ``torch.utils.data.DataLoader`` hands ``__getitems__`` all indices of a batch at once, so that one gather per
    tensor takes the place of a loop over samples and a collation; any sampler works, a distributed one included.

    Args:
        tensors: each (N, ...).

    Raises:
        ValueError: no tensor, or tensors of unlike length.
    """

    def __init__(self, *tensors: Tensor) -> None:
        if len({len(t) for t in tensors}) != 1:
            raise ValueError(
                f"lengths {[len(t) for t in tensors]}: give at least one tensor, and tensors of one length"
            )
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in self.tensors)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """The samples ``indices`` of every tensor, each (len(indices), ...)."""
        rows = torch.as_tensor(indices)
        return tuple(t[rows] for t in self.tensors)


def already_collated(batch: Batch) -> Batch:
    """The ``collate_fn`` for :class:`InMemoryDataset`: a module-level function, so that it can be pickled."""
    return batch


class InMemoryDataModule(pl.LightningDataModule):
    """Holds two splits in memory; the training split is shuffled by the global random stream, no sample is dropped.

    Args:
        batch_size: samples per batch and process; the last batch of an epoch may be smaller.
        seed: fixes the data themselves: which sample is in which split, or what is generated.

    Raises:
        ValueError: a batch size below 1.
    """

    def __init__(self, batch_size: int = 256, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.batch_size = batch_size
        self.seed = seed
        self.train_set: InMemoryDataset | None = None
        self.val_set: InMemoryDataset | None = None

    @abstractmethod
    def load(self) -> tuple[Split, Split]:
        """The tensors of the training and of the held-out split."""

    def setup(self, stage: str | None = None) -> None:
        """Load both splits, once."""
        if self.train_set is None:
            train, val = self.load()
            self.train_set, self.val_set = InMemoryDataset(*train), InMemoryDataset(*val)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of the training split."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Batches of the held-out split, in order."""
        return self._loader(self.val_set, shuffle=False)

    def test_dataloader(self) -> DataLoader:
        """The held-out split again: none of the problems here selects anything on it."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """The held-out split."""
        return self.val_dataloader()

    def _loader(
        self, dataset: InMemoryDataset | None, shuffle: bool, collate: Callable[[Any], Any] = already_collated
    ) -> DataLoader:
        if dataset is None:
            raise RuntimeError(f"call {type(self).__name__}.setup() before asking for a data loader; a Trainer does")
        # Workers would only copy between processes what a single gather takes from memory.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        return ResumableLoader(dataset, batch_size=self.batch_size, shuffle=shuffle, collate_fn=collate)
