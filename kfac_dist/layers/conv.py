"""nn.Conv1d, Conv2d and Conv3d: any stride, dilation, padding (numbers, "same", "valid"), padding mode and groups."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

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

    def forward_with(self, x: Tensor, theta: Tensor) -> Tensor:
        """See :meth:`Layer.forward_with`."""
        conv = self.module
        weight, bias = self.parameters_of(theta)
        return FORWARD[self.dimensions - 1](self._padded(x), weight, bias, conv.stride, 0, conv.dilation, conv.groups)

    def parameter_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """See :meth:`Layer.parameter_gradient`."""
        none = [0] * self.dimensions
        return self.gradient_by(self._padded(x), self.batched(g), padding=none, output_padding=none)
