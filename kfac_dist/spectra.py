"""The eigenvalues that K-FAC sees of every layer, and how far the damping changes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.factors import FactorShape
from kfac_dist.fused import packed_diagonal, unpack_symmetric
from kfac_dist.inverse import EigenDecomposition, pi_correction
from kfac_dist.layers import Layer
from kfac_dist.state import LayerState


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of one layer's block T (G (x) A), in its factors; everything is on the host.

    Attributes:
        A: (groups, a) float64, the eigenvalues of the input factor, ascending; none is negative.
        G: (groups, g), of the output factor; None where the block is A alone.
        locations: T.
        damping: lambda.
        pi: (groups,), of the factored damping; None with the exact one.
    """

    A: Tensor
    G: Tensor | None
    locations: float
    damping: float
    pi: Tensor | None

    def range(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue of the block without damping."""
        return self._extremes(0.0)

    def damped_range(self) -> tuple[float, float]:
        """The same with the damping."""
        return self._extremes(self.damping)

    @property
    def condition(self) -> float:
        """Of the damped block: 1 where the direction is a multiple of the gradient."""
        low, high = self.damped_range()
        return high / low

    def shift(self, side: str) -> float | None:
        """What the damping adds to the eigenvalues of one factor, at most; None where it is added to products."""
        if self.G is None:
            return self.damping if side == "A" else None
        if self.pi is None:
            return None
        size = (self.damping / self.locations) ** 0.5
        return float((size * self.pi if side == "A" else size / self.pi).max())

    def _extremes(self, damping: float) -> tuple[float, float]:
        low, high = (self._block(self.A[:, end], damping, end) for end in (0, -1))
        return float(low.min()), float(high.max())

    def _block(self, A: Tensor, damping: float, end: int) -> Tensor:
        if self.G is None:
            return A + damping
        G = self.G[:, end]
        if self.pi is None:
            return self.locations * A * G + damping
        shift: float = (damping / self.locations) ** 0.5
        return self.locations * (A + shift * self.pi) * (G + shift / self.pi)


def spectra(
    layers: Sequence[Layer], states: Mapping[str, LayerState], damping: float, *, factored: bool
) -> dict[str, Spectrum]:
    """Layer -> its spectrum, of the factors that were last inverted; layers without one are left out.

    Args:
        layers: the layers.
        states: their factors and inverses; nothing is changed in them.
        damping: lambda.
        factored: the form of damping.
    """
    found = {}
    for layer in layers:
        state = states[layer.name]
        factors = state.inverted
        if factors is None:
            continue
        try:
            values = {
                side: _eigenvalues(factor, state.inverses.get(side), layer.factors[side])  # type: ignore[index]
                for side, factor in factors.sides().items()
            }
        except torch.linalg.LinAlgError:  # it did not converge: nothing to look at this time
            continue
        if not all(bool(value.isfinite().all()) for value in values.values()):
            continue
        pi = None
        if factored and factors.G is not None:
            means = [layer.factors[side].mean_diagonal(packed_diagonal(f)) for side, f in factors.sides().items()]  # type: ignore[index]
            pi = pi_correction(*means).double().cpu()
        found[layer.name] = Spectrum(values["A"], values.get("G"), factors.locations, damping, pi)
    return found


def _eigenvalues(factor: Tensor, held: object, shape: FactorShape) -> Tensor:
    """(groups, dim), ascending."""
    if isinstance(held, EigenDecomposition):
        values = held.values
    elif shape.size == 1:
        values = factor
    else:
        values = _eigvalsh(unpack_symmetric(factor))
    values = values.double().cpu().clamp_min(0.0).view(shape.groups, shape.blocks, shape.size).sort(-1).values
    # Where the last block ends in zeros, they are its smallest eigenvalues.
    padding = shape.blocks * shape.size - shape.dim
    parts = [values[:, :-1].flatten(1), values[:, -1, padding:]]
    return torch.cat(parts, dim=1).sort(-1).values


def _eigvalsh(factor: Tensor) -> Tensor:
    """In the factor's type, which can overflow where many inputs are always zero, else in float64."""
    values: Tensor = torch.linalg.eigvalsh(factor)
    if not bool(values.isfinite().all()):
        values = torch.linalg.eigvalsh(factor.double())
    return values
