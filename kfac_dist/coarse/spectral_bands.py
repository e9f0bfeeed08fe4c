"""zeta, cut into bands of K-FAC's own spectrum: a step size per layer and band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_dist.coarse.base import CoarseSpace, FineLevel, Vector, coarse_spaces
from kfac_dist.inverse import EigenPreconditioner


def energy_bands(zeta: Tensor, basis: EigenPreconditioner, damping: float, count: int) -> list[Tensor]:
    """Cut zeta into ``count`` parts, by eigenvalue, that share its energy zeta^T (T (G (x) A) + lam I) zeta equally.

    Args:
        zeta: (groups, g, a).
        basis: the eigendecompositions of both factors.
        damping: lam, the fine damping.
        count: number of bands; their sum is zeta.
    """
    groups, d_out, d_in = zeta.shape
    coefficients = basis.rotate(zeta)
    values_a, values_g = basis.values(groups)
    spectrum = basis.locations * values_g * values_a + damping
    energy = (coefficients.double().square() * spectrum.double()).flatten()
    order = spectrum.flatten().argsort(descending=True, stable=True)
    cumulative = energy[order].cumsum(0)
    total = cumulative[-1].clamp_min(torch.finfo(torch.float64).tiny)
    # The middle of an entry's share decides, so that rounding at the ends cannot make an extra band.
    band_of_sorted = ((cumulative - 0.5 * energy[order]) / total * count).long().clamp(0, count - 1)
    band = torch.empty_like(band_of_sorted)
    band[order] = band_of_sorted
    band = band.view_as(coefficients)
    return [basis.unrotate(coefficients * (band == j), d_out, d_in) for j in range(count)]


@coarse_spaces.register("spectral_bands")
class SpectralBands(CoarseSpace):
    """V_ij = the part of zeta_i in the j-th of k bands of equal energy; m = k L."""

    variable_count = True
    uses_eigenbases = True
    needs_output_factor = True

    def vectors(self, fine: FineLevel) -> Mapping[str, Sequence[Vector]]:
        """See :meth:`CoarseSpace.vectors`."""
        zeta = fine.directions

        def make(name: str, basis: EigenPreconditioner, damping: float) -> Sequence[Tensor]:
            return energy_bands(zeta[name], basis, damping, self.count)

        return fine.where_held(make, self.count)

    def direction_coefficients(self, count: int) -> tuple[float, ...]:
        """See :meth:`CoarseSpace.direction_coefficients`."""
        return (1.0,) * count
