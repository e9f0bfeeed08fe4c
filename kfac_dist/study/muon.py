"""Muon in the parameters' own precision: torch.optim.Muon orthogonalises in bfloat16, which CPUs emulate slowly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def orthogonalise(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The Newton-Schulz iteration of Muon (Jordan et al. 2024), X <- a X + (b X X^T + c (X X^T)^2) X.

    Args:
        matrix: (m, n), of any size: it is divided by its Frobenius norm first.
        coefficients: a, b and c of the quintic.
        steps: how often it is applied.
        eps: least norm to divide by.

    Returns:
        (m, n) in the precision of ``matrix``: its singular vectors with singular values near 1.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]  # the products are formed on the shorter side
    X = matrix.mT if tall else matrix
    X = X / X.norm().clamp_min(eps)
    for _ in range(steps):
        S = X @ X.mT
        X = torch.addmm(X, torch.addmm(S, S, S, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


class FullPrecisionMuon(torch.optim.Muon):
    """torch.optim.Muon whose Newton-Schulz iteration runs in the precision of the parameters; for matrices only.

    It takes the arguments of ``torch.optim.Muon``, with ``adjust_lr_fn`` "original" or None.

    Raises:
        ValueError: another ``adjust_lr_fn``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.defaults["adjust_lr_fn"] not in (None, "original"):
            raise ValueError(f"adjust_lr_fn={self.defaults['adjust_lr_fn']!r}: only 'original' is offered here")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as torch.optim.Muon makes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"]) if group["nesterov"] else mean
                update = orthogonalise(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))
        return loss
