"""Damped inverses of the Kronecker factors and how they precondition a gradient.

Shapes: factors A (groups, a, a) and G (groups, g, g), symmetric positive semi-definite; a gradient X and a direction
(groups, g, a), whose row-major flattening makes the layer's Fisher block T (G (x) A); T locations per sample. A factor
that is block diagonal itself comes as (groups * blocks, size, size), padded with zeros (:mod:`kfac_dist.factors`).

"eigen":    (T (G (x) A) + lam I)^-1, exactly, in the factors' eigenbases.
"factored": T (G + s/pi I) (x) (A + s pi I), s = sqrt(lam / T), pi^2 = (tr A / a) / (tr G / g)
            (Martens and Grosse 2015, section 6.3; note lam / T, which is lam for a linear layer).

Factorisations read the upper triangle of a factor and its diagonal: below it may stand anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Solved = TypeVar("Solved")


class Outcome(IntEnum):
    """How a factorisation came about, from best to worst."""

    NATIVE = 0
    FLOAT64 = 1
    JITTER = 2
    LAST_GOOD = 3
    IDENTITY = 4


@dataclass(frozen=True)
class DenseInverse:
    """(factor + shift I)^-1, (groups, d, d)."""

    matrix: Tensor


@dataclass(frozen=True)
class EigenDecomposition:
    """factor = vectors diag(values) vectors^T; vectors (groups, d, d), values (groups, d), none of them negative."""

    vectors: Tensor
    values: Tensor


FactorInverse = DenseInverse | EigenDecomposition


def pi_correction(mean_a: Tensor, mean_g: Tensor) -> Tensor:
    """The factor pi (groups,): sqrt((tr A / a) / (tr G / g)), of the two mean diagonals (groups,).

    It is 1 where that is no finite number above 0.
    """
    pi = (mean_a / mean_g).sqrt()
    usable = (mean_a > 0) & (mean_g > 0) & torch.isfinite(pi) & (pi > 0)
    return torch.where(usable, pi, torch.ones_like(pi))


def times_right(X: Tensor, M: Tensor) -> Tensor:
    """X M: (groups, r, d) by block-diagonal matrices (groups * blocks, s, s); (groups, r, blocks * s), d padded."""
    groups, rows, dim = X.shape
    count, size, _ = M.shape
    if count == groups:
        return _product(X, M)
    blocks = count // groups
    if size == 1:
        return X * M.view(groups, 1, blocks)
    if dim < blocks * size:
        X = F.pad(X, (0, blocks * size - dim))
    cut = X.view(groups, rows, blocks, size).transpose(1, 2).reshape(count, rows, size)
    return (cut @ M).view(groups, blocks, rows, size).transpose(1, 2).reshape(groups, rows, blocks * size)


def times_left(M: Tensor, X: Tensor) -> Tensor:
    """M X: the same from the other side, (groups, blocks * s, c)."""
    return _product(M, X) if M.shape[0] == X.shape[0] else times_right(X.mT, M.mT).mT


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Left right, with every row of the result at the begin of a cache line where there is one group.

    Products whose rows begin anywhere take up to a quarter longer: 785 or 1001 columns are common, of a bias.
    """
    groups, rows, columns = len(left), left.shape[1], right.shape[2]
    if groups > 1 or columns % 16 == 0:
        return left @ right
    out = left.new_empty(rows, -(-columns // 16) * 16)[:, :columns]
    return torch.mm(left[0], right[0], out=out)[None]


def _cholesky_inverse(matrices: Tensor) -> Tensor | None:
    if matrices.shape[-1] == 1:
        return matrices.reciprocal() if bool(((matrices > 0) & torch.isfinite(matrices)).all()) else None
    factor, info = torch.linalg.cholesky_ex(matrices.mT)
    if bool(info.any()):
        return None
    inverse = torch.cholesky_inverse(factor)
    # It is C^T C, so where its diagonal is finite no entry is larger than that.
    return inverse if bool(torch.isfinite(inverse.diagonal(dim1=-2, dim2=-1)).all()) else None


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor] | None:
    if matrices.shape[-1] == 1:
        values, vectors = matrices[..., 0], torch.ones_like(matrices)
    else:
        values, vectors = torch.linalg.eigh(matrices.mT)
    if not bool(torch.isfinite(values).all() & torch.isfinite(vectors).all()):
        return None
    return values.clamp_min(0.0), vectors


def _jittered(matrices: Tensor) -> Tensor:
    double = matrices.double()
    size = double.diagonal(dim1=-2, dim2=-1).abs().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return add_to_diagonal(double, 1e-6 * size)


# The matrix as it is, in float64, and in float64 with 1e-6 of its mean diagonal added.
_ATTEMPTS: tuple[tuple[Outcome, Callable[[Tensor], Tensor]], ...] = (
    (Outcome.NATIVE, lambda matrices: matrices),
    (Outcome.FLOAT64, lambda matrices: matrices.double()),
    (Outcome.JITTER, _jittered),
)


def _first_success(matrices: Tensor, solve: Callable[[Tensor], Solved | None]) -> tuple[Outcome, Solved] | None:
    """Whatever an attempt raises, it has failed and no more: the other ranks wait for this one's inverse."""
    for outcome, prepare in _ATTEMPTS:
        try:
            result = solve(prepare(matrices))
        except torch.linalg.LinAlgError:  # the iteration did not converge
            continue
        except Exception as error:
            warnings.warn(f"a factorisation raised {error!r}: what comes next is tried instead", stacklevel=3)
            continue
        if result is not None:
            return outcome, result
    return None


def add_to_diagonal(matrices: Tensor, shift: Tensor | float) -> Tensor:
    """The matrices + shift I, a new tensor; ``shift`` is a number or (groups,), the same for all blocks of a group."""
    damped = matrices.clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    if isinstance(shift, Tensor):
        shift = shift.repeat_interleave(len(matrices) // len(shift))[:, None]
    diagonal.add_(shift)
    return damped


def invert(factor: Tensor, shift: Tensor | float, last: FactorInverse | None) -> tuple[Outcome, DenseInverse]:
    """(factor + shift I)^-1 by Cholesky, in the factor's type, then float64, then with jitter, then the ``last`` one.

    Without a last good inverse the factor is replaced by its mean diagonal: a scaled gradient, never a lost run.
    """
    damped = add_to_diagonal(factor, shift)
    found = _first_success(damped, _cholesky_inverse)
    if found is not None:
        outcome, inverse = found
        return outcome, DenseInverse(inverse.to(factor.dtype))
    if isinstance(last, DenseInverse):
        return Outcome.LAST_GOOD, last
    scale = _mean_diagonal(damped)
    return Outcome.IDENTITY, DenseInverse(torch.eye(factor.shape[-1]).to(factor) / scale[:, None, None])


def decompose(factor: Tensor, last: FactorInverse | None) -> tuple[Outcome, EigenDecomposition]:
    """The eigendecomposition, with the same line of retreats as :func:`invert`; negative eigenvalues become 0."""
    found = _first_success(factor, _eigh)
    if found is not None:
        outcome, (values, vectors) = found
        return outcome, EigenDecomposition(vectors.to(factor.dtype).contiguous(), values.to(factor.dtype))
    if isinstance(last, EigenDecomposition):
        return Outcome.LAST_GOOD, last
    identity = torch.eye(factor.shape[-1]).to(factor).expand_as(factor).contiguous()
    return Outcome.IDENTITY, EigenDecomposition(identity, _mean_diagonal(factor)[:, None].expand(factor.shape[:2]))


def _mean_diagonal(matrices: Tensor) -> Tensor:
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
    return torch.where(torch.isfinite(mean) & (mean > 0), mean, torch.ones_like(mean))


@dataclass(frozen=True)
class DensePreconditioner:
    """X -> G^-1 X A^-1 / T, from inverses that already hold the damping; without G^-1: X A^-1 (one side only)."""

    A: Tensor
    G: Tensor | None
    locations: float

    def apply(self, gradient: Tensor, damping: float) -> Tensor:
        """The direction (groups, g, a); ``damping`` stands in the inverses."""
        _, d_out, d_in = gradient.shape
        if self.G is None:
            return times_right(gradient, self.A)[..., :d_in]
        direction = times_right(times_left(self.G, gradient), self.A)[:, :d_out, :d_in]
        return direction if self.locations == 1.0 else direction.div_(self.locations)

    def rows(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Rows a A^-1 and g G^-1 / T of the direction, of the gradient's rows a (groups, R, a) and g (groups, R, g)."""
        right = times_right(a, self.A)[..., : a.shape[-1]]
        if self.G is None:
            return right, g
        left = times_right(g, self.G)[..., : g.shape[-1]]
        return right, left if self.locations == 1.0 else left.div_(self.locations)

    def apply_to_rows(self, a: Tensor, g: Tensor, damping: float) -> Tensor:
        """The direction of the gradient g^T a, of a (groups, R, a) and g (groups, R, g)."""
        right, left = self.rows(a, g)
        return left.mT @ right


@dataclass(frozen=True)
class EigenPreconditioner:
    """The same in the eigenbases, with the damping of the moment.

    ``pi`` (groups,) is given for the factored form only; without G only the input side is preconditioned.
    """

    A: EigenDecomposition
    G: EigenDecomposition | None
    locations: float
    pi: Tensor | None

    def rotate(self, X: Tensor) -> Tensor:
        """The coefficients Q_G^T X Q_A, padded where the factors are: (groups, g', a')."""
        rotated = times_right(X, self.A.vectors)
        return rotated if self.G is None else times_left(self.G.vectors.mT, rotated)

    def unrotate(self, coefficients: Tensor, d_out: int, d_in: int) -> Tensor:
        """Q_G coefficients Q_A^T, (groups, d_out, d_in)."""
        X = coefficients if self.G is None else times_left(self.G.vectors, coefficients)
        return times_right(X, self.A.vectors.mT)[:, :d_out, :d_in]

    def values(self, groups: int) -> tuple[Tensor, Tensor]:
        """The eigenvalues of A and of G (1 without it), to be multiplied: (groups, 1, a') and (groups, g' or 1, 1)."""
        values_a = self.A.values.reshape(groups, 1, -1)
        if self.G is None:
            return values_a, torch.ones_like(values_a[..., :1])
        return values_a, self.G.values.reshape(groups, -1, 1)

    def denominators(self, damping: float, groups: int | None = None) -> Tensor:
        """The damped eigenvalues of the layer's block, (groups, g' or 1, a'); dense factors tell ``groups``."""
        values_a, values_g = self.values(groups or len(self.A.values))
        if self.G is None:
            return values_a + damping
        if self.pi is None:
            return self.locations * values_g * values_a + damping
        shift: float = (damping / self.locations) ** 0.5
        pi = self.pi[:, None, None]
        return self.locations * (values_g + shift / pi) * (values_a + shift * pi)

    def apply(self, gradient: Tensor, damping: float) -> Tensor:
        """The direction (groups, g, a) at this ``damping``."""
        groups, d_out, d_in = gradient.shape
        return self.unrotate(self.rotate(gradient) / self.denominators(damping, groups), d_out, d_in)

    def apply_to_rows(self, a: Tensor, g: Tensor, damping: float) -> Tensor:
        """The direction of the gradient g^T a, of a (groups, R, a) and g (groups, R, g): the rows are rotated first."""
        left = g if self.G is None else times_right(g, self.G.vectors)
        rotated = times_left(left.mT, times_right(a, self.A.vectors))
        return self.unrotate(rotated / self.denominators(damping, len(a)), g.shape[-1], a.shape[-1])


LayerPreconditioner = DensePreconditioner | EigenPreconditioner
