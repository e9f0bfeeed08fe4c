"""KFACPreconditioner: the step, from captured statistics to rewritten gradients."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_dist.assignment import LayerCost, Side, assign, nearest_divisor
from kfac_dist.clip import kl_clip_scale
from kfac_dist.comm import make_communicator
from kfac_dist.compat import unwrap
from kfac_dist.config import DistributionConfig, KFACConfig, Schedule, evaluate
from kfac_dist.curvature import Health, InverseExchange, Reduced, reduce_statistics
from kfac_dist.directions import DirectionExchange
from kfac_dist.factors import statistics_dtype
from kfac_dist.fisher import Fisher
from kfac_dist.layers import Layer, find_layers
from kfac_dist.metrics import Metrics, PhaseTimer
from kfac_dist.replicas import average_gradients, check_replicas, norm
from kfac_dist.state import STATE_VERSION, LayerState, layer_state_from_dict


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
        damping: lambda, a number or a function of the step; it acts in the step in which it is given.
        damping_method: "factored" (pi-corrected Tikhonov; Martens and Grosse 2015, section 6.3) or "eigen", exactly
            (T (G (x) A) + lambda I)^-1.
        factor_sides: "both", or "input": only A (Benzing 2022, arXiv 2201.12250).
        factor_decay: decay of the factors' moving average, per factor update.
        factor_every_n_steps: steps between updates of the factors.
        inverse_every_n_steps: steps between inversions.
        kl_clip: bound on lr^2 <direction, gradient> (nats); None: off.
        loss_reduction: how the training loss is formed from the samples' negative log-likelihoods, each summed over its
            outputs: "mean" over samples, "sum", "mean_all" over all targets (``nn.MSELoss()``), or a number c for
            c times the mean over samples. Damping, clip and directions are in units of the "mean" form: gradients are
            divided by the loss's scale first, so the same settings serve every form. "sum" takes ``param.grad`` as
            DDP leaves it, averaged over the ranks.
        skip_layers: regular expressions on module and class names.
        distribution: "comm_opt", "mem_opt", a gradient-worker fraction or a DistributionConfig.
        process_group: None: the default group where torch.distributed is initialised, else one process.
        seed: of the sampled targets.

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
        damping: Schedule = 0.01,
        damping_method: Literal["factored", "eigen"] = "factored",
        factor_sides: Literal["both", "input"] = "both",
        factor_decay: float = 0.95,
        factor_every_n_steps: int = 10,
        inverse_every_n_steps: int = 100,
        kl_clip: float | None = None,
        loss_reduction: str | float = "mean",
        skip_layers: Sequence[str] = (),
        distribution: str | float | DistributionConfig = "comm_opt",
        process_group: Any = None,
        seed: int = 0,
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
            skip_layers=(skip_layers,) if isinstance(skip_layers, str) else tuple(skip_layers),
            seed=seed,
        )
        self.distribution = DistributionConfig.parse(distribution)
        self.model = unwrap(model)
        self.layers, self._refused = find_layers(self.model, self.config.skip_layers)
        _check_layers(self.model, self.layers, self._refused)
        self._states = {layer.name: LayerState() for layer in self.layers}
        self._dtype = torch.float32
        for layer in self.layers:
            self._dtype = torch.promote_types(self._dtype, statistics_dtype(layer.weight.dtype))
        self._device = self.layers[0].device
        self._world = make_communicator(self.distribution.backend, process_group, self.distribution.timeout)
        self._distribute()
        self._fisher = Fisher(self.model, self.layers, output_module, self.config, self._world.rank)
        self._step = 0
        self._loss_scale = 1.0
        self._rebuild = False
        self._warned: set[str] = set()
        self._counts = dict.fromkeys(("factor_updates", "inverse_updates", "dropped_statistics", "failed_ranks"), 0)
        self._counts["inverse_fallbacks"] = 0
        self._own_fallbacks = 0
        self._timer = PhaseTimer(self._device)
        self.metrics = Metrics()
        self._fisher.begin(self._factors_due())
        if self._refused:
            named = "; ".join(f"{name} ({reason})" for name, reason in self._refused.items())
            self._warn_once("refused", f"these modules keep their plain gradient: {named}")

    # -- construction ---------------------------------------------------------------------------------------------

    @property
    def _sides(self) -> tuple[Side, ...]:
        return ("A", "G") if self.config.factor_sides == "both" else ("A",)

    def _distribute(self) -> None:
        """Decide who inverts and who preconditions, and make the communicators of this rank's column and row."""
        config, world = self.config, self._world
        fraction = {"comm_opt": 1.0, "mem_opt": 1.0 / world.size}.get(
            self.distribution.strategy, self.distribution.gradient_worker_fraction
        )
        workers = nearest_divisor(world.size, fraction if fraction is not None else 1.0)
        costs = [LayerCost(layer.name, layer.input_dim, layer.output_dim, layer.groups) for layer in self.layers]
        self.assignment = assign(costs, world.size, workers, config.inverse_every_n_steps, config.factor_sides)
        column = world.split(self.assignment.columns)
        row = world.split(self.assignment.rows)
        # A constant damping can stand inside the inverses: half the products per step. One that changes acts at use.
        factored = config.damping_method == "factored"
        eigen = (not factored and config.factor_sides == "both") or callable(config.damping)
        self._inverses = InverseExchange(
            self.layers, self._sides, self.assignment, world.rank, column, eigen=eigen, factored=factored
        )
        self._exchange = DirectionExchange(self.layers, self.assignment, world.rank, row, self._dtype)

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
            ValueError: logits, mask or ids have a shape that does not fit.
        """
        with self._timer("capture"):
            self._fisher.accumulate(self._step, sample_ids, mask, loss_divisor)

    def forget(self) -> None:
        """Drop forwards that no :meth:`accumulate` followed (a loss that was skipped); the window's sums stay."""
        self._fisher.forget()

    def step(
        self,
        lr: float | Optimizer | None = None,
        grad_scale: float = 1.0,
        closure: Callable[[], Tensor] | None = None,
    ) -> None:
        """Rewrite ``param.grad`` in place; every rank calls it, also one that saw no data.

        Args:
            lr: the outer optimizer, whose group rates enter per layer, or a number; only the KL clip uses it.
            grad_scale: what a gradient scaler multiplied the LOSS by; the gradients themselves have to be unscaled.
            closure: returns the loss on the same batch; for adaptive damping.

        Raises:
            RuntimeError: no statistics were accumulated on a factor step, or replicas drifted apart.
            kfac_dist.comm.CommunicationError: a collective failed; the message names the phase.
        """
        self._world.traffic.clear()
        values: dict[str, float | Tensor] = {}
        with torch.no_grad():
            if self.distribution.average_gradients:
                with self._timer("gradients"):
                    average_gradients([p for p in self.model.parameters() if p.requires_grad], self._world)
            if self._factors_due():
                with self._timer("factors"):
                    self._update_factors(grad_scale)
            damping = evaluate("damping", self.config.damping, self._step)
            if self._inverses_due():
                with self._timer("inverses"):
                    self._update_inverses(damping)
            with self._timer("precondition"):
                gradients = self._gradients()
                directions = self._exchange.precondition(gradients, self._states, damping)
            with self._timer("write"):
                values |= self._write(gradients, directions, lr)
        self._finish(values | {"damping": damping})

    # -- the stages of the step -----------------------------------------------------------------------------------

    def _factors_due(self) -> bool:
        never = all(state.updates == 0 for state in self._states.values())
        return never or self._step % self.config.factor_every_n_steps == 0

    def _inverses_due(self) -> bool:
        missing = any(state.updates and state.inverted is None for state in self._states.values())
        return missing or self._rebuild or self._step % self.config.inverse_every_n_steps == 0

    def _update_factors(self, grad_scale: float) -> None:
        """Sums and counts of all ranks -> this window's factors -> the moving average."""
        statistics = self._fisher.statistics
        if self.config.likelihood == "empirical":  # a sampled pass does not see the scaler
            statistics.rescale_outputs(grad_scale**-2)
        self._fisher.check_training_scale(grad_scale)
        gradient_norm = norm([p.grad for layer in self.layers for p in layer.parameters if p.grad is not None])
        health = Health(
            statistics=statistics.finite(),
            gradients=gradient_norm < float("inf"),
            fallbacks=self._own_fallbacks,
            checksums=(gradient_norm, norm([p for layer in self.layers for p in layer.parameters])),
        )
        reduced = reduce_statistics(self.layers, self._sides, statistics, health, self._world, self._dtype)
        self._own_fallbacks = 0
        self._counts["inverse_fallbacks"] += reduced.fallbacks
        self._counts["failed_ranks"] += reduced.failed_ranks
        if reduced.bad_gradient_ranks or (reduced.failed_ranks and not reduced.samples):
            self._counts["dropped_statistics"] += 1
            return
        check_replicas(reduced.checksums, self.distribution.average_gradients)
        if not reduced.samples:
            raise RuntimeError(
                "no rank accumulated a sample on this factor step: call kfac.accumulate() after every forward and "
                "before loss.backward(), with the model in training and gradients enabled"
            )
        self._counts["factor_updates"] += 1
        self._loss_scale = self._scale_of_loss(reduced)
        for name, factors in reduced.factors.items():
            self._states[name].update(factors, self.config.factor_decay)
        self._warn_of_silent_layers()

    def _scale_of_loss(self, reduced: Reduced) -> float:
        """c, where the training loss is c times the mean over samples of the negative log-likelihood."""
        reduction = self.config.loss_reduction
        if reduction == "mean":
            return 1.0
        if reduction == "sum":
            return reduced.samples / self._world.size
        if reduction == "mean_all":
            return reduced.samples / reduced.elements
        return float(reduction)

    def _update_inverses(self, damping: float) -> None:
        if not self._rebuild:
            self._counts["inverse_updates"] += 1
            for state in self._states.values():
                state.inverted = state.factors
        outcomes = self._inverses.refresh(self._states, damping, self._dtype)
        self._own_fallbacks += sum(bool(outcome) for outcome in outcomes)
        self._rebuild = False

    def _gradients(self) -> dict[str, Tensor]:
        """Layer -> gradient matrix in units of the mean loss, for the layers that can be preconditioned now."""
        gradients: dict[str, Tensor] = {}
        for layer in self.layers:
            gradient = layer.gradient() if self._states[layer.name].inverted is not None else None
            if gradient is not None:
                gradient = gradient.to(self._dtype)
                gradients[layer.name] = gradient if self._loss_scale == 1.0 else gradient / self._loss_scale
        return gradients

    def _write(
        self, gradients: Mapping[str, Tensor], directions: Mapping[str, Tensor], lr: float | Optimizer | None
    ) -> dict[str, float | Tensor]:
        """Clip, and overwrite ``param.grad``; returns the numbers for the metrics."""
        if not directions:
            return {}
        active = [layer for layer in self.layers if layer.name in directions]
        pairs = [(directions[layer.name], gradients[layer.name]) for layer in active]
        products = torch.stack([torch.sum(zeta * gradient) for zeta, gradient in pairs])
        values: dict[str, float | Tensor] = {"direction_dot_gradient": products.sum()}
        scale: Tensor | float = 1.0
        if self.config.kl_clip is not None:
            scale = kl_clip_scale(self.config.kl_clip, products, self._learning_rates(active, lr).to(products))
        for layer in active:
            zeta = directions[layer.name]
            layer.write_gradient(zeta if isinstance(scale, float) else zeta * scale)
        values["kl_clip_scale"] = scale
        values["grad_norm"] = torch.stack([gradient.norm() for _, gradient in pairs]).norm()
        values["direction_norm"] = torch.stack([zeta.norm() for zeta, _ in pairs]).norm() * scale
        return values

    def _learning_rates(self, layers: Sequence[Layer], lr: float | Optimizer | None) -> Tensor:
        if lr is None:
            self._warn_once("lr", "kl_clip is set but step() got no lr: the clip takes lr = 1; pass the optimizer")
            lr = 1.0
        if not isinstance(lr, Optimizer):
            return torch.full((len(layers),), float(lr))
        rates = {id(p): float(group["lr"]) for group in lr.param_groups for p in group["params"]}
        missing = [layer.name for layer in layers if id(layer.weight) not in rates]
        if missing:
            raise ValueError(f"the optimizer given as lr does not hold the weights of {', '.join(missing)}")
        return torch.tensor([rates[id(layer.weight)] for layer in layers])

    def _finish(self, values: dict[str, float | Tensor]) -> None:
        values |= {"step": self._step, "loss_scale": self._loss_scale, **self._counts}
        for phase, count in self._world.traffic.collectives.items():
            values[f"collectives/{phase}"] = count
            values[f"bytes/{phase}"] = self._world.traffic.payload_bytes[phase]
        self.metrics.replace(values, self._timer)
        self._timer = PhaseTimer(self._device)
        self._step += 1
        self._fisher.begin(self._factors_due())

    # -- warnings -------------------------------------------------------------------------------------------------

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            if self._world.rank == 0:
                warnings.warn(message, stacklevel=3)

    def _warn_of_silent_layers(self) -> None:
        silent = [name for name, state in self._states.items() if state.updates == 0]
        if silent:
            reentrant = any(name in self._fisher.capture.recomputed for name in silent)
            cause = (
                "they were only seen while a checkpointed forward was recomputed: use use_reentrant=False"
                if reentrant
                else "their hooks did not fire on the way to the logits (unused, called without __call__, or compiled "
                "before K-FAC was built)"
            )
            self._warn_once("silent", f"these layers keep their plain gradient: {', '.join(silent)}; {cause}")

    # -- for the user ---------------------------------------------------------------------------------------------

    def parameter_groups(self, lr: float, uncovered_lr: float, uncovered_momentum: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for the outer optimizer: what K-FAC covers, and the rest of the trainable parameters.

        Args:
            lr: rate of the covered parameters (1 in the learning-rate-free mode).
            uncovered_lr: rate of the others (norms, embeddings, skipped layers).
            uncovered_momentum: momentum of the others; the covered ones get none.
        """
        covered = [parameter for layer in self.layers for parameter in layer.parameters]
        known = {id(parameter) for parameter in covered}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        groups: list[dict[str, Any]] = [{"params": covered, "lr": lr, "momentum": 0.0}]
        if rest:
            groups.append({"params": rest, "lr": uncovered_lr, "momentum": uncovered_momentum})
        return groups

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, equal on every rank; no collective, and the same for every world size."""
        config = {
            field.name: value
            if isinstance(value := getattr(self.config, field.name), (int, float, str))
            else repr(value)
            for field in dataclasses.fields(self.config)
        }
        return {
            "version": STATE_VERSION,
            "step": self._step,
            "loss_scale": self._loss_scale,
            "counts": dict(self._counts),
            "config": config,
            "layers": {name: state.to_dict() for name, state in self._states.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; inverses are rebuilt at the next step, by whichever rank owns them now.

        Raises:
            ValueError: another version, other layers or other shapes; nothing is taken over then.
        """
        version = state.get("version")
        if version != STATE_VERSION:
            raise ValueError(f"K-FAC state of version {version!r}; this release reads version {STATE_VERSION}")
        saved, mine = set(state["layers"]), set(self._states)
        if saved != mine:
            raise ValueError(
                f"K-FAC state of other layers: only in the checkpoint {sorted(saved - mine)}, only in the model "
                f"{sorted(mine - saved)}; load it into the model it was saved from, with the same skip_layers"
            )
        states: dict[str, LayerState] = {}
        for layer in self.layers:
            shapes = {"A": (layer.groups, layer.input_dim, layer.input_dim)}
            if "G" in self._sides:
                shapes["G"] = (layer.groups, layer.output_dim, layer.output_dim)
            part = state["layers"][layer.name]
            states[layer.name] = layer_state_from_dict(layer.name, part, shapes, self._dtype, self._device)
        self._states = states
        self._step = int(state["step"])
        self._loss_scale = float(state["loss_scale"])
        self._counts |= {key: int(value) for key, value in state["counts"].items() if key in self._counts}
        self._rebuild = any(part.inverted is not None for part in states.values())
        self._fisher.begin(self._factors_due())

    def close(self) -> None:
        """Remove every hook and give back what was made; idempotent."""
        self._fisher.capture.close()
        self._world.close()


def _check_layers(model: nn.Module, layers: Sequence[Layer], refused: Mapping[str, str]) -> None:
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or "it trains no such module"
        raise ValueError(f"{type(model).__name__} has no layer that K-FAC can treat ({reasons}); check skip_layers")
    devices = {str(layer.device) for layer in layers}
    if len(devices) > 1:
        raise ValueError(f"the layers lie on several devices ({', '.join(sorted(devices))}); put the model on one")
