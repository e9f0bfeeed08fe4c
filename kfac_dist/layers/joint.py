"""What layers have in common whose Fisher block is stored itself, as a second moment of whole gradients.

Theta is one row of all trainable parameters, (1, 1, p), and the block (1/B) sum over samples of u u^T with u (p,) the
gradient of one sample, summed over its locations. Calls of a shared module count one by one, as they do elsewhere.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfac_dist.factors import FactorShape, second_moment_sum
from kfac_dist.layers.base import Layer, Side


class JointLayer(Layer):
    """A layer with one factor, its Fisher block, or diagonal blocks of it.

    Args:
        name: the module's name in the model.
        module: the module that computes with the parameters.
        names: its trainable parameters, by their (dotted) names in the module.
    """

    sides: tuple[Side, ...] = ("A",)

    def __init__(self, name: str, module: nn.Module, names: Sequence[str]) -> None:
        self.name = name
        self.module = module
        self.groups = 1
        self.approximation = "expand"  # a sample's locations are summed exactly: there is nothing to choose
        self.names = tuple(names)
        self.output_dim, self.input_dim = 1, sum(parameter.numel() for parameter in self.parameters)
        self.factors = {"A": FactorShape(1, self.input_dim)}

    @abstractmethod
    def sample_gradients(self, x: Tensor, g: Tensor, samples: int) -> Tensor:
        """The gradient of each of so many samples, as rows (samples, p)."""

    def gradient_moment(self, x: Tensor, g: Tensor, samples: int, dtype: torch.dtype) -> Tensor:
        """See :meth:`Layer.gradient_moment`."""
        rows = self.sample_gradients(x, g, samples).to(dtype)
        return second_moment_sum(rows[None], blocks=self.factors["A"].blocks)

    def parameter_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """See :meth:`Layer.parameter_gradient`."""
        return self.sample_gradients(x, g, 1)[None]

    def input_rows(self, x: Tensor) -> Tensor:
        """There are none: inputs and gradients of a joint layer are never seen apart."""
        raise TypeError(f"layer {self.name!r} has one factor of whole gradients, and no rows of inputs")

    def output_rows(self, g: Tensor) -> Tensor:
        """There are none, see :meth:`input_rows`."""
        raise TypeError(f"layer {self.name!r} has one factor of whole gradients, and no rows of outputs")

    # -- parameters -----------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """See :attr:`Layer.parameters`."""
        return tuple(self.module.get_parameter(name) for name in self.names)

    @property
    def views(self) -> tuple[Tensor, ...]:
        """See :attr:`Layer.views`."""
        return tuple(parameter.detach() for parameter in self.parameters)

    def part(self, tensor: Tensor) -> Tensor:
        """All of it: no other layer owns a part of these parameters."""
        return tensor

    def to_matrix(self, *parts: Tensor | None) -> Tensor:
        """The parts one after the other, (1, 1, p)."""
        return torch.cat([part.reshape(-1) for part in parts if part is not None])[None, None]

    def parts(self, theta: Tensor) -> list[Tensor]:
        """See :meth:`Layer.parts`."""
        parameters = self.parameters
        cut = theta.reshape(-1).split([parameter.numel() for parameter in parameters])
        return [part.view(parameter.shape) for part, parameter in zip(cut, parameters, strict=True)]

    def gradient(self) -> Tensor | None:
        """See :meth:`Layer.gradient`."""
        gradients = [parameter.grad for parameter in self.parameters]
        return None if any(gradient is None for gradient in gradients) else self.to_matrix(*gradients)
