"""nn.Linear over any number of leading dimensions; with "expand" every position is a location of its own."""

from __future__ import annotations

from torch import Tensor, nn

from kfac_dist.layers.base import layers, parameter_refusal
from kfac_dist.layers.linear_map import LinearMap


@layers.register("linear")
class LinearLayer(LinearMap):
    """nn.Linear."""

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """See :meth:`Layer.refusal`."""
        if not isinstance(module, nn.Linear):
            return ""
        if type(module).forward is not nn.Linear.forward:
            return f"{type(module).__name__} is a Linear with a forward of its own"
        return parameter_refusal(module)

    def leading(self, x: Tensor) -> int:
        """See :meth:`Layer.leading`: all but the features."""
        return x.dim() - 1
