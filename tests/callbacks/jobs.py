"""What ranks do in the tests of the callback under DDP; each function runs in the pool's workers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from kfac_dist import DistributionConfig
from kfac_dist.callbacks import KFACMonitor
from kfac_dist.study.resumable import ResumableLoader
from tests.callbacks.tiny import (
    BATCH,
    Classifier,
    Gradients,
    Manual,
    RankBatches,
    data,
    fit,
    hooks,
    kfac,
    loader,
    weights,
)

# name -> (module, its options, the strategy's options, the Trainer's options)
VARIANTS: dict[str, tuple[type[Classifier], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": (Classifier, {}, {}, {}),
    "static_graph": (Classifier, {}, {"static_graph": True}, {}),
    "find_unused": (Classifier, {"unused": True}, {"find_unused_parameters": True}, {}),
    "static and unused": (Classifier, {"unused": True}, {"static_graph": True, "find_unused_parameters": True}, {}),
    "bucket views": (Classifier, {}, {"gradient_as_bucket_view": True}, {}),
    "static bucket views": (Classifier, {}, {"gradient_as_bucket_view": True, "static_graph": True}, {}),
    "recomputed": (Classifier, {"recompute": "non-reentrant"}, {}, {}),
    "static and recomputed": (Classifier, {"recompute": "non-reentrant"}, {"static_graph": True}, {}),
    "manual": (Manual, {}, {}, {}),
    "manual static_graph": (Manual, {}, {"static_graph": True}, {}),
    "manual find_unused": (Manual, {"unused": True}, {"find_unused_parameters": True}, {}),
    "accumulated": (Classifier, {}, {}, {"accumulate_grad_batches": 2}),
    "bf16-mixed": (Classifier, {}, {}, {"precision": "bf16-mixed"}),
    "16-mixed": (Classifier, {}, {}, {"precision": "16-mixed"}),
}


def ddp(world_size: int, **options: Any) -> dict[str, Any]:
    return {"strategy": DDPStrategy(**options), "devices": world_size}


def _trainer_options(world_size: int, strategy: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    options = trainer | ddp(world_size, **strategy)
    if options.get("precision") == "16-mixed":  # on a CPU the name alone means bf16
        options["plugins"] = [MixedPrecision(options.pop("precision"), "cpu")]
    return options


def variants(rank: int, world_size: int, likelihood: str) -> dict[str, Any]:
    """Variant -> (raw gradients and losses without and with K-FAC, factors of the layers)."""
    results = {}
    for name, (module, options, strategy, trainer) in VARIANTS.items():
        records = []
        callback = kfac(likelihood=likelihood, sample_ids_key=2)
        for callbacks in ([], [callback]):
            record = Gradients()
            # The rate 0 keeps the weights: every step can be compared. Dropout would show a disturbed random stream.
            model = module(lr=0.0, dropout=0.3, **options)
            torch.manual_seed(rank)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*(find_unused_parameters|keep their plain gradient).*")
                train = loader(rank=rank, ranks=world_size)
                fit(model, [record, *callbacks], train, **_trainer_options(world_size, strategy, trainer))
            records.append((record.steps, record.losses))
        layers = callback.state_dict()["layers"]
        factors = {layer: layers[layer]["factors"] for layer in ("first", "last")}
        results[name] = (*records, factors, hooks(model))
    return results


def train(rank: int, world_size: int, callback: dict[str, Any], batch: int = BATCH, **trainer: Any) -> dict[str, Any]:
    """Weights and factors of a fit in float64 in which all ranks share every batch."""
    model, made = Classifier(momentum=0.5), kfac(**callback)
    seen = Gradients()
    options = ddp(world_size) | {"precision": "64-true"} | trainer
    fit(model, [made, seen], loader(batch=batch, rank=rank, ranks=world_size), **options)
    return {"weights": weights(model), "layers": made.state_dict()["layers"], "directions": seen.steps}


def resume(rank: int, world_size: int, load: str | None, save: str, epochs: int, callback: dict[str, Any]) -> dict:
    """One more epoch from a checkpoint; every rank saves, as Lightning asks."""
    model = Classifier(momentum=0.5).double()  # Lightning converts it only after it has loaded the weights
    options = ddp(world_size) | {"precision": "64-true", "max_epochs": epochs}
    made = fit(model, [kfac(**callback)], loader(rank=rank, ranks=world_size), ckpt_path=load, **options)
    made.save_checkpoint(save)
    return weights(model)


def interrupted(rank: int, world_size: int, folder: str, callback: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Weights after two epochs without an interruption, and resumed from within the first and the second."""
    dataset = data(4 * BATCH)

    def run(callbacks: list[pl.Callback], **more: Any) -> dict[str, Tensor]:
        model = Classifier(momentum=0.9)
        train = ResumableLoader(dataset, batch_sampler=RankBatches(len(dataset), BATCH, rank, world_size))
        fit(model, [kfac(**callback), *callbacks], train, max_epochs=2, **ddp(world_size), **more)
        return weights(model)

    every = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run([every], enable_checkpointing=True)
    return [whole, *(run([], ckpt_path=f"{folder}/step={step}.ckpt") for step in (3, 5))]


