"""What a Trainer must be for K-FAC: each refusal says what is in the way and how to get it out of there.

Strategies are known by the names of their classes, so that ``pytorch_lightning`` and ``lightning.pytorch``, whose
classes are not the same, are both served.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from kfac_dist.compat import clean_name
from kfac_dist.config import DistributionConfig
from kfac_dist.environment import detect_environment

# DeepSpeed's and XLA's strategies are subclasses of DDP's and of the single device's: refusals come first.
REFUSED_STRATEGIES = {
    "DeepSpeedStrategy": "it shards gradients and accumulates them by itself",
    "FSDPStrategy": "it shards the parameters",
    "ModelParallelStrategy": "it shards the parameters",
    "XLAStrategy": "hooks and gradient edges do not reach into XLA's traced graphs",
    "XLAFSDPStrategy": "it shards the parameters",
    "SingleDeviceXLAStrategy": "hooks and gradient edges do not reach into XLA's traced graphs",
}
SUPPORTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
SUPPORTED_PRECISIONS = ("32-true", "64-true", "bf16-true", "16-mixed", "bf16-mixed")
# They divide every component of the direction by its own running size, whatever K-FAC made of it.
ADAPTIVE_OPTIMIZERS = ("Adam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "SparseAdam", "Adafactor")


def _class_names(thing: object) -> list[str]:
    return [cls.__name__ for cls in type(thing).__mro__]


@contextmanager
def misconfigurations() -> Iterator[None]:
    """Turn a ValueError of the core, whose message holds value, bound and cure, into Lightning's exception."""
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


def check_strategy(trainer: pl.Trainer) -> None:
    """Raise MisconfigurationException unless every rank holds all parameters and their global gradients."""
    strategy = trainer.strategy
    names = _class_names(strategy)
    reason = next((REFUSED_STRATEGIES[name] for name in names if name in REFUSED_STRATEGIES), None)
    if reason is None and not set(names) & set(SUPPORTED_STRATEGIES):
        reason = "it is not known whether each rank holds all parameters and gradients there"
    cure = 'use Trainer(strategy="ddp"), or one device'
    if reason is not None:
        raise MisconfigurationException(
            f"KFAC supports the single-device and DDP strategies; got {names[0]}: {reason}; {cure}"
        )
    local_sgd = "PostLocalSGDState" in _class_names(getattr(strategy, "_ddp_comm_state", None))
    if local_sgd or getattr(strategy, "_model_averaging_period", None) is not None:
        raise MisconfigurationException(
            "KFAC needs gradients that are averaged over all ranks in every step; post-local SGD averages models now "
            "and then: leave out ddp_comm_state and model_averaging_period"
        )
    if getattr(strategy, "_ddp_kwargs", {}).get("static_graph") and trainer.accumulate_grad_batches > 1:
        rank_zero_warn(
            "DDPStrategy(static_graph=True) with accumulate_grad_batches > 1 fails inside DDP, with or without KFAC: "
            "leave out one of them"
        )


def is_ddp(trainer: pl.Trainer) -> bool:
    """Whether the Trainer wraps its module in DistributedDataParallel."""
    return "DDPStrategy" in _class_names(trainer.strategy)


def check_precision(trainer: pl.Trainer) -> None:
    """Raise MisconfigurationException for a precision in which K-FAC's directions cannot be told or held."""
    precision = trainer.precision
    if precision in SUPPORTED_PRECISIONS:
        return
    reason = "it is not known what it does to layers and gradients"
    if precision == "16-true":
        reason = "directions of parameters in float16 overflow and underflow"
    elif str(precision).startswith("transformer-engine"):
        reason = "it replaces the layers by some of its own, whose products are in float8"
    raise MisconfigurationException(
        f"KFAC does not run with precision={precision!r}: {reason}; use one of "
        + ", ".join(map(repr, SUPPORTED_PRECISIONS))
    )


def check_launcher(trainer: pl.Trainer, distribution: DistributionConfig) -> None:
    """Raise MisconfigurationException where a launcher started more processes than the Trainer connects."""
    with misconfigurations():
        launched = detect_environment(os.environ)
    if launched.size <= trainer.world_size or distribution.backend == "single":
        return
    raise MisconfigurationException(
        f"{launched.launcher} started {launched.size} processes, but this Trainer connects {trainer.world_size}: the "
        f'others would train apart from it. Use Trainer({launched.trainer_options}, strategy="ddp"); where each '
        'process is meant to train by itself, say so with KFAC(distribution=DistributionConfig(backend="single"))'
    )


def check_optimizers(trainer: pl.Trainer) -> Optimizer:
    """The one optimizer that applies the directions.

    Raises:
        MisconfigurationException: there is none or more than one, it calls its closure several times per step, or it
            unscales gradients by itself.
    """
    optimizers = trainer.optimizers
    if len(optimizers) != 1 or "_MockOptimizer" in _class_names(optimizers[0]):
        count = len(optimizers) if len(optimizers) != 1 else 0
        raise MisconfigurationException(
            f"KFAC works with one optimizer, and configure_optimizers() returned {count}: return one, such as "
            "torch.optim.SGD over all parameters (parameter groups may differ in their options)"
        )
    optimizer = optimizers[0]
    if "LBFGS" in _class_names(optimizer):
        raise MisconfigurationException(
            "KFAC does not work with LBFGS, which evaluates its closure several times per step and builds its own "
            "curvature: use torch.optim.SGD"
        )
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise MisconfigurationException(
            f"{type(optimizer).__name__}(fused=True) unscales float16 gradients by itself, after KFAC has seen them: "
            'leave out fused=True, or use precision="bf16-mixed"'
        )
    return optimizer


def warn_of_optimizer(optimizer: Optimizer) -> None:
    """Warn of an optimizer that undoes the preconditioning, and say what becomes of a weight decay."""
    names = _class_names(optimizer)
    if any(name in ADAPTIVE_OPTIMIZERS for name in names) or "betas" in optimizer.defaults:
        rank_zero_warn(
            f"{names[0]} rescales every component of KFAC's directions by its own statistics, which undoes much of the "
            "preconditioning: use torch.optim.SGD, with momentum if you like"
        )
    decay = max((group.get("weight_decay", 0.0) for group in optimizer.param_groups), default=0.0)
    if "SGD" in names and decay > 0:
        rank_zero_warn(
            f"{names[0]}(weight_decay={decay:g}) adds weight_decay * parameter to the DIRECTION, after KFAC has "
            "preconditioned the gradient and clipped it: the decay is not preconditioned, so it is decoupled from the "
            "curvature (with momentum it runs through the momentum buffer)"
        )


def modules_outside(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Names of the modules with trainable parameters of their own that ``optimizer`` does not hold."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [
        clean_name(name)
        for name, module in model.named_modules()
        if any(p is not None and p.requires_grad and id(p) not in held for p in module._parameters.values())
    ]
