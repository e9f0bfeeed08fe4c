"""The corrected direction, kept in its parts until it is known how much of it will be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.basis import Basis


@dataclass
class Correction:
    """zeta_2 = base + V t, kept apart until the clip is known.

    Attributes:
        basis: the raw vectors V.
        coefficients: t (n, k), float64 on the device.
        base: what the prolonged coefficients are added to; None: nothing.
        solved: whether the coarse solve succeeded; otherwise this is the one-level direction.
        one_level: coefficients c with zeta = V c, where there is no base.
        directions: zeta, where the base is another vector.
    """

    basis: Basis
    coefficients: Tensor
    base: Mapping[str, Tensor] | None
    solved: bool
    one_level: Tensor | None = None
    directions: Mapping[str, Tensor] | None = None

    def products(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """<zeta_2, grad> per layer, (layers,), without forming zeta_2."""
        rows = self.basis.dots_by_layer(gradients)
        t = self.coefficients.expand(len(self.basis.names), -1) if self.basis.spans_network else self.coefficients
        result = (rows * t).sum(1)
        if self.base is not None:
            result = result + torch.stack([(self.base[n] * gradients[n]).sum().double() for n in self.basis.names])
        return result

    def one_level_products(self, gradients: Mapping[str, Tensor]) -> Tensor | None:
        """<zeta, grad> per layer, (layers,), where zeta is in the space and so known already; else None."""
        if self.one_level is None:
            return None
        rows = self.basis.dots_by_layer(gradients)
        return (rows * self.one_level.expand(len(self.basis.names), -1)).sum(1)

    def direction(self, corrected: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """``scale`` times zeta_2, or times zeta where ``corrected`` is False; both are scalars on the device."""
        fallback = torch.zeros_like(self.coefficients) if self.one_level is None else self.one_level
        t = torch.where(corrected, self.coefficients, fallback) * scale
        prolonged = self.basis.prolong(t)
        if self.base is None:
            return prolonged
        base = self.base
        if self.directions is not None:
            base = {name: torch.where(corrected, part, self.directions[name]) for name, part in base.items()}
        return {name: torch.addcmul(part, base[name], scale.to(part)) for name, part in prolonged.items()}
