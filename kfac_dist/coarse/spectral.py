"""Eigenvectors of the layers' Kronecker blocks (Koroko et al. 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kfac_dist.coarse.base import CoarseSpace, FineLevel, Vector, coarse_spaces


@coarse_spaces.register("spectral")
class Spectral(CoarseSpace):
    """V_i = the k eigenvectors q_G (x) q_A of G (x) A with the largest products of eigenvalues; m = k L.

    Of a grouped convolution, over all its groups. The factors are the current, undamped averages.
    ``variant="smallest"`` takes the other end, as domain decomposition does; those modes carry no gradient here.
    """

    variants = ("largest", "smallest")
    variable_count = True
    needs_output_factor = True

    _seen: tuple[tuple[Any, ...], Mapping[str, Sequence[Vector]]] | None = None

    def vectors(self, fine: FineLevel) -> Mapping[str, Sequence[Vector]]:
        """See :meth:`CoarseSpace.vectors`."""
        key = (fine.factor_updates, tuple(fine.shapes))
        if self._seen is None or self._seen[0] != key:
            self._seen = (key, fine.leading_eigenvectors(self.count, largest=self.variant == "largest"))
        return self._seen[1]

    def forget(self) -> None:
        """See :meth:`CoarseSpace.forget`."""
        self._seen = None
