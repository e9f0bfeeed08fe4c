"""One training run in processes of its own: started, watched, and ended when its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfac_dist.study.record import read_record

ROOT = Path(__file__).resolve().parents[1]
TAIL_LINES = 80  # torchrun adds some 45 lines of its own below the error of a worker
POLL_SECONDS = 0.2
GRACE_SECONDS = 40.0  # torchrun gives its workers 30 s before it kills them


class RunFailedError(RuntimeError):
    """A training run that ended with an error or outlived its time; the message holds the end of its log."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """``kfac-dist fit`` with one configuration, on the CPU.

    Attributes:
        config: a file of configs/.
        options: further options of ``kfac-dist fit``, after the configuration.
        epochs: how long to train.
        record: file for the losses and seconds per epoch (kfac_dist.study.EpochRecord).
        log: file for everything the processes print.
        processes: 1, or as many as torchrun shall start.
        timeout: seconds until the run is given up.
    """

    config: Path
    options: Sequence[str] = ()
    epochs: int
    record: Path
    log: Path
    processes: int = 1
    timeout: float = 300.0

    def command(self) -> list[str]:
        """The command line."""
        launcher = [sys.executable]
        if self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        return [
            *launcher,
            *("-m", "kfac_dist.launch", "fit", "--config", str(self.config)),
            *self.options,
            f"--trainer.default_root_dir={self.record.with_suffix('')}",  # LightningCLI saves config.yaml there
            f"--trainer.max_epochs={self.epochs}",
            f"--trainer.devices={self.processes}",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--trainer.num_sanity_val_steps=0",
            "--trainer.callbacks+=kfac_dist.study.EpochRecord",
            f"--trainer.callbacks.path={self.record}",
        ]

    def train(self, on_progress: Callable[[dict[str, Any]], None] | None = None) -> list[dict[str, Any]]:
        """Run to the end.

        Args:
            on_progress: called every 0.2 s with the record's last line.

        Returns:
            The record's epochs.

        Raises:
            RunFailedError: a non-zero exit status, a missing epoch, or no end within ``timeout`` seconds.
        """
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.unlink(missing_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        end = time.monotonic() + self.timeout
        with self.log.open("w") as log:
            # A session of its own, so that launcher and workers can be ended together.
            process = subprocess.Popen(
                self.command(), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                while process.poll() is None:
                    if time.monotonic() > end:
                        raise RunFailedError(self._failure(f"was ended after {self.timeout:g} s"))
                    if on_progress is not None:
                        on_progress(read_record(self.record)[1])
                    time.sleep(POLL_SECONDS)
            finally:
                end_group(process)
        epochs, _ = read_record(self.record)
        if process.returncode != 0 or len(epochs) != self.epochs:
            status = f"ended with status {process.returncode} after {len(epochs)} of {self.epochs} epochs"
            raise RunFailedError(self._failure(status))
        return epochs

    def _failure(self, what: str) -> str:
        tail = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([f"the run {what}: {' '.join(self.command())}", f"--- end of {self.log}:", *tail])


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its own session, and what it has started; nothing happens where it has ended."""
    for request in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, request)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
