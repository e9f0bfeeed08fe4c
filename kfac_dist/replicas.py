"""Replicas under data parallelism without DDP: averaging gradients, and noticing when replicas drift apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfac_dist.comm import Communicator
from kfac_dist.fused import FusedBuffer

DRIFT_TOLERANCE = 1e-4


def average_gradients(parameters: Sequence[nn.Parameter], communicator: Communicator) -> None:
    """``param.grad`` <- the mean over the ranks, in one fused all-reduce; a missing gradient counts as zero.

    A parameter that has no gradient on any rank keeps none. Words: parameters, and one flag for each of them.
    """
    if communicator.size == 1 or not parameters:
        return
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    sizes: dict[object, int] = {"present": len(parameters)}
    sizes.update({index: parameter.numel() for index, parameter in enumerate(parameters)})
    buffer = FusedBuffer(sizes, dtype, parameters[0].device)
    present = torch.tensor([float(parameter.grad is not None) for parameter in parameters], dtype=dtype)
    buffer["present"].copy_(present)
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None:
            buffer[index].copy_(parameter.grad.reshape(-1))
    communicator.all_reduce(buffer.flat, phase="gradients")
    anywhere = buffer["present"].tolist()
    for index, parameter in enumerate(parameters):
        if anywhere[index] > 0:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.copy_((buffer[index] / communicator.size).view_as(parameter))


def norm(tensors: Sequence[Tensor]) -> float:
    """The 2-norm of all of them together, as a float (one synchronisation); 0 for none."""
    if not tensors:
        return 0.0
    return float(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).norm())


def check_replicas(checksums: Sequence[tuple[float, float]], gradients_averaged: bool) -> None:
    """Compare the norms of the gradients and of the parameters between ranks.

    Raises:
        RuntimeError: on every rank alike, where one of them differs by more than a relative 1e-4.
    """
    cures = (
        "wrap the model in DistributedDataParallel, or let K-FAC average the gradients with "
        "distribution=DistributionConfig(average_gradients=True)",
        "start all ranks from the same parameters (broadcast rank 0's, or seed alike) and train them alike",
    )
    for what, values, cure in zip(("gradients", "parameters"), zip(*checksums, strict=True), cures, strict=True):
        if what == "gradients" and gradients_averaged:
            continue
        low, high = min(values), max(values)
        if math.isfinite(high) and high - low > DRIFT_TOLERANCE * max(abs(high), abs(low)):
            norms = ", ".join(f"rank {rank}: {value:.6g}" for rank, value in enumerate(values))
            raise RuntimeError(f"the {what} differ between the ranks (their norms: {norms}): {cure}")
