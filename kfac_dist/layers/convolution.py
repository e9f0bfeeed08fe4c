"""What convolutions share, transposed or not: maps of one, two or three dimensions as rows of patches and of channels.

The factors are those of KFC (Grosse and Martens 2016): locations count like samples, and with "expand" the block
carries one factor T, the number of output locations. Groups have a pair of factors each; their cross-covariance is not
modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kfac_dist.layers.base import Layer, parameter_refusal


class Convolution(Layer):
    """A convolution, seen as a linear map of patches: (groups, C_out / groups, C_in / groups * kernel [+ 1])."""

    module: _ConvNd
    kinds: ClassVar[tuple[type[nn.Module], ...]]
    """The modules of one, two and three dimensions."""
    transposed: ClassVar[bool]

    def __init__(self, name: str, module: _ConvNd) -> None:
        super().__init__(name, module, groups=module.groups)
        self.dimensions = len(module.kernel_size)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """See :meth:`Layer.refusal`."""
        kind = next((kind for kind in cls.kinds if isinstance(module, kind)), None)
        if kind is None:
            return ""
        if any(getattr(type(module), name) is not getattr(kind, name) for name in ("forward", "_conv_forward")):
            return f"{type(module).__name__} is a {kind.__name__} with a forward of its own"
        return parameter_refusal(module)

    def batched(self, x: Tensor) -> Tensor:
        """The map with a batch dimension."""
        return x if x.dim() == self.dimensions + 2 else x[None]

    def windows(self, x: Tensor, stride: Sequence[int]) -> Tensor:
        """A padded map (B, C, *size) as patches (groups, B T, C / groups * kernel), those of ``transposed`` flipped.

        The windows are views; the one copy is made where they become rows.
        """
        conv, n = self.module, self.dimensions
        cut: Tensor = x.unflatten(1, (self.groups, -1))
        for axis, (kernel, step, dilation) in enumerate(zip(conv.kernel_size, stride, conv.dilation, strict=True)):
            cut = cut.unfold(3 + axis, dilation * (kernel - 1) + 1, step)[..., ::dilation]
        rows = cut.permute(1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
        if self.transposed:
            rows = rows.flip(tuple(range(-n, 0)))
        return rows.flatten(2 + n).flatten(1, 1 + n)

    def output_rows(self, g: Tensor) -> Tensor:
        """(B, C_out, *size) as (groups, B T, C_out / groups), channel by channel in memory: products are faster so."""
        channels: Tensor = self.batched(g).flatten(2).unflatten(1, (self.groups, -1))
        return channels.permute(1, 2, 0, 3).flatten(2).mT

    def parameters_of(self, theta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a Theta; where only the bias is trained, the weight is zero."""
        weight, bias = self.from_matrix(theta)
        if weight is None:
            columns = self.weight_to_matrix(self.weight.detach()).shape[2]
            weight = self.matrix_to_weight(theta.new_zeros(*theta.shape[:2], columns))
        return weight, bias

    def gradient_by(self, x: Tensor, g: Tensor, padding: Sequence[int], output_padding: Sequence[int]) -> Tensor:
        """The gradient of the weight and the bias, as a Theta; ``padding`` is what ``x`` does not hold yet."""
        conv, parts = self.module, []
        if self.has_weight:
            shape = x.new_empty(1).expand(self.weight.shape)  # no value of the weight enters its gradient
            how = (conv.stride, padding, conv.dilation, self.transposed, output_padding, conv.groups)
            parts.append(torch.ops.aten.convolution_backward(g, x, shape, None, *how, (False, True, False))[1])
        if self.has_bias:
            parts.append(g.transpose(0, 1).flatten(1).sum(1))
        return self.to_matrix(*parts)
