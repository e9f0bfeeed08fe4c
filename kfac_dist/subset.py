"""A share of the samples, for factors that need not see all of them.

A hash of (seed, step, sample id) says which, as it says what is drawn for them: many ranks take those that one would.
However many they are, every set of so many is as likely as any other, so that the mean over them, which a factor is, is
unbiased. Its variance is that of a batch of their number: with a share s the error of a factor is 1 / sqrt(s) times
what the batch itself makes of it, before the moving average.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_dist.draws import uniforms
from kfac_dist.layers import Part
from kfac_dist.statistics import MicroBatch

_DRAW = -1  # those of targets are not negative


@dataclass(frozen=True)
class Subset:
    """Samples of a micro-batch.

    Attributes:
        batch: what is known of these samples alone.
        size: of the whole micro-batch.
        places: (n,) their indices in it; None: all of them.
    """

    batch: MicroBatch
    size: int
    places: Tensor | None = None

    @classmethod
    def of(cls, batch: MicroBatch, share: float, seed: int, step: int, ids: Tensor) -> Subset:
        """The samples of ``batch``, with global ``ids`` (B,), that are chosen at this step."""
        if share == 1.0:
            return cls(batch, batch.size)
        places = (uniforms(seed, step, _DRAW, ids, 1)[:, 0] < share).nonzero()[:, 0]
        valid, mask = float(len(places)), None
        if batch.mask is not None:
            mask = batch.mask[places]
            valid = float(mask.reshape(len(mask), -1).any(1).sum()) if mask.numel() else 0.0
        return cls(replace(batch, size=len(places), valid=valid, mask=mask), batch.size, places)

    def __bool__(self) -> bool:
        return self.batch.size > 0

    def part(self, part: Part) -> Part:
        """What a call was to these samples.

        Raises:
            ValueError: samples cannot be told apart in it, or share an output.
        """
        if self.places is None:
            return part
        layer, x, g = part
        if layer.shared(x, self.size) or any(not t.dim() or t.shape[0] % self.size for t in (x, g)):
            raise ValueError(
                f"layer {layer.name!r} has an input of shape {tuple(x.shape)} and an output of shape {tuple(g.shape)} "
                f"for {self.size} samples: factor_samples below 1 must tell samples apart. Put the batch first (expand "
                "what they share), set factor_samples=1, or add the layer to skip_layers"
            )
        return Part(layer, self._rows(x), self._rows(g))

    def _rows(self, tensor: Tensor) -> Tensor:
        """Theirs, of a tensor in which other dimensions may be folded behind the samples."""
        assert self.places is not None  # part() asks for rows of some samples only
        return torch.index_select(tensor.unflatten(0, (self.size, -1)), 0, self.places).flatten(0, 1)
