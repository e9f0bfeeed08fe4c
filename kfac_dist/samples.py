"""Layer inputs and output gradients of some samples, kept for the coarse level: products with U without forming it.

U has one column per sample and draw, u_b = sum over a layer's calls and locations of g a^T, layer below layer. Products
with it go through the layers' own forward with other weights, so strides, groups and padding are right by themselves,
no patch is unfolded, no per-sample weight gradient and no (samples x locations) matrix exists.

Cost of one dense vector: a forward of the layer on the kept samples; of a rank-one vector, d_in + d_out per row instead
of d_in d_out. Memory: the raw inputs and output gradients of the kept samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfac_dist.comm import Communicator
from kfac_dist.layers import Layer, Part

DEFAULT_SAMPLES = 256
"""How many of a batch are kept, over all ranks."""

RawVector = Tensor | tuple[Tensor, Tensor]
"""A Theta-shaped vector, or the two sides (g, a) of a rank-one one."""


def share(total: int, communicator: Communicator) -> int:
    """This rank's part of ``total`` samples."""
    return total // communicator.size + (communicator.rank < total % communicator.size)


@dataclass
class KeptCall:
    """One call of one layer: its input, and the output gradient of each draw (scaled by the root of its weight)."""

    layer: Layer
    x: Tensor
    gradients: list[Tensor] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """Everything that is kept of floating type."""
        return [t for t in (self.x, *self.gradients) if t.is_floating_point()]


@dataclass
class KeptBatch:
    """The kept samples of one micro-batch: how many, how many of them count, and the layers' calls."""

    size: int
    valid: float
    keys: dict[object, KeptCall] = field(default_factory=dict)

    @property
    def calls(self) -> list[KeptCall]:
        """The calls, in the order in which they were kept."""
        return list(self.keys.values())

    @property
    def draws(self) -> int:
        """Draws per sample."""
        return max((len(call.gradients) for call in self.calls), default=0)


