"""Which steps' numbers go to the loggers, and how they get there."""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl


def log(
    metrics: Mapping[str, float], every_n_steps: int | None, trainer: pl.Trainer, pl_module: pl.LightningModule
) -> None:
    """Log ``metrics`` under "kfac/" if the step that is being made is due; they are not even read otherwise.

    Args:
        metrics: name -> number.
        every_n_steps: None: through the module, on the Trainer's cadence, so that other callbacks see them too; a
            number: straight to the loggers (what goes through the module is repeated whenever the Trainer logs);
            0: never.
        trainer: the Trainer.
        pl_module: the module.
    """
    every = int(trainer.log_every_n_steps) if every_n_steps is None else every_n_steps  # type: ignore[attr-defined]
    if every <= 0 or (logger_step(trainer) + 1) % every:
        return
    if every_n_steps is None:
        pl_module.log_dict(_named(metrics), on_step=True, on_epoch=False)
    else:
        send(metrics, trainer, logger_step(trainer))


def send(metrics: Mapping[str, float], trainer: pl.Trainer, step: int) -> None:
    """Log ``metrics`` under "kfac/" straight to every logger of rank 0; ``step`` as :func:`logger_step`."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        logger.log_metrics(_named(metrics), step=step)
        logger.save()


def logger_step(trainer: pl.Trainer) -> int:
    """The number of the step that is being made, as loggers count: optimizer steps that are over."""
    return getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"kfac/{name}": value for name, value in metrics.items()}
