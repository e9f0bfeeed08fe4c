"""The fine level as the coarse level sees it: this step's gradients and directions, and products with M^-1 and F_l."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from kfac_dist.assignment import Assignment
from kfac_dist.coarse import RankOne
from kfac_dist.comm import Communicator
from kfac_dist.directions import DirectionExchange
from kfac_dist.fused import FusedBuffer, unpack_symmetric
from kfac_dist.inverse import EigenPreconditioner
from kfac_dist.samples import Samples
from kfac_dist.state import LayerState


class Fine:
    """One step of the fine level (it fulfils :class:`kfac_dist.coarse.FineLevel`).

    Args:
        gradients: layer -> gradient of the mean loss, for the layers that take part.
        directions: layer -> zeta.
        states: layer -> its factors and inverses.
        samples: the kept samples of this rank.
        exchange: applies M^-1.
        assignment: who owns what.
        communicator: over all ranks.
        damping: lam, of the fine level.
        coarse_damping: lam_c, in F_l.
        joint: the layers whose block has one factor, of whole gradients.
    """

    def __init__(
        self,
        gradients: Mapping[str, Tensor],
        directions: Mapping[str, Tensor],
        states: Mapping[str, LayerState],
        samples: Samples,
        exchange: DirectionExchange,
        assignment: Assignment,
        communicator: Communicator,
        damping: float,
        coarse_damping: float,
        joint: Collection[str] = (),
    ) -> None:
        self.gradients = gradients
        self.directions = directions
        self.momentum: Mapping[str, Tensor] | None = None
        self.joint = joint
        self.factor_updates = sum(state.updates for state in states.values())
        self._states = states
        self._samples = samples
        self._exchange = exchange
        self._assignment = assignment
        self._communicator = communicator
        self._damping = damping
        self._coarse_damping = coarse_damping

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Layer -> shape of its Theta."""
        return {name: tuple(gradient.shape) for name, gradient in self.gradients.items()}  # type: ignore[misc]

    def precondition(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """M^-1 v, with the fine damping."""
        return self._exchange.precondition(vectors, self._states, self._damping)

    def product(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F v + lam_c v; (1/B) U (U^T v), in one fused all-reduce of the parameters' size and the sample count."""
        like = next(iter(vectors.values()))
        local = self._samples.combine(self._samples.along(vectors), self.shapes)
        sizes: dict[Hashable, int] = {name: v.numel() for name, v in vectors.items()}
        sizes[""] = 1
        buffer = FusedBuffer(sizes, like.dtype, like.device)
        for name, part in local.items():
            buffer[name].copy_(part.reshape(-1))
        buffer[""].fill_(self._samples.valid)
        self._communicator.all_reduce(buffer.flat, phase="coarse_product")
        return {name: buffer[name].view_as(v) / buffer[""] + self._coarse_damping * v for name, v in vectors.items()}

    def residual(self) -> dict[str, Tensor]:
        """The residual grad - F_l zeta."""
        product = self.product(self.directions)
        return {name: gradient - product[name] for name, gradient in self.gradients.items()}

    def where_held(
        self, make: Callable[[str, EigenPreconditioner, float], Sequence[Tensor]], count: int
    ) -> dict[str, list[Tensor]]:
        """``make(layer, eigenbases, damping)`` where the eigenbases are held, then on every rank."""
        held: dict[str, Sequence[Tensor]] = {}
        for name in self.gradients:
            basis = self._states[name].preconditioner
            if isinstance(basis, EigenPreconditioner):
                held[name] = make(name, basis, self._damping)
        shared = [
            self._exchange.share({name: vectors[j] for name, vectors in held.items()}, self.gradients)
            for j in range(count)
        ]
        return {name: [vectors[name] for vectors in shared] for name in self.gradients}

    def leading_eigenvectors(self, count: int, largest: bool) -> dict[str, list[RankOne]]:
        """The eigenvectors of the undamped averages, from the owner of A to everybody in one all-reduce.

        Where they cannot be computed, whatever is raised, they are zero on all ranks, which wait for them, and drop out
        of the basis.
        """
        sizes: dict[object, int] = {}
        counts = {name: min(count, g * o * i) for name, (g, o, i) in self.shapes.items()}
        for name, (groups, d_out, d_in) in self.shapes.items():
            sizes[name] = counts[name] * groups * (d_out + d_in)
        like = next(iter(self.gradients.values()))
        buffer = FusedBuffer(sizes, like.dtype, like.device)
        for name in self.shapes:
            if self._assignment.owner[name, "A"] == self._communicator.rank:
                try:
                    pairs = _extreme_pairs(self._states[name], self.shapes[name], counts[name], largest)
                    buffer[name].copy_(torch.cat([part.reshape(-1) for pair in pairs for part in pair]).to(like))
                except Exception as error:
                    warnings.warn(f"layer {name!r} has no eigenvectors for the coarse space: {error!r}", stacklevel=2)
        self._communicator.all_reduce(buffer.flat, phase="coarse_eigenvectors")
        result: dict[str, list[RankOne]] = {}
        for name, (groups, d_out, d_in) in self.shapes.items():
            parts = buffer[name].view(counts[name], groups * (d_out + d_in))
            result[name] = [
                RankOne(part[: groups * d_out].view(groups, d_out), part[groups * d_out :].view(groups, d_in))
                for part in parts
            ]
        return result


def _extreme_pairs(state: LayerState, shape: tuple[int, int, int], count: int, largest: bool) -> list[RankOne]:
    """The ``count`` eigenvectors q_G (x) q_A of a layer with the extreme products of eigenvalues, over all groups."""
    factors, (groups, d_out, d_in) = state.factors, shape
    assert factors is not None
    A = _Spectrum(unpack_symmetric(factors.A), groups, d_in)
    G = (
        None if factors.G is None else _Spectrum(unpack_symmetric(factors.G), groups, d_out)
    )  # without G the block is A itself
    values_g = torch.ones_like(A.values[:, :1]) if G is None else G.values
    products = values_g[:, :, None] * A.values[:, None, :]
    order = products.flatten().argsort(descending=largest, stable=True)[:count].tolist()
    _, across, along = products.shape
    pairs = []
    for index in order:
        group, row, column = index // (across * along), index // along % across, index % along
        left, right = A.values.new_zeros(groups, d_out), A.values.new_zeros(groups, d_in)
        left[group] = 1.0 if G is None else G.vector(group, row)
        right[group] = A.vector(group, column)
        pairs.append(RankOne(left, right))
    return pairs


class _Spectrum:
    """The eigenvalues (groups, dim) of one factor, and its eigenvectors one by one; in float64."""

    def __init__(self, factor: Tensor, groups: int, dim: int) -> None:
        self._dim, self._size = dim, factor.shape[-1]
        blocks = factor.double().view(groups, -1, self._size, self._size)
        if self._size == 1:
            self.values = blocks.view(groups, dim).clamp_min(0.0)
            return
        # The last block may end in padding, which is cut off.
        ends = [min(self._size, dim - start) for start in range(0, dim, self._size)]
        parts = [torch.linalg.eigh(blocks[:, i, :end, :end]) for i, end in enumerate(ends)]
        self.values = torch.cat([values for values, _ in parts], dim=1).clamp_min(0.0)
        self._vectors = [vectors for _, vectors in parts]

    def vector(self, group: int, index: int) -> Tensor:
        """The eigenvector (dim,) of ``values[group, index]``."""
        vector = self.values.new_zeros(self._dim)
        block, column = divmod(index, self._size)
        start = block * self._size
        vector[start : start + self._size] = 1.0 if self._size == 1 else self._vectors[block][group, :, column]
        return vector
