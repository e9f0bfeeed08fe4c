"""nn.Conv2d: any stride, dilation, padding (numbers, "same", "valid") and padding mode, and groups.

The factors are those of KFC (Grosse and Martens 2016): locations count like samples, and the block carries one factor
T = H_out W_out. Groups have a pair of factors each; their cross-covariance is not modelled.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from kfac_dist.layers.base import Layer, layers, parameter_refusal


@layers.register("conv2d")
class Conv2dLayer(Layer):
    """A two-dimensional convolution, seen as a linear map of patches."""

    module: nn.Conv2d

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        super().__init__(name, module, groups=module.groups)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """See :meth:`Layer.refusal`."""
        if not isinstance(module, nn.Conv2d):
            return ""
        own = (nn.Conv2d.forward, nn.Conv2d._conv_forward)
        if (type(module).forward, type(module)._conv_forward) != own:
            return f"{type(module).__name__} is a Conv2d with a forward of its own"
        return parameter_refusal(module)

    def _padding(self) -> list[int]:
        """(left, right, top, bottom), as F.pad wants it; "same" puts the odd pixel last, as torch does."""
        conv = self.module
        if conv.padding == "valid":
            return [0, 0, 0, 0]
        sides: list[int] = []
        for axis in (1, 0):
            if conv.padding == "same":
                total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
                sides += [total // 2, total - total // 2]
            else:
                sides += [int(conv.padding[axis])] * 2
        return sides

    def _padded(self, x: Tensor) -> Tensor:
        """The input with a batch dimension and its padding made explicit."""
        x = x if x.dim() == 4 else x[None]
        sides = self._padding()
        mode = self.module.padding_mode
        return F.pad(x, sides, mode="constant" if mode == "zeros" else mode) if any(sides) else x

    def _by_group(self, columns: Tensor) -> Tensor:
        """(B, C, T) to (groups, B T, C / groups)."""
        batch, channels, locations = columns.shape
        split = columns.reshape(batch, self.groups, channels // self.groups, locations)
        return split.permute(1, 0, 3, 2).reshape(self.groups, batch * locations, channels // self.groups)

    def input_rows(self, x: Tensor) -> Tensor:
        """(B, C, H, W) as patches (groups, B T, C / groups * kh * kw)."""
        conv = self.module
        return self._by_group(F.unfold(self._padded(x), conv.kernel_size, conv.dilation, 0, conv.stride))

    def output_rows(self, g: Tensor) -> Tensor:
        """(B, C_out, H, W) as (groups, B T, C_out / groups)."""
        g = g if g.dim() == 4 else g[None]
        return self._by_group(g.flatten(2))

    def forward_with(self, x: Tensor, theta: Tensor) -> Tensor:
        """See :meth:`Layer.forward_with`."""
        conv = self.module
        weight, bias = self.from_matrix(theta)
        if weight is None:  # only the bias is trained: the constant at every location
            weight = x.new_zeros(len(bias), *self.weight.shape[1:])  # type: ignore[arg-type]
        return F.conv2d(self._padded(x), weight, bias, conv.stride, 0, conv.dilation, conv.groups)

    def parameter_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """See :meth:`Layer.parameter_gradient`."""
        conv = self.module
        g = g if g.dim() == 4 else g[None]
        padded, shape = self._padded(x), list(self.weight.shape)
        weight = conv2d_weight(padded, shape, g, conv.stride, 0, conv.dilation, conv.groups)
        return self.to_matrix(*([weight] * self.has_weight + [g.sum((0, 2, 3))] * self.has_bias))
