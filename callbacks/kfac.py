"""The Lightning callback: it tells a KFACPreconditioner when to look and when to act, and computes nothing itself.

Lightning calls, for every optimizer step: ``training_step``, ``on_before_backward`` (the loss may be scaled), the
backward, ``on_before_optimizer_step`` (gradients unscaled, averaged over ranks and accumulated), gradient clipping, and
the optimizer. So the Trainer's ``gradient_clip_val`` acts on K-FAC's directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.optim import Optimizer

from kfac_dist.callbacks.checks import (
    check_launcher,
    check_optimizers,
    check_precision,
    check_strategy,
    is_ddp,
    misconfigurations,
    modules_outside,
    warn_of_optimizer,
)
from kfac_dist.callbacks.logs import log
from kfac_dist.callbacks.options import check_options, entry, exactly, method_of, parse_coarse, parse_distribution
from kfac_dist.callbacks.samples import let_ddp_leave_linears, refuse_scaler
from kfac_dist.callbacks.trial import Trial
from kfac_dist.callbacks.window import Window
from kfac_dist.compat import is_compiled, open_compiled_code
from kfac_dist.config import CoarseConfig, DistributionConfig, KFACConfig
from kfac_dist.preconditioner import KFACPreconditioner
from kfac_dist.summary import Summary, inspect


class KFAC(pl.Callback):
    """Preconditions the gradients by K-FAC just before the optimizer applies them; SGD is the optimizer to use.

    It covers the layers that are trainable when the fit starts (``kfac-dist inspect`` names them); all other parameters
    keep their gradients. Callbacks that want raw gradients stand before this one or use ``on_after_backward``. A
    learning rate that the Tuner finds is one for raw gradients: it runs without callbacks. Every ``fit`` starts with
    new curvature unless it resumes from a checkpoint; with ``strategy="ddp_spawn"`` that curvature stays with the
    workers. The Trainer may be that of ``pytorch_lightning`` or of ``lightning.pytorch`` (whose LightningCLI takes only
    callbacks of its own package: there build the Trainer in Python).

    Args:
        likelihood: what the loss is the negative log-likelihood of: "categorical", "bernoulli" or "gaussian" (the true
            Fisher, by sampled targets), or "empirical" (from the training backward; also None, with a warning).
        fisher_samples: draws per sample, or "exact": one backward per column of the loss Hessian's root.
        output_module: name of the module whose output is the logits (the mean for "gaussian"); None: the
            LightningModule itself, whose ``forward`` must then be what ``training_step`` calls, as ``self(x)``.
        class_dim: dimension of the classes, as in ``F.cross_entropy`` (for "categorical").
        damping: lambda, a number, a function of the step such as ``kfac_dist.schedules.ExponentialDamping``, or
            "adaptive": it follows the loss, for which a silent copy of the module evaluates it again, as below.
        damping_method: "factored" (pi-corrected Tikhonov) or "eigen" (exact).
        factor_sides: "both", or "input": only A (Benzing 2022).
        factor_decay: decay of the factors' moving average, per factor update.
        factor_every_n_steps: optimizer steps between updates of the factors.
        inverse_every_n_steps: optimizer steps between inversions.
        kl_clip: bound on ``lr^2 <direction, gradient>`` (nats), with the optimizer's current rates; None: off.
        loss_reduction: how the loss is formed from the samples' negative log-likelihoods: "mean" over samples, "sum",
            "mean_all" over all targets (``nn.MSELoss()``), or a number c for c times the mean over samples.
        skip_layers: regular expressions on module and class names.
        coarse: None: one level; the name of a coarse space; or a CoarseConfig or its keywords. Where its damping
            adapts, a silent copy of the module evaluates the loss again, at the first 20 steps and every fifth after.
        distribution: "comm_opt", "mem_opt", a gradient-worker fraction, or a DistributionConfig or its keywords.
        seed: of the sampled targets.
        clip_raw_gradients: bound on the norm of the gradients before they are preconditioned; None: off.
        log_every_n_steps: steps between logs of ``metrics`` under "kfac/"; None: when the Trainer logs; 0: never.
        sample_ids_key: where the batch holds global sample ids (B,): a key, attribute or index. With them the sampled
            targets do not depend on how batches lie on ranks.
        mask_key: where the batch holds a mask (B, ..): samples or targets that are False count nowhere.
        kfac_approx: "expand" or "reduce", for weights that are shared over the locations of a sequence or an image;
            or pattern -> one of them (Eschenhagen et al. 2023).
        max_factor_dim: a factor of a larger order falls back to a block-diagonal or diagonal one.
        large_factors: which of the two: "blocks" or "diagonal".
        norm_blocks: the Fisher block of a norm's scale and shift: "diagonal", "channel" (2 x 2) or "full".
        uncovered: parameters that no layer type treats keep their "plain" gradient, or get the "diagonal" of their
            Fisher block.
        initial_damping: where "adaptive" starts.
        factor_samples: share of the samples, in (0, 1], that the factors are made of, chosen anew at each update.
        inverse_schedule: invert all layers "together", every n steps, or "staggered": some at each of these n steps.
        preconditioning: what directions are made of, which are the same to rounding. "gradients": of the gradients, by
            two dense products per layer. "auto": on one process, on a CPU, those of nn.Linear layers whose batch has
            fewer rows than about two thirds of their width are made of these rows, as long as the gradient turns out to
            be what they make. "samples": such layers get no weight gradient in the backward at all; under DDP K-FAC
            then exchanges these directions in the place of DDP's gradients.

    Raises:
        MisconfigurationException: a value is out of its bounds.
    """

    def __init__(
        self,
        likelihood: str | None = None,
        fisher_samples: int | Literal["exact"] = 1,
        output_module: str | None = None,
        class_dim: int = 1,
        damping: float | Callable[[int], float] | Literal["adaptive"] = 0.01,
        damping_method: Literal["factored", "eigen"] = "factored",
        factor_sides: Literal["both", "input"] = "both",
        factor_decay: float = 0.95,
        factor_every_n_steps: int = 10,
        inverse_every_n_steps: int = 100,
        kl_clip: float | None = None,
        loss_reduction: float | Literal["mean", "sum", "mean_all"] = "mean",
        skip_layers: str | Sequence[str] = (),
        coarse: str | CoarseConfig | dict[str, Any] | None = None,
        distribution: float | Literal["comm_opt", "mem_opt"] | DistributionConfig | dict[str, Any] = "comm_opt",
        seed: int = 0,
        clip_raw_gradients: float | None = None,
        log_every_n_steps: int | None = None,
        sample_ids_key: str | int | None = None,
        mask_key: str | int | None = None,
        kfac_approx: Literal["expand", "reduce"] | dict[str, str] = "expand",
        max_factor_dim: int = 8192,
        large_factors: Literal["blocks", "diagonal"] = "blocks",
        norm_blocks: Literal["diagonal", "channel", "full"] = "channel",
        uncovered: Literal["plain", "diagonal"] = "plain",
        initial_damping: float = 1.0,
        inverse_schedule: Literal["together", "staggered"] = "together",
        factor_samples: float = 1.0,
        preconditioning: Literal["auto", "gradients", "samples"] = "auto",
    ) -> None:
        self._options: dict[str, Any] = {
            "likelihood": likelihood,
            "fisher_samples": fisher_samples,
            "output_module": output_module,
            "class_dim": class_dim,
            "damping": damping,
            "damping_method": damping_method,
            "factor_sides": factor_sides,
            "factor_decay": factor_decay,
            "factor_every_n_steps": factor_every_n_steps,
            "inverse_every_n_steps": inverse_every_n_steps,
            "kl_clip": kl_clip,
            "loss_reduction": loss_reduction,
            "skip_layers": (skip_layers,) if isinstance(skip_layers, str) else tuple(skip_layers),
            "seed": seed,
            "kfac_approx": kfac_approx,
            "max_factor_dim": max_factor_dim,
            "large_factors": large_factors,
            "norm_blocks": norm_blocks,
            "uncovered": uncovered,
            "initial_damping": initial_damping,
            "inverse_schedule": inverse_schedule,
            "factor_samples": factor_samples,
            "preconditioning": preconditioning,
        }
        with misconfigurations():
            check_options(self._options, clip_raw_gradients, log_every_n_steps)
            self._options["coarse"] = parse_coarse(coarse)
            self._distribution = parse_distribution(distribution)
        self.clip_raw_gradients = clip_raw_gradients
        self.log_every_n_steps = log_every_n_steps
        self.sample_ids_key = sample_ids_key
        self.mask_key = mask_key
        self._core: KFACPreconditioner | None = None
        self._state: dict[str, Any] = {}
        self._metrics: dict[str, float] = {}
        self._restore_compiler: Callable[[], None] | None = None
        self._restore_ddp: Callable[[], None] | None = None
        self._batch: dict[str, Any] = {}
        self._window = Window()
        self._trial: Trial | None = None

    @property
    def preconditioner(self) -> KFACPreconditioner | None:
        """The core while a fit runs, else None."""
        return self._core

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers of the last step, as ``KFACPreconditioner.metrics``; they stay after the fit."""
        return self._metrics if self._core is None else self._core.metrics

    def settings(self) -> tuple[KFACConfig, DistributionConfig, CoarseConfig | None]:
        """The method, its distribution and its coarse level, as they were configured."""
        return method_of(self._options), self._distribution, self._options["coarse"]

    def inspect(self, pl_module: pl.LightningModule, world_size: int = 1) -> Summary:
        """What a fit on so many ranks would do with every module: a table for ``print`` and ``rich.print``.

        Raises:
            MisconfigurationException: the module has no layer that can be preconditioned.
        """
        method = method_of(self._options)
        with misconfigurations():
            return inspect(pl_module, method, self._distribution, self._options["coarse"], world_size)

    # -- begin and end --------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything expensive happens; forget an earlier fit."""
        if stage != "fit":
            return
        check_strategy(trainer)
        check_precision(trainer)
        check_launcher(trainer, self._distribution)
        self._close()
        self._state = {}
        self._metrics = {}
        if self._options["preconditioning"] == "samples":
            refuse_scaler(trainer)
            if is_ddp(trainer):
                self._restore_ddp = let_ddp_leave_linears(pl_module, method_of(self._options))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the core: the module is on its device now, and its layers are the final ones."""
        optimizer = check_optimizers(trainer)
        warn_of_optimizer(optimizer)
        skip = [exactly(name) for name in modules_outside(optimizer, pl_module)]
        if getattr(pl_module, "_compiler_ctx", None) is not None or any(map(is_compiled, pl_module.modules())):
            self._restore_compiler = open_compiled_code()
        options = self._options | {"skip_layers": (*self._options["skip_layers"], *skip)}
        with misconfigurations():
            self._core = KFACPreconditioner(pl_module, **options, distribution=self._distribution_of(trainer))
            self._core.check_optimizer(optimizer)
            if self._state:
                self._core.load_state_dict(self._state)
        self._trial = None
        if self._core.uses_loss and (pl_module.automatic_optimization or self._core.needs_loss):
            self._trial = Trial(trainer, pl_module, self._core.needs_loss)
        self._batch = {}
        self._window = Window()

    def _distribution_of(self, trainer: pl.Trainer) -> DistributionConfig:
        # torch.distributed may still be up from an earlier fit on more ranks: the Trainer's word counts.
        if trainer.world_size == 1:
            return replace(self._distribution, backend="single", coarse_backend=None)
        if self._distribution.backend == "single":
            raise ValueError(
                f'distribution backend "single" on {trainer.world_size} ranks would precondition the replicas apart: '
                'use "auto"'
            )
        return self._distribution

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the hooks and keep the state, for a checkpoint that is saved after the fit."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same, as Lightning calls no teardown then."""
        self._close()

    def _close(self) -> None:
        core, self._core = self._core, None
        restores = [restore for restore in (self._restore_compiler, self._restore_ddp) if restore is not None]
        self._restore_compiler = self._restore_ddp = None
        self._batch, self._trial = {}, None
        try:
            if core is not None:
                core.close()
                self._state = move_data_to_device(core.state_dict(), "cpu")
                self._metrics = dict(core.metrics)
        finally:
            for restore in restores:
                restore()

    # -- one step -------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forget forwards that led to no backward, and take what the batch says of its samples."""
        if self._core is None:
            return
        self._core.forget()
        self._window.begin_batch()
        if self._trial is not None and self._core.wants_loss:
            self._trial.keep(batch, batch_idx)
        self._batch = {
            "sample_ids": entry(batch, "sample_ids_key", self.sample_ids_key),
            "mask": entry(batch, "mask_key", self.mask_key),
        }

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Statistics of this micro-batch."""
        if self._core is None:
            return
        self._window.add_backward()
        # In manual optimization the division, if any, is in training_step, where it cannot be seen.
        divisor = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        with misconfigurations():
            self._core.accumulate(**self._batch, loss_divisor=divisor)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradients become directions, once per accumulation window."""
        if self._core is None or not self._window.end(pl_module, optimizer):
            return
        with torch.no_grad(), misconfigurations():
            if self.clip_raw_gradients is not None:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(parameters, self.clip_raw_gradients)
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            grad_scale = 1.0 if scaler is None else float(scaler.get_scale())
            self._core.step(lr=optimizer, grad_scale=grad_scale, closure=self._trial)
        if self._trial is not None:
            self._trial.clear()
        log(self._core.metrics, self.log_every_n_steps, trainer, pl_module)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Step, factors and counters, equal on all ranks; no collective, so that any rank may save at any time."""
        return self._state if self._core is None else self._core.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the core is there: Lightning restores callbacks before the fit starts."""
        if self._core is None:
            self._state = state_dict
        else:
            self._core.load_state_dict(state_dict)
