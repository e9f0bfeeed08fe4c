"""The preconditioned residual of every layer (Koroko et al. 2023, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kfac_dist.coarse.base import CoarseSpace, FineLevel, Vector, coarse_spaces


@coarse_spaces.register("residual")
class Residual(CoarseSpace):
    """V_i = (M^-1 (grad - F_l zeta))_i; m = L. One F v: an all-reduce of the parameters' size."""

    def vectors(self, fine: FineLevel) -> Mapping[str, Sequence[Vector]]:
        """See :meth:`CoarseSpace.vectors`."""
        return {name: [v] for name, v in fine.precondition(fine.residual()).items()}