@contextmanager
def without_launcher() -> Iterator[None]:
    """A script's own part, to which no launcher's variables belong."""
    before = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def alone_after_ddp(rank: int, world_size: int) -> tuple[bool, int, int]:
    """A single-device fit of a different length on each rank, with torch.distributed still up from a DDP fit."""
    fit(Classifier(), [kfac()], loader(rank=rank, ranks=world_size), **ddp(world_size))
    up = torch.distributed.is_initialized()
    callback = kfac()
    with without_launcher():
        made = fit(Classifier(), [callback], strategy=SingleDeviceStrategy("cpu"), max_steps=1 + 2 * rank)
    return up, made.world_size, callback.state_dict()["step"]


class _SavesAlone(pl.Callback):
    """Rank 0 asks for the state in mid-fit, as a signal handler or an exception's checkpoint would."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_rank == 0:
            (callback,) = (c for c in trainer.callbacks if type(c).__name__ == "KFAC")
            self.states.append(callback.state_dict())


def state_of_one_rank(rank: int, world_size: int, distribution: str) -> tuple[list[int], dict[str, Any]]:
    saver, callback = _SavesAlone(), kfac(distribution=distribution)
    fit(Classifier(), [callback, saver], loader(rank=rank, ranks=world_size), **ddp(world_size))
    return [state["step"] for state in saver.states], callback.state_dict()["layers"]


class _Direct(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.last(self.hidden(batch[0])), batch[1])


class _LossOfOneElement(Classifier):
    """DDP calls the root with whatever training_step returns: here it has the shape of a batch of one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).reshape(1)


def messages(rank: int, world_size: int) -> dict[str, str]:
    """What the errors under DDP say."""
    found = {}
    for name, model, callback in (
        ("logits", _Direct(), kfac()),
        ("backend", Classifier(), kfac(distribution=DistributionConfig(backend="single"))),
    ):
        try:
            fit(model, [callback], loader(rank=rank, ranks=world_size), **ddp(world_size))
        except MisconfigurationException as error:
            found[name] = str(error)
        found[name] += f" hooks: {hooks(model)}"
    return found


def loss_of_one_element(rank: int, world_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Factors with a scalar loss and with one of shape (1,)."""
    layers = []
    for module in (Classifier, _LossOfOneElement):
        callback = kfac(likelihood="bernoulli", sample_ids_key=2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*output gradients of the training loss.*")
            fit(module(), [callback], loader(rank=rank, ranks=world_size), **ddp(world_size))
        layers.append(callback.state_dict()["layers"])
    return layers[0], layers[1]


# name -> (options of the module, of DDP): each ends with the weights of one process.
FITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "static_graph": ({}, {"static_graph": True}),
    "find_unused": ({"unused": True}, {"find_unused_parameters": True}),
    "bucket views": ({}, {"gradient_as_bucket_view": True}),
}


def fits(rank: int, world_size: int, callback: dict[str, Any]) -> dict[str, Any]:
    """Variant -> weights."""
    results = {}
    for name, (options, strategy) in FITS.items():
        model = Classifier(**options)
        parts = ddp(world_size, **strategy) if world_size > 1 else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(find_unused_parameters|keep their plain gradient).*")
            fit(model, [kfac(**callback)], loader(rank=rank, ranks=world_size), precision="64-true", **parts)
        results[name] = weights(model)
    return results


class Keeping(Logger):
    """Keeps what is logged, on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def name(self) -> str:
        return "keeping"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, metrics))


def logged(rank: int, world_size: int, every: int | None) -> list[tuple[int, float]]:
    """(step of the logger, K-FAC's own step) of every line that this rank's logger was given."""
    logger = Keeping()
    options = ddp(world_size) | {"logger": logger, "log_every_n_steps": 1}
    fit(Classifier(), [kfac(log_every_n_steps=every)], loader(rank=rank, ranks=world_size), **options)
    return [(step, line["kfac/step"]) for step, line in logger.lines if "kfac/step" in line]


def monitored(rank: int, world_size: int, folder: str, callback: dict[str, Any]) -> list[tuple[int | None, dict]]:
    """What the monitor sends to this rank's logger in three steps of float64; pictures go to ``folder``."""
    logger = Keeping()
    options = ddp(world_size) if world_size > 1 else {}
    options |= {"precision": "64-true", "logger": logger, "log_every_n_steps": 1, "default_root_dir": folder}
    callbacks = [kfac(**callback, log_every_n_steps=0), KFACMonitor(every_n_steps=1, summary=False)]
    fit(Classifier(), callbacks, loader(rank=rank, ranks=world_size), **options)
    return logger.lines
