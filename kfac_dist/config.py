"""Frozen configurations, validated when they are built: value, bound and cure are in the message."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Schedule = float | Callable[[int], float]
"""A number, or a function of the step (0, 1, ..) that gives one."""


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def check_positive_int(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")


def check_number(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise ValueError unless ``value`` is a finite number in [low, high], or (low, high] with ``open_low``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (low < value if open_low else low <= value) or value > high:  # type: ignore[operator]
        bound = f"{'above' if open_low else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
        raise ValueError(f"{name}={value!r} must be a finite number {bound}")


def evaluate(name: str, schedule: Schedule, step: int) -> float:
    """The value of ``schedule`` at ``step``.

    Raises:
        ValueError: a callable returned a number that is not finite or not above 0.
    """
    if not callable(schedule):
        return float(schedule)
    value = schedule(step)
    value = value.item() if hasattr(value, "item") else value  # a scalar of torch or NumPy
    check_number(f"{name}({step})", value, 0.0, open_low=True)
    return float(value)


@dataclass(frozen=True, kw_only=True)
class DistributionConfig:
    """How the work is spread over the ranks (KAISA's grid, Pauloski et al. 2021).

    Attributes:
        strategy: "comm_opt" (every rank holds every inverse), "mem_opt" (one rank per layer holds them and sends the
            preconditioned gradient each step) or "hybrid" (the fraction below).
        gradient_worker_fraction: share of the ranks that hold a layer's inverses, in (0, 1]; it makes the strategy
            "hybrid". It is rounded to the nearest divisor of the world size.
        backend: "single", "torch", "mpi" or one of your own that is registered in ``kfac_dist.comm``; "auto" takes
            torch.distributed where it is initialised, else one process.
        coarse_backend: a channel of its own for the coarse level; None: the same as the fine level's.
        average_gradients: let ``step`` average ``param.grad`` over the ranks (without DDP).
        timeout: seconds until a collective on a group that we made gives up.
    """

    strategy: Literal["comm_opt", "mem_opt", "hybrid"] = "comm_opt"
    gradient_worker_fraction: float | None = None
    backend: str = "auto"
    coarse_backend: str | None = None
    average_gradients: bool = False
    timeout: float = 600.0

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, ("comm_opt", "mem_opt", "hybrid"))
        if self.strategy == "comm_opt" and self.gradient_worker_fraction is not None:
            object.__setattr__(self, "strategy", "hybrid")
        if (self.strategy == "hybrid") != (self.gradient_worker_fraction is not None):
            raise ValueError(
                f"strategy={self.strategy!r} with gradient_worker_fraction={self.gradient_worker_fraction!r}: "
                "the fraction goes with strategy='hybrid', and 'hybrid' needs it"
            )
        if self.gradient_worker_fraction is not None:
            check_number("gradient_worker_fraction", self.gradient_worker_fraction, 0.0, 1.0, open_low=True)
        for name, value in (("backend", self.backend), ("coarse_backend", self.coarse_backend or "single")):
            if not isinstance(value, str):  # which names there are, the registry of kfac_dist.comm knows
                raise ValueError(f"{name}={value!r} must be the name of a communication backend, such as 'torch'")
        check_number("timeout", self.timeout, 0.0, open_low=True)

    @classmethod
    def parse(cls, value: str | float | DistributionConfig) -> DistributionConfig:
        """A strategy's name, a gradient-worker fraction or a finished configuration.

        Raises:
            ValueError: an unknown name or a fraction outside (0, 1].
        """
        if isinstance(value, DistributionConfig):
            return value
        if isinstance(value, str):
            check_choice("distribution", value, ("comm_opt", "mem_opt"))
            return cls(strategy="comm_opt" if value == "comm_opt" else "mem_opt")
        check_number("distribution", value, 0.0, 1.0, open_low=True)
        return cls(strategy="hybrid", gradient_worker_fraction=float(value))


RATE_FREE_SPACES = ("layer_step_momentum", "scalar_momentum")
CORRECTIONS = ("error_minimizing", "additive", "deflated", "balanced")


@dataclass(frozen=True, kw_only=True)
class CoarseConfig:
    """The coarse level (Koroko et al. 2023; Tselepidis et al. 2020).

    Attributes:
        space: name of the coarse space.
        vectors_per_layer: k, for the spaces that take it.
        correction: "error_minimizing" (Koroko et al.: the smallest error in the F-norm over zeta + V beta), "additive"
            (Tselepidis et al.), "deflated" (A-DEF1) or "balanced" (BNN); None: "additive" for "tselepidis", whose
            operator is an approximation, else "error_minimizing".
        every_n_steps: steps between coarse solves. In between, spaces that contain zeta keep their coefficients and the
            others make one-level steps.
        max_samples: B_c, samples of the last curvature batch that are kept for the coarse level, over all ranks;
            "auto": max(64, 4 m) for "layer_step", "scalar" and both with momentum, max(256, 4 m) for the other spaces;
            None: all of them. Raw layer inputs and output gradients of these samples live until the next curvature
            batch.
        damping: lam_c, which takes the place of the fine damping everywhere in the coarse level; None: the fine
            damping; a number; a function of the step; "adaptive" (Levenberg-Marquardt, which needs the loss: a closure
            in plain loops); or "auto": adaptive where ``step`` gets a closure, else the fine damping, with a warning.
            "auto" is what the bare names of the learning-rate-free spaces stand for.
        initial_damping: where "adaptive" starts.
        variant: "largest" or "smallest" for "spectral"; "nicolaides" or "residual" for "krylov".
    """

    space: str = "layer_step"
    vectors_per_layer: int = 1
    correction: str | None = None
    every_n_steps: int = 1
    max_samples: int | Literal["auto"] | None = "auto"
    damping: Schedule | Literal["adaptive", "auto"] | None = None
    initial_damping: float = 1.0
    variant: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.space, str):
            raise ValueError(f"coarse space {self.space!r} must be a name")
        check_positive_int("vectors_per_layer", self.vectors_per_layer)
        if self.correction is None:
            object.__setattr__(self, "correction", "additive" if self.space == "tselepidis" else "error_minimizing")
        check_choice("correction", self.correction, CORRECTIONS)
        check_positive_int("coarse every_n_steps", self.every_n_steps)
        if self.max_samples not in (None, "auto"):
            check_positive_int("max_samples", self.max_samples)
        if isinstance(self.damping, str):
            check_choice("coarse damping", self.damping, ("adaptive", "auto"))
        elif self.damping is not None and not callable(self.damping):
            check_number("coarse damping", self.damping, 0.0, open_low=True)
        check_number("initial_damping", self.initial_damping, 0.0, open_low=True)

    @classmethod
    def parse(cls, value: str | CoarseConfig | None) -> CoarseConfig | None:
        """None, the name of a space, or a finished configuration.

        Raises:
            ValueError: something else.
        """
        if value is None or isinstance(value, CoarseConfig):
            return value
        if not isinstance(value, str):
            raise ValueError(f"coarse={value!r} must be None, the name of a coarse space or CoarseConfig(space=..)")
        return cls(space=value, damping="auto" if value in RATE_FREE_SPACES else None)

    def under_adaptive_damping(self) -> CoarseConfig:
        """The same beside a fine damping that follows the loss: "auto" is then the fine one.

        Raises:
            ValueError: "adaptive" was asked for here, too: one verdict cannot move two dampings.
        """
        if self.damping == "adaptive":
            raise ValueError(
                'damping="adaptive" with coarse damping="adaptive": the loss gives one verdict, which cannot move two '
                "dampings; leave one of them a number, or the coarse one None to follow the fine one"
            )
        return replace(self, damping=None) if self.damping == "auto" else self


def check_patterns(name: str, patterns: Sequence[object]) -> None:
    """Raise ValueError unless all ``patterns`` are regular expressions."""
    for pattern in patterns:
        try:
            re.compile(pattern)  # type: ignore[call-overload]
        except (re.error, TypeError) as error:
            raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Which modules are treated, and how their blocks are approximated.

    Attributes:
        skip_layers: regular expressions, searched in module names and class names: what they find is left alone.
        kfac_approx: what weight sharing is taken for, "expand" (every location is a sample of its own) or "reduce" (a
            sample's locations are averaged first); or pattern -> one of them, as in ``skip_layers``: the first pattern
            that is found decides, "expand" where there is none (Eschenhagen et al. 2023, arXiv 2311.00636).
        max_factor_dim: a factor of a larger order falls back to a block-diagonal or diagonal one.
        large_factors: "blocks" (as few as the bound allows) or "diagonal".
        norm_blocks: the Fisher block of a norm's scale and shift: "diagonal", "channel" (2 x 2, scale and shift of one
            channel together) or "full".
        uncovered: modules that no layer type treats keep their "plain" gradient, or get the "diagonal" of their Fisher
            block.
        factor_sides: "input" keeps no block that needs output gradients.
    """

    skip_layers: tuple[str, ...] = ()
    kfac_approx: str | Mapping[str, str] = "expand"
    max_factor_dim: int = 8192
    large_factors: Literal["blocks", "diagonal"] = "blocks"
    norm_blocks: Literal["diagonal", "channel", "full"] = "channel"
    uncovered: Literal["plain", "diagonal"] = "plain"
    factor_sides: Literal["both", "input"] = "both"

    def __post_init__(self) -> None:
        skip = self.skip_layers
        object.__setattr__(self, "skip_layers", (skip,) if isinstance(skip, str) else tuple(skip))
        check_patterns("skip_layers", self.skip_layers)
        if isinstance(self.kfac_approx, Mapping):
            object.__setattr__(self, "kfac_approx", dict(self.kfac_approx))
            check_patterns("kfac_approx", list(self.kfac_approx))
            for pattern, value in self.kfac_approx.items():
                check_choice(f"kfac_approx[{pattern!r}]", value, ("expand", "reduce"))
        else:
            check_choice("kfac_approx", self.kfac_approx, ("expand", "reduce"))
        check_positive_int("max_factor_dim", self.max_factor_dim)
        check_choice("large_factors", self.large_factors, ("blocks", "diagonal"))
        check_choice("norm_blocks", self.norm_blocks, ("diagonal", "channel", "full"))
        check_choice("uncovered", self.uncovered, ("plain", "diagonal"))
        check_choice("factor_sides", self.factor_sides, ("both", "input"))

    def skips(self, *names: str) -> bool:
        """Whether a module of these names is left alone."""
        return any(re.search(pattern, name) for pattern in self.skip_layers for name in names)

    def approximation(self, *names: str) -> str:
        """What the first pattern says that is found in one of ``names``."""
        if isinstance(self.kfac_approx, str):
            return self.kfac_approx
        found = (v for pattern, v in self.kfac_approx.items() if any(re.search(pattern, name) for name in names))
        return next(found, "expand")


@dataclass(frozen=True, kw_only=True)
class KFACConfig(LayerOptions):
    """Everything about the method that is not the model: see :class:`kfac_dist.KFACPreconditioner` for the meanings."""

    likelihood: str = "empirical"
    fisher_samples: int | Literal["exact"] = 1
    class_dim: int = 1
    damping: Schedule | Literal["adaptive"] = 0.01
    initial_damping: float = 1.0
    preconditioning: Literal["auto", "gradients", "samples"] = "auto"
    damping_method: Literal["factored", "eigen"] = "factored"
    factor_decay: float = 0.95
    factor_samples: float = 1.0
    factor_every_n_steps: int = 10
    inverse_every_n_steps: int = 100
    inverse_schedule: Literal["together", "staggered"] = "together"
    kl_clip: float | None = None
    loss_reduction: str | float = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fisher_samples != "exact":
            check_positive_int("fisher_samples", self.fisher_samples)
        if isinstance(self.class_dim, bool) or not isinstance(self.class_dim, int) or self.class_dim == 0:
            raise ValueError(f"class_dim={self.class_dim!r} must be an integer other than 0 (0 is the batch dimension)")
        if isinstance(self.damping, str):
            check_choice("damping", self.damping, ("adaptive",))
        elif not callable(self.damping):
            check_number("damping", self.damping, 0.0, open_low=True)
        check_number("initial_damping", self.initial_damping, 0.0, open_low=True)
        check_choice("preconditioning", self.preconditioning, ("auto", "gradients", "samples"))
        check_choice("damping_method", self.damping_method, ("factored", "eigen"))
        check_number("factor_decay", self.factor_decay, 0.0, 1.0)
        if self.factor_decay == 1:
            raise ValueError("factor_decay=1 would never forget the first batch; choose a number below 1, such as 0.95")
        check_number("factor_samples", self.factor_samples, 0.0, 1.0, open_low=True)
        check_positive_int("factor_every_n_steps", self.factor_every_n_steps)
        check_positive_int("inverse_every_n_steps", self.inverse_every_n_steps)
        check_choice("inverse_schedule", self.inverse_schedule, ("together", "staggered"))
        if self.kl_clip is not None:
            check_number("kl_clip", self.kl_clip, 0.0, open_low=True)
        if isinstance(self.loss_reduction, str):
            check_choice("loss_reduction", self.loss_reduction, ("mean", "sum", "mean_all"))
        else:
            check_number("loss_reduction", self.loss_reduction, 0.0, open_low=True)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r} must be an integer in [0, 2^63)")
