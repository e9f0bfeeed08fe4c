"""The linear map of rows of features that nn.Linear, attention and recurrent modules share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kfac_dist.config import LayerOptions
from kfac_dist.layers.base import Layer
from kfac_dist.layers.watch import Record


class LinearMap(Layer):
    """y = W x + b over rows of features (Martens and Grosse 2015, section 3)."""

    def input_rows(self, x: Tensor) -> Tensor:
        """(.., d_in) as (1, R, d_in)."""
        return x.reshape(1, -1, x.shape[-1])

    def output_rows(self, g: Tensor) -> Tensor:
        """(.., d_out) as (1, R, d_out)."""
        return g.reshape(1, -1, g.shape[-1])

    def rows_with_ones(self, x: Tensor) -> Tensor:
        """The rows a of (.., d_in), with the 1 of a trained bias: (1, R, a), a copy where there is one."""
        rows = self.input_rows(x)
        return torch.cat([rows, rows.new_ones(1, rows.shape[1], 1)], dim=-1) if self.has_bias else rows

    def forward_with(self, x: Tensor, theta: Tensor) -> Tensor:
        """See :meth:`Layer.forward_with`."""
        weight, bias = self.from_matrix(theta)
        if weight is None:
            return bias.expand(*x.shape[:-1], -1)  # type: ignore[union-attr]
        return F.linear(x, weight, bias)

    def parameter_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """See :meth:`Layer.parameter_gradient`."""
        rows = self.output_rows(g)
        parts = [(rows.mT @ self.input_rows(x))[0]] if self.has_weight else []
        if self.has_bias:
            parts.append(rows.sum(1)[0])
        return self.to_matrix(*parts)


class MapOfSeveral(LinearMap):
    """One of the linear maps of a module that holds several, whose calls are heard of together."""

    siblings: Sequence[MapOfSeveral] = ()
    """The maps of the module that are not skipped, this one among them."""

    @staticmethod
    def together(maps: Sequence[MapOfSeveral], options: LayerOptions) -> Sequence[MapOfSeveral]:
        """``maps``, which are all that one module has."""
        siblings = [one for one in maps if not options.skips(one.name, type(one.module).__name__)]
        for one in siblings:
            one.siblings = siblings
        return maps

    def watch(self, record: Record) -> list[RemovableHandle]:
        """See :meth:`Layer.watch`: the first sibling hooks the module for all of them."""
        return self.watch_siblings(record) if self is self.siblings[0] else []

    @abstractmethod
    def watch_siblings(self, record: Record) -> list[RemovableHandle]:
        """Hook the module."""
