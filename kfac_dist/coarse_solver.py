"""The coarse solve, in float64 on one rank: Jacobi-scaled Cholesky, and a pseudo-inverse where that is not safe."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

MAX_CONDITION = 1e12


class Status(IntEnum):
    """What became of a coarse solve; anything but SOLVED and PSEUDO means a one-level step."""

    SOLVED = 0
    PSEUDO = 1
    FAILED = 2


@dataclass(frozen=True)
class CoarseOperator:
    """A factorised E: solve many right-hand sides with one factorisation.

    Attributes:
        matrix: (m, m) float64, symmetrised.
        status: how the factorisation went.
        condition: of the scaled matrix over its kept columns, in the 1-norm (in the 2-norm for PSEUDO).
        inverse: (m, m); zero on dropped columns.
    """

    matrix: Tensor
    status: Status
    condition: float
    inverse: Tensor

    def solve(self, rhs: Tensor) -> tuple[Status, Tensor]:
        """E^-1 rhs (m,), and whether it can be used: a result that is not finite becomes zero and FAILED."""
        beta = self.inverse @ rhs
        if self.status == Status.FAILED or not bool(torch.isfinite(beta).all()):
            return Status.FAILED, torch.zeros_like(rhs)
        return self.status, beta


@dataclass(frozen=True)
class CoarseSystem:
    """The Galerkin operator of the last solve, to look at.

    Attributes:
        blocks: names of the layers, or "network" where every vector spans all of them.
        count: vectors per block.
        matrix: (m, m) float64 on the host, m = blocks * count: E over orthonormal vectors, block after block.
    """

    blocks: tuple[str, ...]
    count: int
    matrix: Tensor

    def couplings(self) -> Tensor:
        """E_ij / sqrt(E_ii E_jj), (m, m): the cosines between the vectors in the metric of F_l; 0 for dropped ones."""
        diagonal = self.matrix.diagonal()
        scale = torch.where(diagonal > 0, diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny).rsqrt(), 0.0 * diagonal)
        return self.matrix * scale[:, None] * scale[None, :]

    def interactions(self) -> tuple[list[str], Tensor]:
        """The couplings with all first vectors before all second ones, and whose vector each row is.

        So each square is the interaction of the layers through one pair of vectors.
        """
        blocks = len(self.blocks)
        order = [i * self.count + j for j in range(self.count) for i in range(blocks)]
        return list(self.blocks) * self.count, self.couplings()[order][:, order]


def factorise(E: Tensor) -> CoarseOperator:
    """Factorise the Galerkin operator.

    Columns with a zero diagonal (dropped from the basis) get a zero solution. The rest is scaled to a unit diagonal,
    D^-1/2 E D^-1/2, and factorised by Cholesky; where that fails or the condition is above 1e12, by eigenvalues, those
    below 1e-12 of the largest being left out (the guarantee then holds on the kept subspace).

    Args:
        E: (m, m), float64.
    """
    symmetric = 0.5 * (E + E.mT)
    zero = torch.zeros_like(symmetric)
    if not bool(torch.isfinite(symmetric).all()):
        return CoarseOperator(zero, Status.FAILED, float("inf"), zero)
    diagonal = symmetric.diagonal()
    kept = diagonal > 0
    if not bool(kept.any()):
        return CoarseOperator(symmetric, Status.SOLVED, 1.0, zero)
    scale = torch.where(kept, diagonal.clamp_min(torch.finfo(E.dtype).tiny).rsqrt(), torch.zeros_like(diagonal))
    index = kept.nonzero()[:, 0]
    scaled = (symmetric * scale[:, None] * scale[None, :])[index][:, index]
    factor, info = torch.linalg.cholesky_ex(scaled)
    inverse, condition, status = zero, float("inf"), Status.SOLVED
    if not int(info):
        inverse = torch.cholesky_inverse(factor)
        # Of the norms, not of the pivots: those of a singular matrix can be as large as 1e-6.
        condition = float(torch.linalg.matrix_norm(scaled, 1) * torch.linalg.matrix_norm(inverse, 1))
    if not condition <= MAX_CONDITION:
        try:
            values, vectors = torch.linalg.eigh(scaled)
        except RuntimeError:  # LinAlgError is one
            return CoarseOperator(symmetric, Status.FAILED, float("inf"), zero)
        largest = values.max()
        good = values > 1e-12 * largest
        inverse = (vectors[:, good] / values[good]) @ vectors[:, good].mT
        condition = float(largest / values[good].min())
        status = Status.PSEUDO
    full = zero.clone()
    full[index[:, None], index[None, :]] = inverse
    return CoarseOperator(symmetric, status, condition, full * scale[:, None] * scale[None, :])
