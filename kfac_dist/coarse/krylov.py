"""Krylov vectors of the fine level's preconditioner (Koroko et al. 2023, section 3.4: K-Nicolaides, K-residual)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kfac_dist.coarse.base import CoarseSpace, FineLevel, Vector, coarse_spaces, constant_vector


@coarse_spaces.register("krylov")
class Krylov(CoarseSpace):
    """V_i = [v, M^-1 v, .., M^-(k-1) v]_i; m = k L.

    ``variant`` gives v: the constant vector ("nicolaides") or M^-1 (grad - F_l zeta) ("residual", which takes one F v:
    an all-reduce of the parameters' size).
    """

    variants = ("nicolaides", "residual")
    variable_count = True

    def vectors(self, fine: FineLevel) -> Mapping[str, Sequence[Vector]]:
        """See :meth:`CoarseSpace.vectors`."""
        seed: Mapping[str, Tensor]
        if self.variant == "residual":
            seed = fine.precondition(fine.residual())
        else:
            seed = {name: constant_vector(shape, fine.gradients[name]).dense() for name, shape in fine.shapes.items()}
        powers = [seed]
        for _ in range(self.count - 1):
            powers.append(fine.precondition(powers[-1]))
        return {name: [power[name] for power in powers] for name in seed}
