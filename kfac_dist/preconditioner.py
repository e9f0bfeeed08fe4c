"""KFACPreconditioner: the step, from captured statistics to rewritten gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_dist.assignment import Assignment
from kfac_dist.checkpoint import changed_settings, load, save, written
from kfac_dist.coarse import coarse_spaces
from kfac_dist.coarse_solver import CoarseSystem
from kfac_dist.comm import make_channel, make_communicator
from kfac_dist.compat import full_float32, unwrap
from kfac_dist.config import CoarseConfig, DistributionConfig, KFACConfig, Schedule, check_number
from kfac_dist.fisher import Fisher
from kfac_dist.kept_rows import KeptRows, Rows
from kfac_dist.layers import covered_parameters, find_layers
from kfac_dist.metrics import Metrics, MetricValue, PhaseTimer
from kfac_dist.notices import Notices, check_layers
from kfac_dist.one_level import OneLevel
from kfac_dist.planning import Step, plan_step
from kfac_dist.rank_b import RankB, plain_linears, served_layers
from kfac_dist.rate_free import check_rate_free, parameter_groups
from kfac_dist.replicas import average_gradients
from kfac_dist.samples import DEFAULT_SAMPLES, Samples, share
from kfac_dist.spectra import Spectrum, spectra
from kfac_dist.summary import Summary, summarise
from kfac_dist.two_level import TwoLevel
from kfac_dist.update import Update, plan_update


class KFACPreconditioner:
    """Rewrites ``param.grad`` into the K-FAC direction, with the work spread over the ranks of a process group.

    Call :meth:`accumulate` after the forward, ``loss.backward()``, :meth:`step`, and then any outer optimizer's step.
    Weight decay is the outer optimizer's and should be decoupled from the gradient.

    Args:
        model: nn.Module, plain or wrapped in DistributedDataParallel.
        likelihood: "categorical", "bernoulli" or "gaussian": the true Fisher, by targets sampled from the model;
            "empirical": from the training backward; None: empirical, with a warning.
        fisher_samples: draws per sample, or "exact": one backward per column of the loss Hessian's root.
        output_module: name or module whose output is the logits (the mean for "gaussian"); None: the model itself.
        class_dim: dimension of the classes, as in ``F.cross_entropy`` (for "categorical").
        damping: lambda, a number or a function of the step; it acts in the step in which it is given. "adaptive": it
            follows the loss (Levenberg-Marquardt; Martens and Grosse 2015, section 6.5), for which :meth:`step` needs
            a closure; with a coarse level whose damping is "auto" or None, that one is the same.
        damping_method: "factored" (pi-corrected Tikhonov; Martens and Grosse 2015, section 6.3) or "eigen", exactly
            (T (G (x) A) + lambda I)^-1.
        factor_sides: "both", or "input": only A (Benzing 2022, arXiv 2201.12250).
        factor_decay: decay of the factors' moving average, per factor update.
        factor_samples: share of the samples, in (0, 1], that the factors are made of, chosen anew at each update: they
            stay unbiased, in a share s of the time, with 1 / sqrt(s) times the error of the whole batch.
        factor_every_n_steps: steps between updates of the factors.
        inverse_every_n_steps: steps between inversions.
        kl_clip: bound on ``lr^2 <direction, gradient>`` (nats); None: off.
        loss_reduction: how the training loss is formed from the samples' negative log-likelihoods, each summed over its
            outputs: "mean" over samples, "sum", "mean_all" over all targets (``nn.MSELoss()``), or a number c for
            c times the mean over samples ("empirical" cannot tell classes from targets: there "mean_all" means all
            entries of the output). Damping, clip and directions are in units of the "mean" form: gradients are
            divided by the loss's scale first, so the same settings serve every form. "sum" takes ``param.grad`` as
            DDP leaves it, averaged over the ranks.
        skip_layers: regular expressions on module and class names.
        coarse: None: one level; the name of a coarse space, or a CoarseConfig.
        distribution: "comm_opt", "mem_opt", a gradient-worker fraction or a DistributionConfig.
        process_group: None: the default group where torch.distributed is initialised, else one process.
        seed: of the sampled targets.
        kfac_approx: "expand" (every location of a sequence or an image is a sample of its own) or "reduce" (the
            locations are averaged first), or pattern -> one of them, the first pattern that is found in a module's or
            class's name deciding (Eschenhagen et al. 2023, arXiv 2311.00636).
        max_factor_dim: a factor of a larger order falls back to a block-diagonal or diagonal one.
        large_factors: which of the two: "blocks" (as few as the bound allows) or "diagonal".
        norm_blocks: the Fisher block of a norm's scale and shift: "diagonal", "channel" (2 x 2) or "full".
        uncovered: parameters that no layer type treats keep their "plain" gradient, or get the "diagonal" of their
            Fisher block.
        initial_damping: where "adaptive" starts.
        inverse_schedule: "together": every n steps all layers are inverted; "staggered": some at each of these n steps,
            so that no step is much longer than the others (the first inversion is of all).
        preconditioning: what directions are made of, which are the same to rounding (see docs/layers.md). "gradients":
            of ``param.grad``, by two dense products per layer. "auto": on one process, on a CPU, those of nn.Linear
            layers whose batch has fewer rows than about two thirds of their width are made of these rows, as long as
            ``param.grad`` turns out to be what they make. "samples": such layers get no weight gradient at all in
            ``loss.backward()``, on one process or several.

    Raises:
        ValueError: a value out of its bounds, a module name that does not exist, or a model without any layer that
            can be preconditioned.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | None = None,
        fisher_samples: int | Literal["exact"] = 1,
        output_module: str | nn.Module | None = None,
        class_dim: int = 1,
        damping: Schedule | Literal["adaptive"] = 0.01,
        damping_method: Literal["factored", "eigen"] = "factored",
        factor_sides: Literal["both", "input"] = "both",
        factor_decay: float = 0.95,
        factor_every_n_steps: int = 10,
        inverse_every_n_steps: int = 100,
        kl_clip: float | None = None,
        loss_reduction: str | float = "mean",
        skip_layers: Sequence[str] = (),
        coarse: str | CoarseConfig | None = None,
        distribution: str | float | DistributionConfig = "comm_opt",
        process_group: Any = None,
        seed: int = 0,
        kfac_approx: str | Mapping[str, str] = "expand",
        max_factor_dim: int = 8192,
        large_factors: Literal["blocks", "diagonal"] = "blocks",
        norm_blocks: Literal["diagonal", "channel", "full"] = "channel",
        uncovered: Literal["plain", "diagonal"] = "plain",
        initial_damping: float = 1.0,
        inverse_schedule: Literal["together", "staggered"] = "together",
        factor_samples: float = 1.0,
        preconditioning: Literal["auto", "gradients", "samples"] = "auto",
    ) -> None:
        if likelihood is None:
            warnings.warn(
                "no likelihood is given: the empirical Fisher is used, which is biased. Name the loss's likelihood "
                '("categorical", "bernoulli", "gaussian"), or say likelihood="empirical"',
                stacklevel=2,
            )
        self.config = KFACConfig(
            likelihood=likelihood or "empirical",
            fisher_samples=fisher_samples,
            class_dim=class_dim,
            damping=damping,
            damping_method=damping_method,
            factor_sides=factor_sides,
            factor_decay=factor_decay,
            factor_every_n_steps=factor_every_n_steps,
            inverse_every_n_steps=inverse_every_n_steps,
            kl_clip=kl_clip,
            loss_reduction=loss_reduction,
            skip_layers=skip_layers,  # type: ignore[arg-type]
            seed=seed,
            kfac_approx=kfac_approx,
            max_factor_dim=max_factor_dim,
            large_factors=large_factors,
            norm_blocks=norm_blocks,
            uncovered=uncovered,
            initial_damping=initial_damping,
            inverse_schedule=inverse_schedule,
            factor_samples=factor_samples,
            preconditioning=preconditioning,
        )
        self.coarse = CoarseConfig.parse(coarse)
        if self.coarse is not None and damping == "adaptive":
            self.coarse = self.coarse.under_adaptive_damping()
        self.distribution = DistributionConfig.parse(distribution)
        self.model = unwrap(model)
        found = find_layers(self.model, self.config)
        self._found, self.layers = found, found.layers
        check_layers(self.model, found)
        space = None if self.coarse is None else coarse_spaces[self.coarse.space](self.coarse)
        if space is not None and space.needs_output_factor and factor_sides == "input":
            raise ValueError(
                f"coarse={self.coarse.space!r} is made of both factors, and factor_sides='input' keeps only A: use "  # type: ignore[union-attr]
                "factor_sides='both' or another space"
            )
        with ExitStack() as made:  # whatever fails, what was made before it is given back
            self._world = make_communicator(self.distribution.backend, process_group, self.distribution.timeout)
            made.callback(self._world.close)
            # What refuses comes before the groups of ranks and the channel, which all ranks make together.
            average, size = self.distribution.average_gradients, self._world.size
            served = served_layers(model, self.layers, self.config, self.coarse, self.distribution, size)
            self._fisher = Fisher(self.model, self.layers, output_module, self.config, self._world.rank)
            made.callback(self._fisher.capture.close)
            eigen = space is not None and space.uses_eigenbases
            self._one = OneLevel(self.layers, self.config, self.distribution, self._world, eigen=eigen)
            channel = self.distribution.coarse_backend if self.coarse is not None else None
            self._coarse_world = make_channel(channel, self._world, self.distribution.timeout, self._one.device)
            made.callback(self._coarse_world.close)
            self._two = None
            if self.coarse is not None and space is not None:
                self._two = TwoLevel(self.coarse, space, self._coarse_world)
            self._rank_b = RankB(model, served, self.config, average, self._world, self._one.dtype)
            # An accelerator would have to be waited for, and several ranks have gradients that no rank's rows make.
            beside = self.config.preconditioning == "auto" and size == 1 and self._one.device.type == "cpu"
            self._kept_rows = KeptRows(
                plain_linears(model, self.layers) if beside else [], self.config, self._one.dtype
            )
            made.pop_all()
        self._samples: Samples | None = None
        self._step = 0
        self._before: dict[str, Any] | None = None  # the state before the step that is under way
        self._notices = Notices(self._world.rank)
        self._timer = PhaseTimer(self._one.device)
        self.metrics = Metrics()
        self._begin()
        self._notices.found(found)

    @property
    def assignment(self) -> Assignment:
        """Which rank inverts which factor, and which ranks precondition which layer."""
        return self._one.assignment

    @property
    def uses_loss(self) -> bool:
        """Whether a closure for :meth:`step` is of use: a damping can adapt."""
        coarse = self._two is not None and self._two.config.damping in ("adaptive", "auto")
        return self._one.damping.adaptive or coarse

    @property
    def needs_loss(self) -> bool:
        """Whether :meth:`step` insists on a closure."""
        return self._one.damping.adaptive or (self._two is not None and self._two.config.damping == "adaptive")

    @property
    def wants_loss(self) -> bool:
        """Whether the next step will call its closure."""
        rule = self._one.damping.trust or (None if self._two is None else self._two.trust)
        return self.uses_loss and rule is not None and rule.due(self._step)

    # -- the training loop's calls --------------------------------------------------------------------------------

    def accumulate(self, sample_ids: Tensor | None = None, mask: Tensor | None = None, loss_divisor: float = 1) -> None:
        """Take the statistics of the forward that was just made; on steps without a factor update it does nothing.

        Call it after the forward and before ``loss.backward()``, once per micro-batch. With the empirical Fisher it
        only tells the mask and the divisor, and may be left out where there are none.

        Args:
            sample_ids: (B,) integers, the GLOBAL index of every sample: with them the sampled targets do not depend on
                how the batch lies on the ranks. Default: (rank, micro-batch, position).
            mask: (B, ..) booleans, the first dimensions of the targets; False entries count nowhere.
            loss_divisor: what the training loss was divided by (accumulated micro-batches).

        Raises:
            RuntimeError: there was no forward pass, or its graph is gone.
            ValueError: logits, mask or ids have a shape that does not fit, or the divisor is no number above 0.
        """
        check_number("loss_divisor", loss_divisor, 0.0, open_low=True)
        with self._timer("capture"):
            self._fisher.accumulate(self._step, sample_ids, mask, loss_divisor)

    def forget(self) -> None:
        """Drop forwards that no :meth:`accumulate` followed (a loss that was skipped); the window's sums stay."""
        self._fisher.forget()
        self._kept_rows.forget()

    def step(
        self,
        lr: float | Optimizer | None = None,
        grad_scale: float = 1.0,
        closure: Callable[[], Tensor] | None = None,
        loss: Tensor | float | None = None,
    ) -> None:
        """Rewrite ``param.grad`` in place; every rank calls it, also one that saw no data.

        Args:
            lr: the outer optimizer, whose group rates enter per layer, or a number; for the KL clip and the adaptive
                damping.
            grad_scale: what a gradient scaler multiplied the LOSS by; the gradients themselves have to be unscaled.
            closure: returns the loss on the same batch; adaptive damping calls it every five steps, before the update
                and after it, without gradients, with the model's parameters, buffers and the random streams left as
                they were. All ranks give one or none does (where ``wants_loss`` is False it is not called); on a rank
                without samples it returns NaN.
            loss: what the closure would return before the update, and is not asked for then: the loss that was trained
                on, unscaled, of the whole window, in a model that draws no random numbers. All ranks give it or none.

        Raises:
            RuntimeError: no statistics were accumulated on a factor step, or replicas drifted apart.
            ValueError: adaptive damping without a closure; a loss of several entries; an optimizer that lacks a covered
                parameter, or that does not fit the learning-rate-free mode.
            kfac_dist.comm.CommunicationError: a collective failed; the message names the phase.
        """
        check_number("grad_scale", grad_scale, 0.0, open_low=True)
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(
                f"loss of shape {tuple(loss.shape)}: step() takes the loss that was trained on, one number"
            )
        self._check_step(lr, closure, grad_scale)
        self._before = save(self._step, self._one, self._two)
        self._world.traffic.clear()
        one, values = self._one, dict[str, MetricValue]()
        # A caller's autocast (the whole training_step, under manual optimization) would halve the precision of it all.
        with torch.no_grad(), torch.autocast(one.device.type, enabled=False), full_float32():
            local, shared = self._rank_b.take(), self._rank_b.left_to_us
            if shared:
                with self._timer("gradients"):
                    average_gradients(shared, self._world)
            with self._timer("factors"):
                self._take_statistics(grad_scale, lr, local)
            damping = one.damping.value(self._step)
            if one.inverses_due(self._step):
                with self._timer("inverses"):
                    one.update_inverses(self._step, damping)
            with self._timer("precondition"):
                gradients = one.gradients(without=self._rank_b.served)
                rows = self._kept_rows.take(gradients, one.loss_scale)
                directions = one.precondition(gradients, damping, rows)
                directions |= self._rank_b.precondition(one.states, damping, one.loss_scale)
            if directions:
                with self._timer("write" if self._two is None else "coarse"):
                    update = self._plan(gradients, directions, rows, Step(self._step, lr, closure, loss))
                with self._timer("write"):
                    update.write()
                values |= update.metrics()
        self._finish({"damping": damping} | values)

    # -- the stages of the step -----------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Open the next accumulation window: capture where factors are due, or samples are missing."""
        due = self._one.factors_due(self._step)
        samples, wanted = None, self._two is not None or self._one.damping.adaptive
        if wanted and (due or self._samples is None):
            quota = share(DEFAULT_SAMPLES, self._world) if self._two is None else self._two.quota(len(self.layers))
            samples = Samples(quota)
        self._fisher.begin(due or samples is not None, self._step, samples)

    def _plan(
        self,
        gradients: Mapping[str, Tensor],
        directions: Mapping[str, Tensor],
        rows: Mapping[str, Rows],
        step: Step,
    ) -> Update:
        """The clip, the coarse correction and the trial of an adaptive damping, as far as there are any."""
        if self._rank_b.served:
            layers = [layer for layer in self.layers if layer.name in directions]
            known = self._rank_b.products(directions)
            return plan_update(layers, gradients, directions, None, self.config.kl_clip, step.lr, known)
        two = None if self._samples is None else self._two
        return plan_step(self.model, self._one, two, self._samples, gradients, directions, rows, step)

    def _take_statistics(self, grad_scale: float, lr: float | Optimizer | None, local: Sequence[Tensor]) -> None:
        """The window's sums into the factors, and its samples to the coarse level."""
        empirical = self.config.likelihood == "empirical"  # a sampled pass does not see the scaler
        if self._one.factors_due(self._step):
            if empirical:
                self._fisher.statistics.rescale_outputs(grad_scale**-2)
            self._fisher.loss_check.report(grad_scale)
            if not self._one.update_factors(self._fisher.statistics, local, self._rank_b.parameters):
                return
            silent = [layer for layer in self.layers if self._one.states[layer.name].updates == 0]
            self._notices.silent(silent, self._fisher.capture.recomputed)
            if silent and isinstance(lr, Optimizer):
                self._check_rate_free(lr, [layer.name for layer in silent])
        if self._fisher.samples is not None:
            if empirical:
                self._fisher.samples.rescale(1.0 / grad_scale)
            self._fisher.samples.leave_out_unless_finite()
            self._samples = self._fisher.samples

    def _finish(self, values: dict[str, MetricValue]) -> None:
        if self._two is not None:
            values |= self._two.report
        values |= {"step": self._step, "loss_scale": self._one.loss_scale, **self._one.counts}
        for phase, count in self._world.traffic.collectives.items():
            values[f"collectives/{phase}"] = count
            values[f"bytes/{phase}"] = self._world.traffic.payload_bytes[phase]
        self.metrics.replace(values, self._timer)
        self._timer = PhaseTimer(self._one.device)
        self._step += 1
        self._before = None
        self._begin()

    # -- checks and warnings --------------------------------------------------------------------------------------

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Check that the outer optimizer fits the coarse space; :meth:`step` does it once, with the optimizer as lr.

        Raises:
            ValueError: in the learning-rate-free mode, an uncovered parameter would be trained with lr = 1.
        """
        self._check_rate_free(optimizer, ())
        self._notices.first("optimizer")  # has been said: step() need not

    def _check_rate_free(self, optimizer: Optimizer, silent: Collection[str]) -> None:
        if self._two is not None and self._two.space.uses_momentum:
            covered = covered_parameters(layer for layer in self.layers if layer.name not in silent)
            check_rate_free(optimizer, covered, self._two.config.space)

    def _check_step(
        self, lr: float | Optimizer | None, closure: Callable[[], Tensor] | None, grad_scale: float
    ) -> None:
        if self.distribution.average_gradients and self._world.size > 1 and grad_scale != 1.0:
            raise ValueError(
                f"average_gradients=True with grad_scale={grad_scale!r}: a gradient scaler looks for overflows before "
                "K-FAC averages, so ranks would skip steps apart; wrap the model in DistributedDataParallel instead"
            )
        if self._rank_b.served and grad_scale != 1.0:
            raise ValueError(
                f'preconditioning="samples" with grad_scale={grad_scale!r}: a gradient scaler unscales gradients and '
                'looks for overflows in them, and there are none: use bfloat16, or preconditioning="gradients"'
            )
        if isinstance(lr, Optimizer) and self._notices.first("optimizer"):
            self.check_optimizer(lr)
        if self.config.kl_clip is not None and lr is None:
            self._notices.once("lr", "kl_clip is set but step() got no lr: the clip takes lr = 1; pass the optimizer")
        if closure is None and self.needs_loss and self.wants_loss:
            level = "" if self._one.damping.adaptive else "coarse "
            raise ValueError(
                f'{level}damping="adaptive" compares the loss before and after an update: pass '
                "kfac.step(closure=lambda: loss of the same batch), or choose a number"
            )
        if self._two is None:
            return
        if closure is not None:
            self._two.has_loss = True
        elif self._two.config.damping == "auto" and not self._two.has_loss:
            self._notices.once(
                "auto",
                f"coarse={self._two.config.space!r}: the coarse damping cannot adapt, because step() got no closure, "
                "and equals the fine damping; pass step(closure=lambda: loss of the same batch), or a number in "
                "CoarseConfig(damping=..)",
            )

    # -- for the user ---------------------------------------------------------------------------------------------

    def parameter_groups(self, lr: float, uncovered_lr: float, uncovered_momentum: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for the outer optimizer: what K-FAC covers, and the rest of the trainable parameters.

        Args:
            lr: rate of the covered parameters (1 in the learning-rate-free mode).
            uncovered_lr: rate of the others (skipped layers, modules that no layer type treats).
            uncovered_momentum: momentum of the others; the covered ones get none.
        """
        config = self.config
        return parameter_groups(
            self.model,
            lr,
            uncovered_lr,
            uncovered_momentum,
            config.skip_layers,
            config.uncovered,
            config.factor_sides,
        )

    def summary(self) -> Summary:
        """Every module's treatment, factors, memory and owner: a table for ``print`` and ``rich.print``."""
        return summarise(self.model, self._found, self.assignment, self._one.dtype, eigen=self._one.eigen)

    def spectra(self) -> dict[str, Spectrum]:
        """Layer -> the eigenvalues of its factors, for the layers that have an inverse.

        Every rank can ask, alone: the factors are everywhere. Where eigenbases are held here it costs nothing, else
        one ``eigvalsh`` per factor.
        """
        damping = self._one.damping.value(max(self._step - 1, 0))
        return spectra(self.layers, self._one.states, damping, factored=self.config.damping_method == "factored")

    def one_level(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer -> the one-level direction of any gradients, with the inverses and the damping of the last step.

        To look at what the coarse level and the clip changed; nothing is changed. Every rank calls it, as :meth:`step`.

        Args:
            gradients: layer -> gradient (groups, d_out, d_in) of the mean loss, for the layers that have an inverse.
        """
        with torch.no_grad(), torch.autocast(self._one.device.type, enabled=False), full_float32():
            mine = {name: gradient.to(self._one.dtype) for name, gradient in gradients.items()}
            return self._one.precondition(mine, self.metrics["damping"])

    @property
    def coarse_system(self) -> CoarseSystem | None:
        """The Galerkin operator of the last coarse solve, on rank 0; None elsewhere and before the first one."""
        return None if self._two is None else self._two.system

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, equal on every rank; no collective, and the same for every world size.

        Within :meth:`step` (a signal's handler) and after a step that raised it is the state before that step.
        """
        return written(self._before or save(self._step, self._one, self._two))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; inverses are rebuilt at the next step, by whichever rank owns them now.

        With one level the run goes on bit by bit as it would have without the interruption, at any step and on as many
        ranks. A coarse level's samples are not saved: there it does so from a step with a factor update, and at any
        other step the next one captures samples of its own batch. An inverse that stood in for a failed factorisation
        is not saved either. Checks and warnings that are made once are made again; settings other than the saved ones
        count from now on, and one warning names them.

        Raises:
            ValueError: another version, other layers or other shapes, or a damaged part; nothing is taken over then.
        """
        self._step = load(state, self._one, self._two)
        self._before = None
        self._samples = None
        self._begin()
        self._notices.resumed(changed_settings(state, self._one, self._two))

    def close(self) -> None:
        """Remove every hook and give back what was made; idempotent."""
        self._fisher.capture.close()
        self._rank_b.close()
        self._kept_rows.close()
        self._samples = None
        self._coarse_world.close()
        self._world.close()
