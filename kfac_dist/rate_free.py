"""The learning-rate-free mode: the coarse level chooses step and momentum, the outer optimizer only subtracts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer


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
                "diverge. Build the optimizer from kfac.parameter_groups(lr=1.0, uncovered_lr=..)"
            )
        momentum = group.get("momentum", 0.0) or group.get("betas", (0.0,))[0]
        if own and (float(group["lr"]) != 1.0 or momentum):
            warnings.warn(
                f"coarse={space!r} chooses step sizes and momentum itself: use SGD(lr=1, momentum=0) for the covered "
                f"parameters (parameter group {number} has lr={group['lr']:g}, momentum={momentum:g}); a momentum on "
                "top of the chosen one works against it",
                stacklevel=4,
            )