class Samples:
    """The samples that one rank keeps of one curvature batch.

    Args:
        quota: how many at most; None: all.
    """

    def __init__(self, quota: int | None) -> None:
        self.quota = quota
        self.batches: list[KeptBatch] = []
        self._scale = 1.0

    def begin(self, size: int, mask: Tensor | None) -> KeptBatch | None:
        """Open a micro-batch of ``size`` samples; None where the quota is used up."""
        kept = sum(batch.size for batch in self.batches)
        n = size if self.quota is None else min(size, self.quota - kept)
        if n <= 0:
            return None
        valid = float(n)
        if mask is not None:
            valid = float(mask[:n].flatten(1).any(1).sum() if mask.dim() > 1 else mask[:n].sum())
        self.batches.append(KeptBatch(n, valid))
        return self.batches[-1]

    def keep(self, batch: KeptBatch, size: int, key: object, part: Part, weight: float) -> None:
        """Copy one draw of the output gradient of a call, times ``weight``, and at its first draw the call's input.

        Copies: the caller may overwrite its input before the samples are used for the last time.

        Args:
            batch: the micro-batch.
            size: samples in it, kept or not; x and g have them outermost.
            key: tells the calls of the micro-batch apart.
            part: the layer, its input, and the gradient of its output.
            weight: the root of the draw's share of the expectation, times what makes g that of one sample.
        """
        layer, x, g = part
        dtype = torch.promote_types(g.dtype, torch.float32)
        if key not in batch.keys:
            kept = _first(x, batch.size, size, layer)  # indices stay what they are
            batch.keys[key] = KeptCall(layer, kept.to(dtype if x.is_floating_point() else x.dtype, copy=True))
        batch.keys[key].gradients.append(_first(g, batch.size, size, layer).to(dtype) * weight)

    @property
    def valid(self) -> float:
        """Samples that count, on this rank."""
        return sum(batch.valid for batch in self.batches)

    def rescale(self, factor: float) -> None:
        """Multiply every gradient by ``factor`` (what a gradient scaler put into them, inverted)."""
        if factor != 1.0:
            for call in (call for batch in self.batches for call in batch.calls):
                call.gradients = [g * factor for g in call.gradients]

    def leave_out_unless_finite(self) -> None:
        """Drop this rank's samples where one of them is not finite: the others' are enough (one synchronisation)."""
        kept = [t for batch in self.batches for call in batch.calls for t in call.tensors()]
        if kept and not bool(torch.stack([t.sum() for t in kept]).isfinite().all()):
            self.batches.clear()

    @property
    def columns(self) -> int:
        """Columns of U on this rank: kept samples times draws."""
        return sum(batch.size * batch.draws for batch in self.batches)

    def _slices(self) -> Iterator[tuple[KeptBatch, int, slice]]:
        """(micro-batch, draw, its columns)."""
        start = 0
        for batch in self.batches:
            for draw in range(batch.draws):
                yield batch, draw, slice(start, start + batch.size)
                start += batch.size

    def project(self, vectors: Mapping[str, Sequence[RawVector]], like: Tensor) -> dict[str, Tensor]:
        """Layer -> <V_j, u_b>, (k, columns), for each of its vectors.

        Args:
            vectors: layer -> Theta-shaped tensors, or pairs (g, a) of the two sides of a rank-one vector.
            like: gives type and device.
        """
        rows = {name: like.new_zeros(len(each), self.columns) for name, each in vectors.items()}
        starts = _starts(self.batches)
        for batch, start in zip(self.batches, starts, strict=True):
            for call in batch.calls:
                for j, vector in enumerate(vectors.get(call.layer.name, ())):
                    for draw, products in enumerate(_products(call, vector, batch.size)):
                        first = start + draw * batch.size
                        rows[call.layer.name][j, first : first + batch.size] += products
        return rows

    def along(self, vector: Mapping[str, Tensor]) -> Tensor:
        """The products w = U^T v, (columns,), with one vector over all its layers: layer -> Theta-shaped part."""
        rows = self.project({name: [part] for name, part in vector.items()}, next(iter(vector.values())))
        return torch.cat(list(rows.values())).sum(0)

    def combine(self, w: Tensor, shapes: Mapping[str, tuple[int, int, int]]) -> dict[str, Tensor]:
        """Layer -> sum over the columns of w_b u_b, Theta-shaped; (columns,) weights. One weight gradient per call."""
        total = {name: w.new_zeros(shape) for name, shape in shapes.items()}
        for batch, draw, columns in self._slices():
            part = w[columns]
            for call in batch.calls:
                if call.layer.name in total and draw < len(call.gradients):
                    g = call.gradients[draw]
                    weights = part.to(g.dtype).repeat_interleave(g.shape[0] // batch.size)
                    scaled = g * weights.view(-1, *[1] * (g.dim() - 1))
                    total[call.layer.name] += call.layer.parameter_gradient(call.x, scaled)
        return total


def _starts(batches: Sequence[KeptBatch]) -> list[int]:
    starts, total = [], 0
    for batch in batches:
        starts.append(total)
        total += batch.size * batch.draws
    return starts


def _first(tensor: Tensor, n: int, size: int, layer: Layer) -> Tensor:
    """The rows of the first ``n`` of ``size`` samples; a layer may have folded other dimensions behind the samples."""
    if tensor.dim() == 0 or tensor.shape[0] % size:
        raise ValueError(
            f"layer {layer.name!r} has an input or output of shape {tuple(tensor.shape)} for {size} samples, which is "
            "the first dimension of the logits: the coarse level must tell samples apart. Put the batch first, in the "
            "logits too (B, positions, classes), or add the layer to skip_layers"
        )
    return tensor[: n * (tensor.shape[0] // size)]


def _products(call: KeptCall, vector: RawVector, size: int) -> Iterator[Tensor]:
    """Per draw, <V, u_b> of one call: (size,)."""
    layer, dtype = call.layer, call.gradients[0].dtype
    if not isinstance(vector, Tensor) and (layer.joint or layer.input_side == "G"):  # its outputs are no rows of Theta
        vector = vector[0][:, :, None] * vector[1][:, None, :]
    if isinstance(vector, Tensor):
        out = layer.forward_with(call.x, vector.to(dtype))
        for g in call.gradients:
            yield (out * g).reshape(size, -1).sum(1)
        return
    left, right = vector
    inputs = layer.output_rows(layer.forward_with(call.x, right[:, None, :].to(dtype)))[..., 0]
    for g in call.gradients:
        outputs = torch.einsum("gro,go->gr", layer.output_rows(g), left.to(dtype))
        yield (inputs * outputs).sum(0).reshape(size, -1).sum(1)
