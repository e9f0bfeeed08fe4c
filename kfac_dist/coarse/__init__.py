"""Coarse spaces: one file each, registered by its import here. A new one is one new file and one line below."""

from kfac_dist.coarse import (  # noqa: F401 - imported for their registration
    krylov,
    layer_step,
    layer_step_residual,
    nicolaides,
    pcg,
    residual,
    spectral,
    spectral_bands,
    tselepidis,
)
from kfac_dist.coarse.base import CoarseSpace, FineLevel, RankOne, Vector, coarse_spaces, dense, inner

__all__ = ["CoarseSpace", "FineLevel", "RankOne", "Vector", "coarse_spaces", "dense", "inner"]
