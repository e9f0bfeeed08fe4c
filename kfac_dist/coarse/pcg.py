"""The Krylov vectors of preconditioned conjugate gradients, split per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kfac_dist.coarse.base import FineLevel, StepSpace, Vector, coarse_spaces


@coarse_spaces.register("pcg")
class Pcg(StepSpace):
    """V_i = [zeta, (M^-1 F_l) zeta, .., (M^-1 F_l)^(k-1) zeta]_i; m = k L.

    k - 1 products F v: as many all-reduces of the parameters' size. k = 2 spans the space of "layer_step_residual".
    """

    variable_count = True

    def vectors(self, fine: FineLevel) -> Mapping[str, Sequence[Vector]]:
        """See :meth:`CoarseSpace.vectors`."""
        powers: list[Mapping[str, Tensor]] = [fine.directions]
        for _ in range(self.count - 1):
            powers.append(fine.precondition(fine.product(powers[-1])))
        return {name: [power[name] for power in powers] for name in fine.directions}
