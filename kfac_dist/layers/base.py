"""What the method needs to know of a layer, and the matrix view of its parameters.

Shapes: Theta = [W | b] is (groups, d_out, d_in), the bias the LAST column, with d_in = C_in / groups * kernel (+ 1 with
a trainable bias) in the order of ``F.unfold``; groups = 1 but for grouped convolutions. The concatenation comes before
any flattening: [W.flatten(), b] viewed as a matrix would mix up every entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from kfac_dist.factors import second_moment_sum
from kfac_dist.registry import Registry


class Layer(ABC):
    """One preconditioned module.

    Args:
        name: the module's name in the model.
        module: the module; it has a parameter ``weight`` (d_out * groups, d_in, ..) and perhaps ``bias``.
        groups: number of independent blocks.
    """

    def __init__(self, name: str, module: nn.Module, groups: int = 1) -> None:
        self.name = name
        self.module = module
        self.groups = groups
        bias = module._parameters.get("bias")
        self.has_bias = bias is not None and bias.requires_grad
        weight = self.weight
        self.output_dim = weight.shape[0] // groups
        self.input_dim = weight[0].numel() + self.has_bias

    @classmethod
    @abstractmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """None where this class treats ``module``; else the reason, or "" where it is no module of this kind."""

    @abstractmethod
    def input_rows(self, x: Tensor) -> Tensor:
        """The input as rows (groups, R, d_in without bias), samples outermost."""

    @abstractmethod
    def output_rows(self, g: Tensor) -> Tensor:
        """The output's gradient as rows (groups, R, d_out), in the same order."""

    @abstractmethod
    def forward_with(self, x: Tensor, theta: Tensor) -> Tensor:
        """The layer's own forward with Theta in the place of its parameters (a frozen bias is left out)."""

    @abstractmethod
    def parameter_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Sum over samples and locations of g a^T, as a Theta."""

    @property
    def weight(self) -> nn.Parameter:
        """The weight parameter."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The trainable parameters that Theta consists of."""
        return (self.weight, self.module.bias) if self.has_bias else (self.weight,)  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of Theta."""
        return self.groups, self.output_dim, self.input_dim

    @property
    def device(self) -> torch.device:
        """Where the layer lives."""
        return self.weight.device

    def rows(self, g: Tensor) -> int:
        """R: samples times locations of an output (or its gradient)."""
        return g.numel() // (self.groups * self.output_dim)

    def input_moment(self, x: Tensor, dtype: torch.dtype, weights: Tensor | None = None) -> Tensor:
        """Sum over rows of a a^T with a = [x, 1] where there is a bias; (groups, d_in, d_in)."""
        return second_moment_sum(self.input_rows(x).to(dtype), ones=self.has_bias, weights=weights)

    def output_moment(self, g: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum over rows of g g^T; (groups, d_out, d_out)."""
        return second_moment_sum(self.output_rows(g).to(dtype))

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[W | b] of tensors shaped like the parameters; ``bias`` counts only where the layer trains one."""
        matrix = weight.reshape(self.groups, self.output_dim, -1)
        if not self.has_bias:
            return matrix
        if bias is None:
            raise ValueError(f"layer {self.name!r} trains a bias: its matrix needs one")
        return torch.cat([matrix, bias.reshape(self.groups, self.output_dim, 1)], dim=-1)

    def from_matrix(self, theta: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inverse of :meth:`to_matrix`: views or copies shaped like the parameters.

        ``theta`` may have any number of rows per group; the first dimension of the weight follows it.
        """
        shape = (-1, *self.weight.shape[1:])
        if not self.has_bias:
            return theta.reshape(shape), None
        return theta[..., :-1].reshape(shape), theta[..., -1].reshape(-1)

    def gradient(self) -> Tensor | None:
        """The matrix of ``param.grad``, None where one is missing; a new tensor, since the step overwrites them."""
        weight = self.weight.grad
        if weight is None or not self.has_bias:
            return None if weight is None else self.to_matrix(weight, None).clone()
        bias = self.parameters[1].grad
        return None if bias is None else self.to_matrix(weight, bias)

    def write_gradient(self, theta: Tensor) -> None:
        """``param.grad.copy_`` of the matrix, in place: gradient buckets stay views."""
        for parameter, value in zip(self.parameters, self.from_matrix(theta), strict=False):
            parameter.grad.copy_(value)  # type: ignore[union-attr,arg-type]


def parameter_refusal(module: nn.Module) -> str | None:
    """Why the module's parameters cannot be seen as a matrix that is trained; None where they can."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters (a parametrization)"
    if not weight.requires_grad:
        return "its weight is frozen"
    if weight.is_complex():
        return "its weight is complex"
    return None


layers: Registry[type[Layer]] = Registry("layer")
