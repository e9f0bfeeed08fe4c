"""When the callback logs. Loggers are served on the Trainer's own cadence, so this one can only thin it out."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_warn


def _trainers(trainer: pl.Trainer) -> int:
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set by a connector


def warn_of_cadence(every_n_steps: int | None, trainer: pl.Trainer) -> None:
    """Warn where the callback and the Trainer would log at different steps."""
    trainers = _trainers(trainer)
    if every_n_steps and trainers and every_n_steps % trainers:
        rank_zero_warn(
            f"KFAC(log_every_n_steps={every_n_steps}) is no multiple of Trainer(log_every_n_steps={trainers}), and "
            "loggers are only served when both are due: choose a multiple, or lower the Trainer's"
        )


def is_due(every_n_steps: int | None, trainer: pl.Trainer) -> bool:
    """Whether the step that is being made is one to log; None: as the Trainer, 0: never."""
    every = _trainers(trainer) if every_n_steps is None else every_n_steps
    stepped = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    return every > 0 and (stepped + 1) % every == 0
