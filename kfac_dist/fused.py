"""One flat buffer with named slices, and the packing of symmetric matrices into it.

Shapes: a stack of symmetric matrices is (groups, d, d); packed it is groups * d (d + 1) / 2 words, the upper triangles
in an order of their own ("rectangular full packed").
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor


class FusedBuffer:
    """Named, contiguous slices of one flat tensor, so that one collective serves all of them.

    Args:
        sizes: words per name, in the order in which they lie in the buffer.
        dtype: the type of all slices.
        device: where the buffer lives.
    """

    def __init__(self, sizes: Mapping[Hashable, int], dtype: torch.dtype, device: torch.device) -> None:
        self.flat = torch.zeros(sum(sizes.values()), dtype=dtype, device=device)
        self._slices: dict[Hashable, Tensor] = {}
        start = 0
        for name, size in sizes.items():
            self._slices[name] = self.flat[start : start + size]
            start += size

    def __getitem__(self, name: Hashable) -> Tensor:
        return self._slices[name]

    def __contains__(self, name: Hashable) -> bool:
        return name in self._slices


def triangle_size(dim: int) -> int:
    """Words of one packed d x d symmetric matrix."""
    return dim * (dim + 1) // 2


def triangle_dim(words: int) -> int:
    """The order d of a symmetric matrix that is packed into d (d + 1) / 2 words."""
    return (math.isqrt(8 * words + 1) - 1) // 2


def pack_symmetric(matrices: Tensor, out: Tensor) -> None:
    """Write the symmetric ``matrices`` (groups, d, d) into ``out`` (groups * d (d + 1) / 2,)."""
    corner, first, last = _fields(out.view(len(matrices), -1))
    top = first.shape[-1]
    first.copy_(matrices[:, :top, :top])
    corner.copy_(matrices[:, :top, top:])
    last.copy_(torch.where(_lower(last), matrices[:, top:, top:].mT, last))


def unpack_upper(packed: Tensor) -> Tensor:
    """The matrices (groups, d, d) of packed words (groups, d (d + 1) / 2); BELOW the diagonal stands anything."""
    corner, first, last = _fields(packed)
    top, low = corner.shape[1:]
    full = packed.new_empty(len(packed), top + low, top + low)
    full[:, :top, :top] = first
    full[:, :top, top:] = corner
    full[:, top:, top:] = last.mT
    return full


def unpack_symmetric(packed: Tensor) -> Tensor:
    """The symmetric matrices (groups, d, d) of packed words (groups, d (d + 1) / 2); a new tensor."""
    corner, first, last = _fields(packed)
    top, low = corner.shape[1:]
    full = packed.new_empty(len(packed), top + low, top + low)
    full[:, :top, :top] = torch.where(_lower(first), first.mT, first)
    full[:, :top, top:] = corner
    full[:, top:, :top] = corner.mT
    full[:, top:, top:] = torch.where(_lower(last), last, last.mT)
    return full


def packed_diagonal(packed: Tensor) -> Tensor:
    """The diagonals (groups, d) of packed words (groups, d (d + 1) / 2)."""
    _, first, last = _fields(packed)
    return torch.cat([first.diagonal(dim1=-2, dim2=-1), last.diagonal(dim1=-2, dim2=-1)], dim=-1)


def _fields(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of packed words: the block right of the diagonal ones, and the two squares that share a rectangle.

    [[P, Q], [Q^T, R]] is stored as a rectangle, whose upper triangle is that of P and whose lower one, a row further
    down, is the transposed upper triangle of R; and then Q. So nothing but whole blocks is copied, without any index.

    Returns:
        Q (groups, p, r), and squares (groups, p, p) and (groups, r, r) that overlap, with p = ceil(d / 2), r = d - p.
    """
    groups, words = packed.shape
    low = triangle_dim(words) // 2
    top = triangle_dim(words) - low
    rectangle = packed[:, : (low + 1) * top].view(groups, low + 1, top)
    corner = packed[:, (low + 1) * top :].view(groups, top, low)
    return corner, rectangle[:, :top], rectangle[:, 1:, :low]


def _lower(like: Tensor) -> Tensor:
    """True on and below the diagonal of a square."""
    return torch.ones(like.shape[-2:], dtype=torch.bool, device=like.device).tril_()
