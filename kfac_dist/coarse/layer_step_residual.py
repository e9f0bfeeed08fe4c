"""zeta and the preconditioned residual of every layer: two steps of block-PCG, with step sizes per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kfac_dist.coarse.base import FineLevel, StepSpace, Vector, coarse_spaces


@coarse_spaces.register("layer_step_residual")
class LayerStepResidual(StepSpace):
    """V_i = [zeta_i, (M^-1 r)_i], r = grad - F_l zeta; m = 2 L. One F v: an all-reduce of the parameters' size."""

    fixed_count = 2

    def vectors(self, fine: FineLevel) -> Mapping[str, Sequence[Vector]]:
        """See :meth:`CoarseSpace.vectors`."""
        corrections = fine.precondition(fine.residual())
        return {name: [zeta, corrections[name]] for name, zeta in fine.directions.items()}
