"""nn.Linear over any number of leading dimensions; every position is a location of its own ("expand")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.layers.base import Layer, layers, parameter_refusal


@layers.register("linear")
class LinearLayer(Layer):
    """y = W x + b; Martens and Grosse 2015, section 3."""

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """See :meth:`Layer.refusal`."""
        if not isinstance(module, nn.Linear):
            return ""
        if type(module).forward is not nn.Linear.forward:
            return f"{type(module).__name__} is a Linear with a forward of its own"
        return parameter_refusal(module)

    def input_rows(self, x: Tensor) -> Tensor:
        """(.., d_in) as (1, R, d_in)."""
        return x.reshape(1, -1, x.shape[-1])

    def output_rows(self, g: Tensor) -> Tensor:
        """(.., d_out) as (1, R, d_out)."""
        return g.reshape(1, -1, g.shape[-1])

    def forward_with(self, x: Tensor, theta: Tensor) -> Tensor:
        """See :meth:`Layer.forward_with`."""
        return F.linear(x, *self.from_matrix(theta))

    def parameter_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """See :meth:`Layer.parameter_gradient`."""
        rows_g = self.output_rows(g)
        gradient = rows_g.mT @ self.input_rows(x)
        return torch.cat([gradient, rows_g.sum(1)[..., None]], dim=-1) if self.has_bias else gradient
