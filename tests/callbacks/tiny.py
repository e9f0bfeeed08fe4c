"""The smallest modules, data and Trainers that show what the callback does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kfac_dist.callbacks import KFAC

FEATURES, HIDDEN, CLASSES = 5, 4, 3
BATCH = 8
NOISE = ".*(many workers|treespec|no `val_dataloader`|number of training batches|in eval mode|`srun`).*"


def data(samples: int = 3 * BATCH) -> TensorDataset:
    """Inputs, labels and global ids."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (samples,), generator=generator)
    return TensorDataset(x, y, torch.arange(samples))


class RankBatches:
    """A batch sampler: this rank's contiguous part of every global batch, in the order of the data."""

    def __init__(self, samples: int, batch: int, rank: int = 0, ranks: int = 1) -> None:
        share = batch // ranks
        starts = range(0, samples, batch)
        self.batches = [list(range(start + share * rank, start + share * (rank + 1))) for start in starts]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def loader(dataset: Dataset | None = None, batch: int = BATCH, rank: int = 0, ranks: int = 1) -> DataLoader:
    dataset = data() if dataset is None else dataset
    return DataLoader(dataset, batch_sampler=RankBatches(len(dataset), batch, rank, ranks))


class Classifier(pl.LightningModule):
    """Two linear layers with an in-place activation between them; ``forward`` returns logits."""

    def __init__(
        self,
        lr: float = 0.1,
        momentum: float = 0.0,
        dropout: float = 0.0,
        recompute: str = "",
        unused: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN) if norm else nn.Identity()
        self.activation = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(HIDDEN, CLASSES)
        if unused:
            self.unused = nn.Linear(2, 2)
        self.recompute = recompute
        self.lr, self.momentum = lr, momentum

    def hidden(self, x: Tensor) -> Tensor:
        return self.dropout(self.activation(self.norm(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            x = x.requires_grad_(self.recompute == "reentrant")
            return self.last(checkpoint(self.hidden, x, use_reentrant=self.recompute == "reentrant"))
        return self.last(self.hidden(x))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


class Manual(Classifier):
    """The same by manual optimization."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        return loss


class Gradients(pl.Callback):
    """What the gradients and losses are where this callback stands in the list."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.losses: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.losses.append(loss.detach().clone())


def kfac(**options: Any) -> KFAC:
    """K-FAC with everything refreshed in every step."""
    defaults = {"likelihood": "categorical", "factor_every_n_steps": 1, "inverse_every_n_steps": 1}
    return KFAC(**defaults | options)


def trainer(callbacks: Sequence[pl.Callback] = (), **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **defaults | options)


def fit(
    model: pl.LightningModule,
    callbacks: Sequence[pl.Callback] = (),
    train: DataLoader | None = None,
    validation: DataLoader | None = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> pl.Trainer:
    """Train; the Trainer afterwards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NOISE)
        made = trainer(callbacks, **options)
        made.fit(model, loader() if train is None else train, validation, ckpt_path=ckpt_path)
    return made


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def hooks(model: nn.Module) -> int:
    """Hooks on any module of the model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def assert_equal(left: Any, right: Any) -> None:
    """Bitwise equality of nested tensors."""
    torch.testing.assert_close(left, right, rtol=0, atol=0)
