"""Raw basis vectors with the coefficients that make them orthonormal: restriction and prolongation.

Shapes: n blocks (layers, or the one network) of k vectors; m = n k. Raw coefficients t (n, k) belong to the vectors as
they came, coarse ones (m,) to the orthonormal ones: t = C beta. No orthonormal vector is formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from kfac_dist.coarse import Vector, dense, inner
from kfac_dist.restrict import block_diagonal, orthonormal_coefficients


class Basis:
    """The coarse basis of one step.

    Args:
        vectors: layer -> its raw vectors; all layers have as many, but for layers too small for it.
        spans_network: the j-th vectors of all layers are one vector of the network.
    """

    def __init__(self, vectors: Mapping[str, Sequence[Vector]], spans_network: bool) -> None:
        self.vectors = {name: list(each) for name, each in vectors.items()}
        self.names = list(self.vectors)
        self.spans_network = spans_network
        self.count = max(len(each) for each in self.vectors.values())
        self.blocks = 1 if spans_network else len(self.names)
        first = dense(next(iter(self.vectors.values()))[0])
        self.like = first.new_zeros(())
        self._dotted: tuple[Mapping[str, Tensor], Tensor] | None = None

    @cached_property
    def gram(self) -> Tensor:
        """Inner products of the raw vectors, (n, k, k), float64; steps with kept coefficients do not ask for them."""
        grams: list[Tensor] = []
        zero = torch.zeros((), dtype=torch.float64, device=self.like.device)
        for name in self.names:
            each = self.vectors[name]
            entries = [[zero] * self.count for _ in range(self.count)]
            for a, b in product(range(len(each)), repeat=2):
                if a <= b:
                    entries[a][b] = entries[b][a] = inner(each[a], each[b])
            grams.append(torch.stack([torch.stack(row) for row in entries]))
        stacked = torch.stack(grams)
        return stacked.sum(0, keepdim=True) if self.spans_network else stacked

    @cached_property
    def coefficients(self) -> Tensor:
        """C (n, k, k), which makes the raw vectors orthonormal."""
        return orthonormal_coefficients(self.gram, torch.finfo(self.like.dtype).eps)

    @property
    def dimension(self) -> int:
        """m, dropped columns included."""
        return self.blocks * self.count

    @property
    def block_names(self) -> list[str]:
        """Whose vectors the blocks are: the layers', or "network"."""
        return ["network"] if self.spans_network else self.names

    def _block(self, name: str) -> int:
        return 0 if self.spans_network else self.names.index(name)

    def dots_by_layer(self, other: Mapping[str, Tensor]) -> Tensor:
        """<V_ij, other_i> of the raw vectors, one row per LAYER: (layers, k), float64.

        The last ones are kept: the solve and the clip both ask for those with the gradient.
        """
        if self._dotted is not None and self._dotted[0] is other:
            return self._dotted[1]
        zero = torch.zeros((), dtype=torch.float64, device=self.like.device)
        rows = []
        for name in self.names:
            products = [inner(vector, other[name]) for vector in self.vectors[name]]
            rows.append(torch.stack(products + [zero] * (self.count - len(products))))
        self._dotted = other, torch.stack(rows)
        return self._dotted[1]

    def by_block(self, rows: Tensor) -> Tensor:
        """Rows per layer, (layers, ..), as rows per block, (n, ..)."""
        return rows.sum(0, keepdim=True) if self.spans_network else rows

    def restrict(self, raw: Tensor) -> Tensor:
        """C^T of raw products (n, k, ..): (m, ..)."""
        product_shape = raw.shape[2:]
        flat = raw.reshape(self.blocks, self.count, -1)
        return (self.coefficients.mT.to(flat) @ flat).reshape(self.dimension, *product_shape)

    def raw_coefficients(self, beta: Tensor) -> Tensor:
        """C beta: (n, k) for a coarse vector (m,)."""
        return (self.coefficients @ beta.view(self.blocks, self.count, 1).to(self.coefficients))[..., 0]

    def orthonormal_gram(self) -> Tensor:
        """R_0 R_0^T, (m, m): the identity, but for dropped columns and rounding."""
        return block_diagonal(self.coefficients.mT @ self.gram @ self.coefficients)

    def prolong(self, raw: Tensor) -> dict[str, Tensor]:
        """Layer -> sum_j t_j V_j, Theta-shaped, for raw coefficients (n, k)."""
        result: dict[str, Tensor] = {}
        for name in self.names:
            t = raw[self._block(name)].to(self.like)
            parts = self.vectors[name]
            total = dense(parts[0]) * t[0]
            for j in range(1, len(parts)):
                total.addcmul_(dense(parts[j]), t[j])
            result[name] = total
        return result

    def stack_rows(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Rows of U^T V per layer, (k_i, columns) each, as (n, k, columns)."""
        padded = []
        for name in self.names:
            each = rows[name]
            missing = self.count - each.shape[0]
            padded.append(torch.cat([each, each.new_zeros(missing, each.shape[1])]) if missing else each)
        return self.by_block(torch.stack(padded))
