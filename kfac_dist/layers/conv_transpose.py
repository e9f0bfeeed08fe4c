"""nn.ConvTranspose1d, 2d and 3d: any stride, dilation, padding, output padding (or output_size) and groups.

A transposed convolution is a convolution of stride 1, with the kernel flipped, of the input with stride - 1 zeros
between its entries. So its rows are the flipped patches of that stretched map, and T counts locations of the OUTPUT.
Where the stride is large, most entries of a patch are those zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from kfac_dist.layers.base import layers
from kfac_dist.layers.convolution import Convolution
from kfac_dist.layers.watch import Part, Record, watch_calls

FORWARD: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@layers.register("conv_transpose")
class ConvTransposeLayer(Convolution):
    """A transposed convolution of one, two or three dimensions; the weight is (C_in, C_out / groups, *kernel)."""

    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    transposed = True

    def __init__(self, name: str, module: _ConvTransposeNd) -> None:
        super().__init__(name, module)
        self.output_padding: Sequence[int] = tuple(module.output_padding)

    def watch(self, record: Record) -> list[RemovableHandle]:
        """See :meth:`Layer.watch`; a call's own output padding is part of it."""
        return watch_calls(self, record, lambda x, g: Part(self.called(x, g), x, g))

    def called(self, x: Tensor, g: Tensor) -> ConvTransposeLayer:
        """The layer with the output padding of a call: ``output_size`` takes the place of the module's own."""
        conv, n = self.module, self.dimensions
        each = zip(x.shape[-n:], g.shape[-n:], conv.stride, conv.padding, conv.dilation, conv.kernel_size, strict=True)
        padding = tuple(
            out - ((size - 1) * stride - 2 * int(pad) + dilation * (kernel - 1) + 1)
            for size, out, stride, pad, dilation, kernel in each
        )
        if padding == self.output_padding:
            return self
        other = copy.copy(self)
        other.output_padding = padding
        return other

    def weight_to_matrix(self, weight: Tensor) -> Tensor:
        """(C_in, C_out / groups, *kernel) as (groups, C_out / groups, C_in / groups * kernel)."""
        blocks: Tensor = weight.unflatten(0, (self.groups, -1))
        return blocks.transpose(1, 2).flatten(2)

    def matrix_to_weight(self, matrix: Tensor) -> Tensor:
        """See :meth:`Layer.matrix_to_weight`."""
        blocks: Tensor = matrix.unflatten(2, (-1, *self.module.kernel_size))
        return blocks.transpose(1, 2).flatten(0, 1)

    def input_rows(self, x: Tensor) -> Tensor:
        """(B, C_in, *size) as patches of the stretched map, (groups, B T, C_in / groups * kernel)."""
        conv, x = self.module, self.batched(x)
        size = [(length - 1) * stride + 1 for length, stride in zip(x.shape[2:], conv.stride, strict=True)]
        stretched = x.new_zeros(*x.shape[:2], *size)
        places: tuple[Any, ...] = (..., *(slice(None, None, stride) for stride in conv.stride))
        stretched[places] = x
        sides: list[int] = []  # from the last dimension to the first; below zero they cut off
        for axis in reversed(range(self.dimensions)):
            before = conv.dilation[axis] * (conv.kernel_size[axis] - 1) - int(conv.padding[axis])
            sides += [before, before + self.output_padding[axis]]
        return self.windows(F.pad(stretched, sides), [1] * self.dimensions)

    def forward_with(self, x: Tensor, theta: Tensor) -> Tensor:
        """See :meth:`Layer.forward_with`."""
        conv = self.module
        how = (conv.stride, conv.padding, self.output_padding, conv.groups, conv.dilation)
        return FORWARD[self.dimensions - 1](x, *self.parameters_of(theta), *how)

    def parameter_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """See :meth:`Layer.parameter_gradient`."""
        padding = [int(pad) for pad in self.module.padding]
        return self.gradient_by(self.batched(x), self.batched(g), padding, self.output_padding)
