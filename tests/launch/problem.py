"""A training that every launcher can run in seconds, and callbacks that show what became of it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from kfac_dist.study.resumable import ResumableLoader

FEATURES, HIDDEN, CLASSES = 6, 5, 3
BATCH, STEPS = 12, 4
"""Samples in a global batch, whatever the number of ranks, and batches in an epoch."""
KILL = "KFAC_DIST_TEST_KILL"
"""rank:step, at which that rank kills itself."""


def samples(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and global ids."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH * STEPS, FEATURES, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (BATCH * STEPS,), generator=generator)
    return x.to(dtype), y, torch.arange(BATCH * STEPS)


def network() -> nn.Sequential:
    """The same weights on every rank and in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))


def part(step: int, rank: int, ranks: int) -> list[int]:
    """The ids of a rank's share of a global batch, which all have in common."""
    share = BATCH // ranks
    start = BATCH * (step % STEPS) + share * rank
    return list(range(start, start + share))


class Classifier(pl.LightningModule):
    """``forward`` returns logits; a batch is (inputs, labels, ids).

    Args:
        dtype: "float64" or "float32". Trainer(precision="64-true") would restore the weights in single precision.
    """

    def __init__(self, dtype: str = "float64") -> None:
        super().__init__()
        self.net = network().to(getattr(torch, dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0].to(self.net[0].weight.dtype)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Batches(pl.LightningDataModule):
    """The same global batches for any number of ranks."""

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        batches = [part(step, rank, ranks) for step in range(STEPS)]
        return ResumableLoader(TensorDataset(*samples()), batch_sampler=batches)


class Weights(pl.Callback):
    """Saves the weights at the end of the training, and says how many ranks there were.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            saved = {"weights": pl_module.state_dict(), "ranks": trainer.world_size, "step": trainer.global_step}
            torch.save(saved, self.path)


class Pace(pl.Callback):
    """One line per step, in a file and in the log, and a pause, so that a test can act in between.

    Args:
        path: the file.
        seconds: how long to pause.
    """

    def __init__(self, path: str, seconds: float = 0.0) -> None:
        self.path, self.seconds = Path(path), seconds

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.is_global_zero:
            with self.path.open("a") as log:
                log.write(f"{os.environ.get('SLURM_RESTART_COUNT', 0)} {trainer.global_step}\n")
        time.sleep(self.seconds)


def die(rank: int, step: int) -> None:
    """Kill this process as the kernel would, without a chance to tell anybody."""
    print(f"rank {rank} dies in step {step} at {time.time():.1f}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def named(trainer: pl.Trainer) -> bool:
    """Whether the environment names this rank and this step."""
    return os.environ[KILL] == f"{trainer.global_rank}:{trainer.global_step}"


class Dying(pl.Callback):
    """The rank that the environment names kills itself in the step that it names."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if named(trainer):
            die(trainer.global_rank, trainer.global_step)


class Mistaken(Classifier):
    """The rank that the environment names raises in the training step that it names."""

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        if named(self.trainer):
            print(f"rank {self.global_rank} dies in step {self.global_step} at {time.time():.1f}", flush=True)
            raise KeyError("a batch without labels")
        return super().training_step(batch, batch_idx)
