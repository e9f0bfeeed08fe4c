"""What a person looks at while a net trains with K-FAC: the progress bar, the loggers, pictures, and advice at the end.

Rank 0 looks alone: the factors are equal on all ranks, so it needs no collective, and nobody can wait for it for ever.
Nothing is read from a device on steps on which nothing is logged.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import rich
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from kfac_dist.callbacks.advice import Seen, advice
from kfac_dist.callbacks.checks import misconfigurations
from kfac_dist.callbacks.kfac import KFAC
from kfac_dist.callbacks.logs import logger_step, send
from kfac_dist.callbacks.measures import Measures, peak_memory
from kfac_dist.callbacks.pictures import check_matplotlib, draw_coefficients, draw_couplings, draw_spectra, show
from kfac_dist.callbacks.report import report
from kfac_dist.coarse import coarse_spaces
from kfac_dist.config import check_number
from kfac_dist.preconditioner import KFACPreconditioner
from kfac_dist.spectra import Spectrum

ALLOWANCE = 0.005  # of the time of the fit, for looks whose interval is not given
POINTS = 1000  # of a curve; every other one is dropped where there are more
BETA = "coarse/beta/"
COUNTS = ("inverse_fallbacks", "dropped_statistics", "failed_ranks", "coarse/failures", "coarse/abandoned")


class KFACMonitor(pl.Callback):
    """Shows what K-FAC does; stands beside KFAC in the Trainer's callbacks, in any order.

    The progress bar has the loss of the last batch, the damping, the coarse gain (the decrease of the squared error,
    over the energy of the direction) and the share of the step that K-FAC took. Every logger gets, when the Trainer
    logs, milliseconds and bytes per step and phase, means over all steps since the last time, and the memory's peak;
    coefficients and failures are among the numbers that KFAC logs, and come from here where it is told not to. At their
    own interval they get the eigenvalue range and the condition number of every layer, and pictures. All of it is of
    rank 0. The curves of a resumed run begin anew; a checkpoint holds nothing of this callback.

    Args:
        every_n_steps: optimizer steps between looks at the eigenvalues; 0: never; None: the steps of the inversions,
            left out where looking would have taken more than 0.5 % of the time of the fit (the first look is free).
        figures_every_n_steps: the same for the pictures: the layers' interaction, the spectra, the coefficients over
            time. TensorBoard and W&B take them; else PNG files are written to ``kfac`` in ``trainer.log_dir``.
        progress_bar: whether to show numbers there.
        summary: whether to print tables and advice at the end of the fit.

    Raises:
        MisconfigurationException: an interval is no integer of at least 0; matplotlib is missing; and, when a fit
            begins, the Trainer has no KFAC callback.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        figures_every_n_steps: int | None = None,
        progress_bar: bool = True,
        summary: bool = True,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("figures_every_n_steps", figures_every_n_steps)):
            if value is not None:
                with misconfigurations():
                    _check_interval(name, value)
        if figures_every_n_steps != 0:
            check_matplotlib()
        self.every_n_steps = every_n_steps
        self.figures_every_n_steps = figures_every_n_steps
        self.progress_bar = progress_bar
        self.summary = summary
        self.advice: list[str] = []
        self._forget()

    def _forget(self) -> None:
        self._kfac: KFAC | None = None
        self._measures: Measures | None = None
        self._folder = Path()
        self._step = -1.0  # K-FAC's own count
        self._place = 0  # the same step as the loggers count
        self._drawn = self._looked = -1.0
        self._begun = self._spent = self._price = 0.0
        self._looks = 0
        self._history: list[tuple[int, dict[str, float]]] = []
        self._spectra: Mapping[str, Spectrum] = {}
        self._gains: list[float] = [0.0, 0.0]  # sum, number
        self._clips: list[float] = [0.0, 0.0]

    # -- begin and end --------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the callback that is watched."""
        if stage != "fit":
            return
        self._forget()
        self.advice = []
        self._kfac = next((callback for callback in trainer.callbacks if isinstance(callback, KFAC)), None)  # type: ignore[attr-defined]
        if self._kfac is None:
            raise MisconfigurationException(
                "KFACMonitor watches a KFAC callback, and the Trainer has none: "
                "Trainer(callbacks=[KFAC(likelihood=..), KFACMonitor()])"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock starts; every rank asks for the folder, which is a collective."""
        if self.figures_every_n_steps != 0:
            self._folder = Path(trainer.log_dir or trainer.default_root_dir, "kfac")
        if trainer.is_global_zero:
            self._measures = Measures(pl_module.device)
            self._begun = time.perf_counter()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last pictures, the tables and the advice."""
        core = self._core
        if core is None or self._measures is None or self._step < 0:
            return
        self._measures.read()
        self._remember(core.metrics)
        if self.every_n_steps != 0 and self._looked != self._step and self._affordable():
            self._spectra = core.spectra()
        if self.figures_every_n_steps != 0 and self._drawn != self._step:
            self._draw(core, trainer)
        seen = self._seen(core)
        self.advice = advice(seen)
        if self.summary:
            beta = self._history[-1][1] if self._history else {}
            rich.print(report(self._measures.total, self._spectra, beta, seen.counts, self.advice))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the run; the advice stays."""
        self._forget()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same, as Lightning calls no teardown then."""
        self._forget()

    @property
    def _core(self) -> KFACPreconditioner | None:
        return None if self._kfac is None else self._kfac.preconditioner

    # -- one step -------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The step begins."""
        if self._measures is not None:
            self._measures.begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what has been done, and show it where it is time to."""
        core = self._core
        if core is None or self._measures is None:
            return
        self._measures.end()
        ready = core.metrics.ready()
        step = ready.get("step", -1.0)
        if step == self._step:  # a micro-batch, or a batch that the module skipped
            return
        self._step = step
        self._place = logger_step(trainer)
        self._measures.add(core.metrics)
        if "coarse/decrease_ratio" in ready:
            self._gains = [self._gains[0] + ready["coarse/decrease_ratio"], self._gains[1] + 1.0]
        every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if (self._place + 1) % (every or 50) == 0:
            self._log(core, trainer, pl_module, outputs, ready, to_loggers=every > 0)
        look, draw = self._due(self.every_n_steps, core), self._due(self.figures_every_n_steps, core)
        if look or draw:
            self._look(core, trainer, spectra=look, figures=draw)

    def _log(
        self,
        core: KFACPreconditioner,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        ready: Mapping[str, float],
        *,
        to_loggers: bool,
    ) -> None:
        assert self._measures is not None  # on_train_batch_end has looked
        assert self._kfac is not None  # and so is this
        costs = self._measures.read()
        self._remember(core.metrics)
        if not to_loggers:
            return
        values = costs.per_step()
        memory = peak_memory(pl_module.device)
        if memory is not None:
            values["memory_peak"] = float(memory)
        if self._kfac.log_every_n_steps == 0:
            values |= core.metrics
        send(values, trainer, self._place)
        if self.progress_bar:
            shown = {"kfac/damping": ready["damping"], "kfac/time_share": costs.share}
            if "coarse/decrease_ratio" in ready:
                shown["kfac/coarse_gain"] = ready["coarse/decrease_ratio"]
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if isinstance(loss, torch.Tensor) and loss.numel() == 1:
                parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
                shown["kfac/loss"] = float(loss.detach()) * parts
            pl_module.log_dict(shown, prog_bar=True, logger=False, on_step=True, on_epoch=False, rank_zero_only=True)

    def _remember(self, metrics: Mapping[str, float]) -> None:
        """The coefficients and the clip of the last step; reading them waits for the device."""
        clip = metrics.get("kl_clip_scale")
        if clip is not None:
            self._clips = [self._clips[0] + clip, self._clips[1] + 1.0]
        beta = {name.removeprefix(BETA): metrics[name] for name in metrics if name.startswith(BETA)}
        if not beta or (self._history and self._history[-1][0] == self._place):
            return
        self._history.append((self._place, beta))
        if len(self._history) > POINTS:
            del self._history[1:-1:2]

    # -- looks ----------------------------------------------------------------------------------------------------

    def _affordable(self) -> bool:
        elapsed = time.perf_counter() - self._begun
        return not self._looks or self._spent + self._price <= ALLOWANCE * elapsed

    def _due(self, every: int | None, core: KFACPreconditioner) -> bool:
        interval = core.config.inverse_every_n_steps if every is None else every
        if interval == 0 or self._step == 0 or self._step % interval:
            return False
        return every is not None or self._affordable()

    def _look(self, core: KFACPreconditioner, trainer: pl.Trainer, *, spectra: bool, figures: bool) -> None:
        start = time.perf_counter()
        if spectra or not self._spectra:
            self._spectra = core.spectra()
        if spectra:
            values: dict[str, float] = {}
            for name, spectrum in self._spectra.items():
                low, high = spectrum.range()
                values |= {f"eigenvalue_min/{name}": low, f"eigenvalue_max/{name}": high}
                values[f"condition/{name}"] = spectrum.condition
            send(values, trainer, self._place)
            self._looked = self._step
        if figures:
            self._draw(core, trainer)
        self._price = time.perf_counter() - start
        self._spent += self._price
        self._looks += 1

    def _draw(self, core: KFACPreconditioner, trainer: pl.Trainer) -> None:
        step = self._place
        figures = {"spectra": draw_spectra(self._spectra, step)} if self._spectra else {}
        if core.coarse_system is not None:
            figures["interaction"] = draw_couplings(core.coarse_system, step)
        if self._history:
            figures["beta"] = draw_coefficients(self._history)
        self._drawn = self._step
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            show(figures, trainer.loggers, step, self._folder)
        except OSError as error:
            rank_zero_warn(f"KFACMonitor could not write its pictures to {self._folder}: {error}")

    def _seen(self, core: KFACPreconditioner) -> Seen:
        assert self._measures is not None  # on_fit_end has looked
        ready = core.metrics.ready()
        space = None if core.coarse is None else coarse_spaces[core.coarse.space](core.coarse)
        clipped = core.config.kl_clip is not None and self._clips[1] > 0
        return Seen(
            steps=self._measures.total.steps,
            shares=self._measures.total.shares,
            gain=self._gains[0] / self._gains[1] if self._gains[1] else None,
            rate_free=space is not None and space.uses_momentum,
            clip=self._clips[0] / self._clips[1] if clipped else None,
            conditions={name: spectrum.condition for name, spectrum in self._spectra.items()},
            counts={name: ready[name] for name in COUNTS if name in ready},
            damping=ready["damping"],
            factor_every_n_steps=core.config.factor_every_n_steps,
            inverse_every_n_steps=core.config.inverse_every_n_steps,
            factor_samples=core.config.factor_samples,
            sides=core.config.factor_sides,
            ranks=core.assignment.world_size,
            all_inverses_everywhere=core.assignment.gradient_workers == core.assignment.world_size,
        )


def _check_interval(name: str, value: object) -> None:
    check_number(name, value, 0)
    if not isinstance(value, int):
        raise ValueError(f"{name}={value!r} must be an integer: a number of steps, or 0 for never")
