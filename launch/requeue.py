"""Save, go back into SLURM's queue, and resume: what a training does when its time is nearly up."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

CHECKPOINT = re.compile(r"hpc_ckpt_(\d+)\.ckpt", re.ASCII)
"""Lightning's own name of such a checkpoint: within a SLURM job ``fit`` resumes from the last one by itself."""


class RequeueOnSignal(pl.Callback):
    """At SIGUSR1: finish the batch, save everything, requeue the job, and stop.

    Lightning saves within the signal handler, wherever the signal found each rank: in the middle of a step, or while
    others wait in a collective. Here the handler only takes a note; the ranks agree on it after the next optimizer
    step, so all of them save the same step, and the resumed run is the one that would have gone on. It works under
    srun, torchrun and mpirun alike. ``kfac-dist fit`` adds it in every SLURM job.

    The data must be resumable as well for that: torchdata's StatefulDataLoader is, and so are the loaders of
    ``kfac_dist.study``; Lightning warns of others, which start the epoch anew.

    Args:
        signal_name: what SLURM sends, as in ``#SBATCH --signal=SIGUSR1@90``.

    Raises:
        ValueError: there is no signal of that name.
    """

    def __init__(self, signal_name: str = "SIGUSR1") -> None:
        if signal_name not in signal.Signals.__members__:
            raise ValueError(f"signal_name={signal_name!r} is no signal here; take one such as 'SIGUSR1'")
        self.signal = signal.Signals[signal_name]
        self._asked = False
        self._active = False
        self._step = 0
        self._before: Any = signal.SIG_DFL

    # Lightning installs its own handler after ``setup``, unless there is one.
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the signal."""
        if stage == "fit" and not self._active:
            self._active, self._asked = True, False
            self._before = signal.signal(self.signal, self._take_note)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say that the signal is welcome from now on."""
        self._step = trainer.global_step
        rank_zero_info(f"{self.signal.name} will save, requeue and resume this training.")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: has any rank got the signal?

        Raises:
            SystemExit: the job is in the queue again.
        """
        # Within an accumulation window there are gradients that no checkpoint holds.
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            return
        self._asked = False
        path = next_checkpoint(Path(trainer.default_root_dir))
        unfinished = path.with_name("unfinished.part")  # "hpc_ckpt_" in it would make Lightning resume from it
        trainer.save_checkpoint(unfinished)
        requeued = False
        if trainer.is_global_zero:
            unfinished.replace(path)  # whole, or not there: SLURM may end us at any time
            rank_zero_info(f"Saved step {trainer.global_step} to {path}")
            requeued = requeue()
        if trainer.strategy.broadcast(requeued):
            raise SystemExit(0)
        rank_zero_warn("this job could not be requeued, and goes on: was it submitted with --requeue?")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signal back."""
        self._give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same, as Lightning calls no teardown then."""
        self._give_back()

    def _give_back(self) -> None:
        if self._active:
            self._active = False
            signal.signal(self.signal, self._before)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if self._active:
            self._asked = True
            return
        # Lightning puts the handlers back that it found, which included this one.
        signal.signal(number, self._before)
        signal.raise_signal(number)


def next_checkpoint(folder: Path) -> Path:
    """The path after the last checkpoint of this kind in ``folder``: Lightning resumes from the highest number."""
    numbers = [int(match[1]) for path in folder.glob("hpc_ckpt_*.ckpt") if (match := CHECKPOINT.fullmatch(path.name))]
    return folder / f"hpc_ckpt_{max(numbers, default=0) + 1}.ckpt"


def requeue() -> bool:
    """Put the SLURM job of this process back into the queue; whether SLURM agreed."""
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is None:
        rank_zero_warn("there is no SLURM_JOB_ID: this is no SLURM job")
        return False
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        rank_zero_warn(f"scontrol requeue {job} failed: {error}")
        return False
    if done.returncode != 0:
        rank_zero_warn(f"scontrol requeue {job} failed: {done.stderr.strip()}")
    return done.returncode == 0
