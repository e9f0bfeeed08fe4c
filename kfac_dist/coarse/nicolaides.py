"""Constant vectors (Nicolaides 1987; Koroko et al. 2023, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kfac_dist.coarse.base import CoarseSpace, FineLevel, Vector, coarse_spaces, constant_vector


@coarse_spaces.register("nicolaides")
class Nicolaides(CoarseSpace):
    """V_i = 1 / sqrt(p_i), m = L.

    For a softmax output layer the constant lies in the kernel of F exactly (its output gradients sum to zero): that
    coarse vector does nothing.
    """

    def vectors(self, fine: FineLevel) -> Mapping[str, Sequence[Vector]]:
        """See :meth:`CoarseSpace.vectors`."""
        return {name: [constant_vector(shape, fine.gradients[name])] for name, shape in fine.shapes.items()}
