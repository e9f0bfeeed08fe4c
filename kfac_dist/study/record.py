"""What a training run leaves behind: losses and seconds per epoch, as lines of JSON that others read while it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class EpochRecord(Callback):
    """Appends one line of JSON per epoch, and in between one per ``heartbeat`` seconds, on rank 0.

    An epoch's line holds ``epoch`` (1, 2, ..), ``step``, ``seconds`` and every metric that was logged per epoch. The
    seconds are the wall time of training so far: batches are fetched and metrics reduced within it, validation and
    everything before the first epoch stand outside. The lines in between hold ``step`` and ``steps`` (of the run).

    Args:
        path: the file; an existing one is replaced.
        heartbeat: seconds between the lines that only tell how far the run is.

    Raises:
        ValueError: a heartbeat of 0 or less.
    """

    def __init__(self, path: str, heartbeat: float = 0.5) -> None:
        if heartbeat <= 0:
            raise ValueError(f"heartbeat={heartbeat} must be above 0 seconds")
        self.path = Path(path)
        self.heartbeat = heartbeat
        self._seconds = 0.0
        self._since: float | None = None
        self._last_beat = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start an empty file."""
        self._seconds, self._since = 0.0, None
        if stage == "fit" and trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock while the held-out split is evaluated."""
        self._pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the clock go on, unless this was the check before training."""
        if not trainer.sanity_checking:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell how far the run is, if the last word on it is old enough."""
        now = time.perf_counter()
        if now - self._last_beat >= self.heartbeat:
            self._last_beat = now
            total = trainer.estimated_stepping_batches
            self._write(trainer, {"step": trainer.global_step, "steps": int(total) if total < float("inf") else None})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the epoch's line; reading the metrics reduces them over the ranks, so every rank takes part."""
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        self._pause()
        line = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, "seconds": self._seconds}
        self._write(trainer, line | metrics)

    def _pause(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def _write(self, trainer: pl.Trainer, line: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read_record(path: str | Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The epochs of an :class:`EpochRecord` file, and its last line of any kind.

    A line that is still being written is left out.

    Returns:
        The epochs' lines in order, and the last complete line ({} where there is none).
    """
    file = Path(path)
    text = file.read_text() if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if "epoch" in line], lines[-1] if lines else {}
