"""nn.Conv1d, Conv2d and Conv3d: any stride, dilation, padding (numbers, "same", "valid"), padding mode and groups."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.factors import with_ones
from kfac_dist.layers.autocorrelation import Patches
from kfac_dist.layers.base import layers
from kfac_dist.layers.convolution import Convolution

FORWARD = (F.conv1d, F.conv2d, F.conv3d)


@layers.register("conv")
class ConvLayer(Convolution):
    """A convolution of one, two or three dimensions."""

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    transposed = False

    def _padding(self) -> list[int]:
        """(before, after) from the last dimension to the first, as F.pad wants it; "same" puts the odd one after."""
        conv = self.module
        sides: list[int] = []
        for axis in reversed(range(self.dimensions)):
            if conv.padding == "same":
                total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
                sides += [total // 2, total - total // 2]
            else:
                sides += [0 if conv.padding == "valid" else int(conv.padding[axis])] * 2
        return sides

    def _padded(self, x: Tensor) -> Tensor:
        """The input with a batch dimension and its padding made explicit."""
        x, sides, mode = self.batched(x), self._padding(), self.module.padding_mode
        return F.pad(x, sides, mode="constant" if mode == "zeros" else mode) if any(sides) else x

    def input_rows(self, x: Tensor) -> Tensor:
        """(B, C_in, *size) as patches (groups, B T, C_in / groups * kernel)."""
        return self.windows(self._padded(x), self.module.stride)

    def input_moment(
        self, x: Tensor, dtype: torch.dtype, weights: Tensor | None = None, samples: int | None = None
    ) -> Tensor:
        """See :meth:`Layer.input_moment`; without patches where their overlap makes that cheaper."""
        flat = None
        if weights is None and samples is None and self.has_weight and self.factors["A"].blocks == 1:
            flat = self._overlapping(x)
        if flat is None:
            return super().input_moment(x, dtype, weights, samples)
        flat = replace(flat, maps=flat.maps.to(dtype))
        moment = flat.moment()[None]
        return with_ones(moment, flat.sum()[None], flat.count) if self.has_bias else moment

    def _overlapping(self, x: Tensor) -> Patches | None:
        """The patches of ``x`` where their second moment is cheaper without cutting them out; else None."""
        conv = self.module
        if self.groups > 1 or self.dimensions > 2 or any(n > 1 for n in (*conv.stride, *conv.dilation)):
            return None
        zeros = conv.padding_mode == "zeros"
        maps, sides = (self.batched(x), self._padding()) if zeros else (self._padded(x), [0] * 2 * self.dimensions)
        rows, columns = (1, *conv.kernel_size)[-2:]
        if self.dimensions == 1:
            maps, sides = maps[:, :, None], [*sides, 0, 0]
        patches = Patches(maps, (rows, columns), ((sides[2], sides[3]), (sides[0], sides[1])))
        return patches if patches.pays else None

    def forward_with(self, x: Tensor, theta: Tensor) -> Tensor:
        """See :meth:`Layer.forward_with`."""
        conv = self.module
        weight, bias = self.parameters_of(theta)
        return FORWARD[self.dimensions - 1](self._padded(x), weight, bias, conv.stride, 0, conv.dilation, conv.groups)

    def parameter_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """See :meth:`Layer.parameter_gradient`."""
        none = [0] * self.dimensions
        return self.gradient_by(self._padded(x), self.batched(g), padding=none, output_padding=none)
