"""One flat buffer with named slices, and the packing of symmetric matrices into it.

Shapes: a stack of symmetric matrices is (groups, d, d); packed it is its upper triangles, groups * d (d + 1) / 2 words.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache

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


@lru_cache(maxsize=64)
def _triangle_index(dim: int, device: torch.device) -> Tensor:
    rows, columns = torch.triu_indices(dim, dim, device=device)
    return rows * dim + columns


def pack_symmetric(matrices: Tensor, out: Tensor) -> None:
    """Write the upper triangles of ``matrices`` (groups, d, d) into ``out`` (groups * d (d + 1) / 2,)."""
    groups, dim, _ = matrices.shape
    flat = matrices.reshape(groups, dim * dim)
    out.view(groups, -1).copy_(flat.index_select(1, _triangle_index(dim, matrices.device)))


def unpack_symmetric(packed: Tensor, groups: int, dim: int) -> Tensor:
    """The symmetric matrices (groups, d, d) whose upper triangles are ``packed``; a new tensor."""
    full = packed.new_zeros(groups, dim * dim)
    full.index_copy_(1, _triangle_index(dim, packed.device), packed.view(groups, -1))
    full = full.view(groups, dim, dim)
    return full + full.triu(1).mT
