"""Restriction to a coarse space: bases, the Galerkin operator and the restricted residual.

Shapes: a basis has n blocks (the layers; or one block, the network) of k columns each, so m = n k. Raw columns V (p, m)
are kept as they come; C (n, k, k) turns each block into an orthonormal one, R_0 = (V C)^T. A column that depends on the
ones before it, or is zero, has a zero column in C: it drops out, and m keeps its nominal value.

    Y = R_0 U (m, columns)     U: gradients of single samples, one column per sample and draw, never formed
    E = Y Y^T / B + lam_c R_0 R_0^T             the Galerkin operator R_0 F_l R_0^T
    R_0 F v = Y w / B with w = U^T v
(Koroko et al. 2023, section 3; Tselepidis et al. 2020, section 3.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal_coefficients(gram: Tensor, eps: float) -> Tensor:
    """C such that C^T gram C is the identity on the independent columns and zero on the others, block by block.

    Gram-Schmidt in the coefficients, twice for each column: it gives every rank the same signs, which an
    eigendecomposition would not promise.

    Args:
        gram: (n, k, k) float64, V^T V of each block.
        eps: the accuracy of the columns' type; a column whose remainder is below max(1e-7, 4 sqrt(eps)) of its length
            is dropped.

    Returns:
        (n, k, k) float64.
    """
    n, k, _ = gram.shape
    # Unit columns first, so that the tolerance is relative to each column's own length.
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    inverse = torch.where(lengths > 0, 1.0 / lengths, torch.zeros_like(lengths))
    inverse = torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))
    unit = gram * inverse[:, :, None] * inverse[:, None, :]
    tolerance = max(1e-7, 4.0 * eps**0.5)
    coefficients = torch.zeros_like(gram)
    for j in range(k):
        column = torch.zeros(n, k, dtype=gram.dtype, device=gram.device)
        column[:, j] = (inverse[:, j] > 0).to(gram.dtype)
        for _ in range(2):
            overlaps = torch.einsum("nab,na,nbc->nc", unit, column, coefficients)
            column = column - torch.einsum("nac,nc->na", coefficients, overlaps)
        remainder = torch.einsum("na,nab,nb->n", column, unit, column).clamp_min(0.0).sqrt()
        kept = remainder > tolerance
        scale = torch.where(kept, 1.0 / remainder.clamp_min(torch.finfo(gram.dtype).tiny), torch.zeros_like(remainder))
        coefficients[:, :, j] = column * scale[:, None]
    return coefficients * inverse[:, :, None]


def block_diagonal(blocks: Tensor) -> Tensor:
    """(n, k, k) as one (n k, n k) matrix."""
    dense: Tensor = torch.block_diag(*blocks.unbind())
    return dense
