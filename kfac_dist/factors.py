"""Kronecker factors: second moments of layer inputs and output gradients, and their moving average.

Shapes, for a layer with ``groups`` independent blocks (1 but for grouped convolutions):
    input rows   (groups, R, d_in)   one row per sample and location, without the constant of the bias
    output rows  (groups, R, d_out)
    A            (groups, a, a)      a = d_in + 1 with a bias (the constant 1 is the LAST coordinate), else d_in
    G            (groups, d_out, d_out)
A factor that is block diagonal itself, ``blocks`` blocks of order ``size``, is (groups * blocks, size, size); blocks of
order 1 make it diagonal. Where ``size`` does not divide the order, the last block ends in zeros.
With B samples and T = R / B locations per sample: A = sum a a^T / (B T), G = sum g g^T / (B T), and the layer's Fisher
block is approximated by T (G (x) A) (Martens and Grosse 2015, section 3; Grosse and Martens 2016, equation 30).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STATISTICS_DTYPES = (torch.float32, torch.float64)
_BLOCKED, _BLOCK = 256, 128  # from which order on second moments are formed by blocks, and rows of a block


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics of a ``dtype`` layer are accumulated: at least float32."""
    return dtype if dtype in STATISTICS_DTYPES else torch.float32


@dataclass(frozen=True)
class FactorShape:
    """How one factor of one layer is stored.

    Attributes:
        groups: independent factors of the layer.
        dim: order of each.
        blocks: diagonal blocks into which each is cut; 1: it is dense.
    """

    groups: int
    dim: int
    blocks: int = 1

    @classmethod
    def limited(cls, groups: int, dim: int, limit: int) -> FactorShape:
        """The fewest equal blocks whose order is at most ``limit``."""
        size = -(-dim // -(-dim // limit))
        return cls(groups, dim, -(-dim // size))

    @property
    def size(self) -> int:
        """Order of a block."""
        return -(-self.dim // self.blocks)

    @property
    def stored(self) -> tuple[int, int, int]:
        """Shape of the tensor."""
        return self.groups * self.blocks, self.size, self.size

    def mean_diagonal(self, diagonal: Tensor) -> Tensor:
        """The trace over the order, (groups,), of a factor with the ``diagonal`` (groups * blocks, size)."""
        return diagonal.reshape(self.groups, -1).sum(-1) / self.dim


def second_moment_sum(rows: Tensor, *, ones: bool = False, weights: Tensor | None = None, blocks: int = 1) -> Tensor:
    """Sum over the rows of r r^T, with a constant 1 appended to every row where ``ones``.

    Args:
        rows: (groups, R, d).
        ones: append the bias coordinate; for a dense factor no copy of the rows is made for it.
        weights: (R,) of zeros and ones: rows of weight 0 do not count.
        blocks: only the ``blocks`` diagonal blocks of the sum are wanted.

    Returns:
        (groups * blocks, d'', d'') where d'' = ceil(d' / blocks) and d' = d + 1 where ``ones``, else d.
    """
    groups, count, _ = rows.shape
    if weights is not None:
        rows = rows * weights.to(rows.dtype)[None, :, None]
    if blocks > 1:
        if ones:
            column = rows.new_ones(count) if weights is None else weights.to(rows.dtype)
            rows = torch.cat([rows, column[None, :, None].expand(groups, count, 1)], dim=-1)
        return _block_moments(rows, blocks)
    moments = _moments(rows)
    if not ones:
        return moments
    return with_ones(moments, rows.sum(1), count if weights is None else weights.to(rows.dtype).sum())


def _moments(rows: Tensor) -> Tensor:
    """rows^T rows, (groups, d, d); by the blocks of the upper triangle where that pays: a third less time on a CPU."""
    groups, _, dim = rows.shape
    if groups > 1 or dim < _BLOCKED or rows.device.type != "cpu":
        return rows.mT @ rows
    moments, single = rows.new_empty(1, dim, dim), rows[0]
    for start in range(0, dim, _BLOCK):
        end = min(start + _BLOCK, dim)
        right = moments[0, start:end, start:]
        torch.mm(single[:, start:end].mT, single[:, start:], out=right)
        moments[0, end:, start:end] = right[:, end - start :].mT
    return moments


def with_ones(moments: Tensor, sums: Tensor, count: Tensor | float) -> Tensor:
    """Second moments (groups, d, d) of rows to which a 1 is appended, from the rows' ``sums`` (groups, d)."""
    groups, dim, _ = moments.shape
    bordered = moments.new_empty(groups, dim + 1, dim + 1)
    bordered[:, :dim, :dim] = moments
    bordered[:, :dim, dim] = sums
    bordered[:, dim, :dim] = sums
    bordered[:, dim, dim] = count
    return bordered


def _block_moments(rows: Tensor, blocks: int) -> Tensor:
    groups, count, dim = rows.shape
    size = -(-dim // blocks)
    if size == 1:
        return rows.square().sum(1).reshape(groups * blocks, 1, 1)
    padded = F.pad(rows, (0, blocks * size - dim)).view(groups, count, blocks, size)
    cut = padded.permute(0, 2, 1, 3).reshape(groups * blocks, count, size)
    return cut.mT @ cut


def decay_weight(updates: int, decay: float) -> float:
    """The weight rho_n = min(1 - 1/(n + 1), decay) of the old average at its n-th update, n = 0, 1, ..

    The first update replaces whatever stood there, and the average of a constant is that constant from the start
    (Martens and Grosse 2015, section 5). ``updates`` counts updates of the factors, not training steps.
    """
    return min(1.0 - 1.0 / (updates + 1), decay)


def moving_average(old: Tensor | None, new: Tensor, updates: int, decay: float) -> Tensor:
    """rho_n old + (1 - rho_n) new, in the memory of ``new``: whoever holds the old one keeps a consistent value."""
    rho = decay_weight(updates, decay)
    if old is None or rho == 0.0:
        return new
    return torch.lerp(old, new, 1.0 - rho, out=new)
