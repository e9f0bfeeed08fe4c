"""Sums over the samples of an accumulation window, from which factors are made.

Everything here is a SUM over samples and locations beside a COUNT, so that the factors do not depend on how a batch was
cut into micro-batches or spread over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kfac_dist.factors import statistics_dtype
from kfac_dist.layers import Layer, Part
from kfac_dist.layers.base import Side

Key = TypeVar("Key")


@dataclass(frozen=True)
class MicroBatch:
    """What is known of one forward pass.

    Attributes:
        index: its place in the window.
        size: samples in it, masked or not.
        valid: samples that count.
        elements: what a loss that averages over all targets divides the summed negative log-likelihood by: the targets
            that count, over all samples (half of them for the squared error, which lacks the 1/2).
        mask: (size, ..) of booleans, the first dimensions of the targets; None: everything counts.
        loss_divisor: what the training loss was divided by (the number of accumulated micro-batches).
    """

    index: int
    size: int
    valid: float
    elements: float
    mask: Tensor | None = None
    loss_divisor: float = 1.0

    def per_sample_scale(self, loss_reduction: str | float) -> float:
        """What turns an output gradient of the training loss into that of one sample's negative log-likelihood.

        A mean over samples carries 1 / size of THIS backward, whatever DDP averages afterwards.
        """
        if loss_reduction == "sum":
            scale = 1.0
        elif loss_reduction == "mean":
            scale = self.valid
        elif loss_reduction == "mean_all":
            scale = self.elements
        else:
            scale = self.valid / float(loss_reduction)
        return scale * self.loss_divisor

    def row_weights(self, layer: Layer, rows: int) -> Tensor | None:
        """Zeros and ones (rows,) for the rows of a layer's input; None without a mask.

        Where the layer has one row per target the mask is taken entry by entry; elsewhere a sample counts with all its
        rows unless all its targets are masked.

        Raises:
            ValueError: the rows cannot be told apart by sample.
        """
        if self.mask is None:
            return None
        if rows % self.size:
            raise ValueError(
                f"layer {layer.name!r} has {rows} rows for {self.size} samples: a mask cannot be applied to it; "
                "add it to skip_layers or train without a mask"
            )
        if rows == self.mask.numel():
            return self.mask.flatten()
        return (
            self.mask.flatten(1).any(1).repeat_interleave(rows // self.size)
            if self.mask.dim() > 1
            else (self.mask.repeat_interleave(rows // self.size))
        )


def samples_of(layer: Layer, rows: int, batch: MicroBatch, shared: bool = False) -> int | None:
    """How many samples the rows of a layer belong to, where their locations are to be averaged; else None.

    The rows of a shared call are those of one sample.

    Raises:
        ValueError: the rows cannot be told apart by sample.
    """
    if layer.approximation == "expand":
        return None
    if shared:
        return 1
    if rows % batch.size:
        raise ValueError(
            f"layer {layer.name!r} has {rows} rows for {batch.size} samples: kfac_approx='reduce' must tell samples "
            "apart. Put the batch first, or choose 'expand' for it"
        )
    return batch.size


class Statistics:
    """Sums of a a^T and g g^T per layer, and the counts that belong to them.

    Args:
        layers: the layers to sum for.
        output_side: whether G is wanted.
    """

    def __init__(self, layers: Sequence[Layer], output_side: bool) -> None:
        self._layers = layers
        self._output_side = output_side
        self.clear()

    def clear(self) -> None:
        """Begin a new window."""
        # By what they are made of, since a gradient scaler is in gradients only, and then by layer and side.
        self._inputs: dict[tuple[str, Side], Tensor] = {}
        self._gradients: dict[tuple[str, Side], Tensor] = {}
        self.rows: dict[str, float] = {layer.name: 0.0 for layer in self._layers}
        self.samples = 0.0
        self.taken = 0.0
        self.elements = 0.0
        self.summed = 0.0
        self.micro_batches = 0

    def release(self) -> None:
        """Let go of the sums, which have been reduced; the counts stay."""
        self._inputs, self._gradients = {}, {}

    def sums(self, side: Side) -> dict[str, Tensor]:
        """Layer -> the sum that becomes this factor."""
        found: dict[str, Tensor] = {}
        for moments in (self._inputs, self._gradients):
            for (name, at), moment in moments.items():
                if at == side:
                    _add(found, name, moment)
        return found

    def add_batch(self, batch: MicroBatch, taken: float) -> None:
        """Count the samples of one micro-batch, and how many of those that count the factors are made of."""
        self.samples += batch.valid
        self.taken += taken
        self.elements += batch.elements
        self.summed += batch.valid / batch.loss_divisor
        self.micro_batches += 1

    def add_input(self, layer: Layer, x: Tensor, rows: int, batch: MicroBatch) -> None:
        """Add the input of one call; ``rows`` is the number of its samples times locations."""
        if layer.joint:  # its one factor is made of inputs and gradients together
            self.rows[layer.name] += batch.valid
            return
        if layer.input_side == "G" and not self._output_side:
            return
        shared = layer.shared(x, batch.size)
        reached, weights = layer.row_weights(x), None if shared else batch.row_weights(layer, rows)
        if reached is not None:
            weights = reached if weights is None else reached & weights.bool()
        samples = samples_of(layer, rows, batch, shared)
        moment = layer.input_moment(x, statistics_dtype(layer.dtype), weights, samples)
        times = batch.valid if shared else 1.0  # every sample has the rows of a shared call
        _add(self._inputs, (layer.name, layer.input_side), _times(moment, times))
        if samples is not None:
            self.rows[layer.name] += batch.valid
        else:
            self.rows[layer.name] += times * (rows if weights is None else float(weights.sum()))

    def add_output(self, part: Part, batch: MicroBatch, weight: float, scale: float = 1.0) -> None:
        """Add one draw of the output gradient of one call.

        Args:
            part: the layer, its input and the gradient that autograd delivered, in whatever type.
            batch: the micro-batch.
            weight: the draw's share of the expectation (1 / draws; 1 for a column of the exact root).
            scale: g times this is the gradient of one sample's negative log-likelihood.
        """
        layer, x, g = part
        dtype = statistics_dtype(layer.dtype)
        if layer.joint:
            moment = layer.gradient_moment(x, g.to(dtype), batch.size, dtype)
            _add(self._gradients, (layer.name, "A"), _times(moment, weight * scale**2))
        elif self._output_side:
            # The gradient of a shared call is a sum over samples. At sampled targets they are independent with mean 0,
            # and the moment of the sum is, in expectation, the sum of the moments.
            samples = samples_of(layer, layer.rows(g), batch, layer.shared(x, batch.size))
            moment = layer.output_moment(g.to(dtype), dtype, samples)
            side: Side = "G" if layer.input_side == "A" else "A"
            _add(self._gradients, (layer.name, side), _times(moment, weight * scale**2))

    def rescale_outputs(self, factor: float) -> None:
        """Multiply what is made of gradients by ``factor`` (a gradient scaler's, squared and inverted)."""
        if factor != 1.0:
            self._gradients = {key: moment * factor for key, moment in self._gradients.items()}

    def finite(self) -> bool:
        """Whether every sum is finite (one synchronisation)."""
        sums = [*self._inputs.values(), *self._gradients.values()]
        return not sums or bool(torch.stack([s.sum() for s in sums]).isfinite().all())


def _times(moment: Tensor, factor: float) -> Tensor:
    return moment if factor == 1.0 else moment * factor


def _add(sums: dict[Key, Tensor], key: Key, moment: Tensor) -> None:
    sums[key] = sums[key] + moment if key in sums else moment
