"""The learning-rate-free mode: the coarse level chooses step and momentum, the outer optimizer only subtracts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, Optimizer

from kfac_dist.compat import unwrap
from kfac_dist.config import LayerOptions, check_number
from kfac_dist.layers import covered_parameters, find_layers


def parameter_groups(
    model: nn.Module,
    lr: float,
    uncovered_lr: float,
    uncovered_momentum: float = 0.0,
    skip_layers: Sequence[str] = (),
    uncovered: Literal["plain", "diagonal"] = "plain",
    factor_sides: Literal["both", "input"] = "both",
) -> list[dict[str, Any]]:
    """Parameter groups for the outer optimizer: what K-FAC covers, and the rest of the trainable parameters.

    Args:
        model: the model, plain or wrapped.
        lr: rate of the covered parameters (1 in the learning-rate-free mode).
        uncovered_lr: rate of the others (skipped layers, modules that no layer type treats).
        uncovered_momentum: momentum of the others; the covered ones get none.
        skip_layers: the same as the preconditioner's.
        uncovered: the same as the preconditioner's.
        factor_sides: the same as the preconditioner's.
    """
    plain = unwrap(model)
    options = LayerOptions(skip_layers=skip_layers, uncovered=uncovered, factor_sides=factor_sides)  # type: ignore[arg-type]
    covered = covered_parameters(find_layers(plain, options).layers)
    known = {id(parameter) for parameter in covered}
    rest = [p for p in plain.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [{"params": covered, "lr": lr, "momentum": 0.0}]
    if rest:
        groups.append({"params": rest, "lr": uncovered_lr, "momentum": uncovered_momentum})
    return groups


def rate_free_optimizer(
    model: nn.Module, uncovered_lr: float = 0.01, uncovered_momentum: float = 0.9, **layer_options: Any
) -> SGD:
    """The outer optimizer of the learning-rate-free mode; in a LightningModule, what ``configure_optimizers`` returns.

    What K-FAC covers gets lr = 1 and no momentum, as the coarse level chooses both; the rest is trained by plain SGD.

    Args:
        model: the model, plain or wrapped.
        uncovered_lr: rate of the parameters that K-FAC does not cover.
        uncovered_momentum: their momentum.
        **layer_options: ``skip_layers``, ``uncovered`` and ``factor_sides``, the same as the preconditioner's.

    Raises:
        ValueError: a rate that is no number above 0, or a momentum outside [0, 1).
    """
    check_number("uncovered_lr", uncovered_lr, 0.0, open_low=True)
    check_number("uncovered_momentum", uncovered_momentum, 0.0, 1.0)
    return SGD(parameter_groups(model, 1.0, uncovered_lr, uncovered_momentum, **layer_options), lr=1.0)


def check_rate_free(optimizer: Optimizer, covered: Sequence[nn.Parameter], space: str) -> None:
    """Check the outer optimizer of a coarse space that has a momentum of its own.

    Args:
        optimizer: the outer optimizer.
        covered: the parameters that K-FAC covers.
        space: the coarse space, for the message.

    Raises:
        ValueError: a trainable parameter that K-FAC does not cover would be trained with lr = 1.
    """
    known = {id(parameter) for parameter in covered}
    for number, group in enumerate(optimizer.param_groups):
        foreign = [p for p in group["params"] if p.requires_grad and id(p) not in known]
        own = [p for p in group["params"] if id(p) in known]
        if foreign and float(group["lr"]) == 1.0:
            shapes = ", ".join(str(tuple(p.shape)) for p in foreign[:5])
            raise ValueError(
                f"coarse={space!r} chooses the step itself and wants lr=1, but parameter group {number} also holds "
                f"{len(foreign)} parameters that K-FAC does not cover (shapes {shapes}, ..): plain gradients at lr=1 "
                "diverge. Build the optimizer by kfac_dist.rate_free_optimizer(model, uncovered_lr=..) or "
                "kfac_dist.parameter_groups(model, lr=1.0, uncovered_lr=..)"
            )
        momentum = group.get("momentum", 0.0) or group.get("betas", (0.0,))[0]
        if own and (float(group["lr"]) != 1.0 or momentum):
            warnings.warn(
                f"coarse={space!r} chooses step sizes and momentum itself: use SGD(lr=1, momentum=0) for the covered "
                f"parameters (parameter group {number} has lr={group['lr']:g}, momentum={momentum:g}); a momentum on "
                "top of the chosen one works against it",
                stacklevel=4,
            )
