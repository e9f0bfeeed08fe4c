"""The two collectives of the fine level: statistics to factors, and factors to inverses.

Words of the buffers, with a and g the sides of a layer's dense factors (blocks count one by one):
    factors   sum over layers of a (a + 1) / 2 + g (g + 1) / 2, plus a header of 7 + layers + 2 ranks
    inverses  the same sum ("factored" with a constant damping), or a^2 + a + g^2 + g (eigenbases), plus one status
              per factor
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.assignment import Assignment, Side
from kfac_dist.comm import Communicator
from kfac_dist.factors import FactorShape
from kfac_dist.fused import (
    FusedBuffer,
    pack_symmetric,
    packed_diagonal,
    triangle_size,
    unpack_symmetric,
    unpack_upper,
)
from kfac_dist.inverse import (
    DenseInverse,
    DensePreconditioner,
    EigenDecomposition,
    EigenPreconditioner,
    FactorInverse,
    Outcome,
    decompose,
    invert,
    pi_correction,
)
from kfac_dist.layers import Layer
from kfac_dist.state import Factors, LayerState
from kfac_dist.statistics import Statistics


def factor_shapes(layer: Layer, sides: Sequence[Side]) -> dict[Side, FactorShape]:
    """Side -> how that factor is stored, for the sides that are kept and that the layer has."""
    return {side: shape for side, shape in layer.factors.items() if side in sides}


@dataclass(frozen=True)
class Health:
    """What one rank says of itself beside its sums.

    Attributes:
        statistics: its sums are finite.
        gradients: its gradients are finite.
        fallbacks: factorisations of its own that did not succeed at the first attempt, since it last said so.
        checksums: two numbers that are equal on all replicas (of the gradients and of the parameters).
    """

    statistics: bool
    gradients: bool
    fallbacks: int
    checksums: tuple[float, float]


@dataclass(frozen=True)
class Reduced:
    """Sums over all ranks.

    Attributes:
        factors: layer name -> the factors of this window alone; layers that saw no sample are absent.
        samples: B, global.
        elements: what "mean_all" divides by, global.
        summed: samples over the divisor of their loss, global: what a loss that is a sum amounts to.
        failed_ranks: ranks whose statistics were not finite, and so left out.
        bad_gradient_ranks: ranks with a gradient that is not finite.
        fallbacks: sum over the ranks.
        checksums: one pair per rank.
    """

    factors: dict[str, Factors]
    samples: float
    elements: float
    summed: float
    failed_ranks: int
    bad_gradient_ranks: int
    fallbacks: int
    checksums: list[tuple[float, float]]

    @property
    def finite(self) -> bool:
        """Whether the factors are: sums that are finite on every rank can overflow together (one synchronisation).

        One sum finds an entry that is not; that it overflows itself takes entries of 1e30.
        """
        sides = [side for factors in self.factors.values() for side in factors.sides().values()]
        return not sides or bool(torch.stack([side.sum() for side in sides]).isfinite().all())


def reduce_statistics(
    layers: Sequence[Layer],
    sides: Sequence[Side],
    statistics: Statistics,
    health: Health,
    communicator: Communicator,
    dtype: torch.dtype,
) -> Reduced:
    """One packed all-reduce of the NEW sums and counts (never of the average), then the division.

    A rank without samples takes part with zeros; one whose sums are not finite sends zeros and says so in the header.
    """
    ranks, count = communicator.size, len(layers)
    sizes: dict[object, int] = {"header": 7 + count + 2 * ranks}
    for layer in layers:
        for side, shape in factor_shapes(layer, sides).items():
            sizes[layer.name, side] = packed_words(shape)
    buffer = FusedBuffer(sizes, dtype, layers[0].device)
    if health.statistics:
        for side in sides:
            for name, moment in statistics.sums(side).items():
                pack_symmetric(moment.to(dtype), out=buffer[name, side])
    counts = [statistics.samples, statistics.elements, statistics.summed, statistics.taken]
    counts += [statistics.rows[layer.name] for layer in layers]
    header = [0.0] * sizes["header"]
    header[:3] = [float(not health.statistics), float(not health.gradients), float(health.fallbacks)]
    header[3 : 7 + count] = counts if health.statistics else [0.0] * (4 + count)
    mine = 7 + count + 2 * communicator.rank
    header[mine : mine + 2] = health.checksums
    buffer["header"].copy_(torch.tensor(header, dtype=dtype))

    communicator.all_reduce(buffer.flat, phase="factors")

    total = buffer["header"].tolist()
    samples, rows = total[6], dict(zip((layer.name for layer in layers), total[7 : 7 + count], strict=True))
    factors: dict[str, Factors] = {}
    for layer in layers:
        n = rows[layer.name]
        if n > 0:
            n = samples if layer.joint else n  # the block itself is a mean over samples, whatever calls there were
            parts = {
                side: buffer[layer.name, side].view(shape.stored[0], -1).div_(n)
                for side, shape in factor_shapes(layer, sides).items()
            }
            factors[layer.name] = Factors(parts["A"], parts.get("G"), n / samples)
    pairs = total[7 + count :]
    return Reduced(
        factors=factors,
        samples=total[3],
        elements=total[4],
        summed=total[5],
        failed_ranks=round(total[0]),
        bad_gradient_ranks=round(total[1]),
        fallbacks=round(total[2]),
        checksums=list(zip(pairs[::2], pairs[1::2], strict=True)),
    )


class InverseExchange:
    """Owners factorise; one all-reduce over the column hands the results to the ranks that precondition with them.

    Every word has exactly one rank that does not send zero there, so the sum is exact in any order and all ranks hold
    the same bits.

    Args:
        layers: all layers.
        sides: ("A", "G") or ("A",).
        assignment: who owns what.
        rank: this process's rank in the world.
        column: the communicator of this rank's column.
        eigen: exchange eigendecompositions, to be damped at use; else inverses that hold a constant damping.
        factored: the factored form of damping (pi), else the exact one.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        sides: Sequence[Side],
        assignment: Assignment,
        rank: int,
        column: Communicator,
        *,
        eigen: bool,
        factored: bool,
    ) -> None:
        self._layers = [layer for layer in layers if assignment.preconditions(layer.name, rank)]
        self._sides = tuple(sides)
        self._assignment = assignment
        self._rank = rank
        self._column = column
        self._eigen = eigen
        self._factored = factored

    def _words(self, shape: FactorShape) -> int:
        count, size, _ = shape.stored
        return count * (size * size + size) if self._eigen else packed_words(shape)

    def refresh(self, states: Mapping[str, LayerState], damping: float, dtype: torch.dtype) -> list[Outcome]:
        """Invert ``state.inverted`` of the ``states`` of this column; returns the outcomes of this rank's factors."""
        layers = [layer for layer in self._layers if layer.name in states and states[layer.name].inverted is not None]
        if not layers:
            return []
        shapes = {layer.name: factor_shapes(layer, self._sides) for layer in layers}
        if self._column.size == 1:
            return self._refresh_alone(layers, states, shapes, damping)
        sizes: dict[object, int] = {"status": sum(map(len, shapes.values()))}
        for layer in layers:
            for side, shape in shapes[layer.name].items():
                sizes[layer.name, side] = self._words(shape)
        buffer = FusedBuffer(sizes, dtype, layers[0].device)
        own: list[Outcome] = []
        places = [(layer, side) for layer in layers for side in shapes[layer.name]]
        for place, (layer, side) in enumerate(places):
            if self._assignment.owner[layer.name, side] == self._rank:
                outcome, inverse = self._factorise(layer, states[layer.name], side, damping)
                own.append(outcome)
                buffer["status"][place] = float(outcome)
                self._pack(inverse, buffer[layer.name, side])
        self._column.all_reduce(buffer.flat, phase="inverses")
        for layer in layers:
            sides = shapes[layer.name].items()
            inverses: dict[str, FactorInverse] = {
                side: self._unpack(buffer[layer.name, side], shape) for side, shape in sides
            }
            self._take(layer, states[layer.name], inverses)
        return own

    def _refresh_alone(
        self,
        layers: Sequence[Layer],
        states: Mapping[str, LayerState],
        shapes: Mapping[str, Mapping[Side, FactorShape]],
        damping: float,
    ) -> list[Outcome]:
        """The same in a column of one rank: packing and unpacking would change no bit."""
        own: list[Outcome] = []
        for layer in layers:
            state = states[layer.name]
            inverses: dict[str, FactorInverse] = {}
            for side in shapes[layer.name]:
                outcome, inverses[side] = self._factorise(layer, state, side, damping)
                own.append(outcome)
            self._take(layer, state, inverses)
        return own

    def _take(self, layer: Layer, state: LayerState, inverses: dict[str, FactorInverse]) -> None:
        state.inverses = inverses
        state.preconditioner = self._preconditioner(layer, state)

    def _factorise(self, layer: Layer, state: LayerState, side: Side, damping: float) -> tuple[Outcome, FactorInverse]:
        factors = state.inverted
        assert factors is not None  # refresh() passes such states only
        factor = unpack_upper(factors.sides()[side])
        last = state.inverses.get(side)
        if self._eigen:
            return decompose(factor, last)
        if factors.G is None:
            return invert(factor, damping, last)
        pi = _pi(layer, factors)
        shift = (damping / factors.locations) ** 0.5
        return invert(factor, shift * pi if side == "A" else shift / pi, last)

    def _pack(self, inverse: FactorInverse, out: Tensor) -> None:
        if isinstance(inverse, DenseInverse):
            pack_symmetric(inverse.matrix, out)
        else:
            vectors, values = inverse.vectors, inverse.values
            out[: vectors.numel()].copy_(vectors.reshape(-1))
            out[vectors.numel() :].copy_(values.reshape(-1))

    def _unpack(self, words: Tensor, shape: FactorShape) -> FactorInverse:
        count, size, _ = shape.stored
        if not self._eigen:
            return DenseInverse(unpack_symmetric(words.view(count, -1)))
        split = count * size * size
        vectors = words[:split].view(count, size, size).clone()
        return EigenDecomposition(vectors, words[split:].view(count, size).clone())

    def _preconditioner(self, layer: Layer, state: LayerState) -> DensePreconditioner | EigenPreconditioner:
        factors, inverses = state.inverted, state.inverses
        assert factors is not None  # refresh() passes such states only
        A, G = inverses["A"], inverses.get("G")
        if isinstance(A, DenseInverse):
            return DensePreconditioner(A.matrix, G.matrix if isinstance(G, DenseInverse) else None, factors.locations)
        pi = _pi(layer, factors) if self._factored and factors.G is not None else None
        return EigenPreconditioner(A, G if isinstance(G, EigenDecomposition) else None, factors.locations, pi)


def packed_words(shape: FactorShape) -> int:
    """Words of a packed factor or inverse."""
    count, size, _ = shape.stored
    return count * triangle_size(size)


def _pi(layer: Layer, factors: Factors) -> Tensor:
    assert factors.G is not None  # with the input side alone there is nothing to balance
    means = [layer.factors[side].mean_diagonal(packed_diagonal(words)) for side, words in factors.sides().items()]  # type: ignore[index]
    return pi_correction(*means)
