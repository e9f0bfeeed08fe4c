"""What the method needs to know of a layer, and the matrix view of its parameters.

Shapes: Theta = [W | b] is (groups, d_out, d_in), the bias the LAST column, with d_in = C_in / groups * kernel (+ 1 with
a trainable bias) in the order of ``F.unfold``; groups = 1 but for grouped convolutions. The concatenation comes before
any flattening: [W.flatten(), b] viewed as a matrix would mix up every entry. A frozen weight or bias is left out; a
trainable bias alone is the one column of the constant 1.

Samples lie outermost in every x and g that a layer is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfac_dist.config import LayerOptions
from kfac_dist.factors import FactorShape, second_moment_sum
from kfac_dist.layers.watch import Record, watch_calls
from kfac_dist.registry import Registry

Side = Literal["A", "G"]


class Layer(ABC):
    """One Kronecker-factored block: the trainable parameters of a module, or of a part of one.

    Args:
        name: the module's name in the model.
        module: the module that computes with the parameters.
        groups: number of independent blocks.
        weight: name of the module's weight parameter, (d_out * groups, d_in, ..).
        bias: name of its bias parameter.
        rows: the rows of both that belong to this layer; None: all.
    """

    sides: tuple[Side, ...] = ("A", "G")
    """The factors of the block; ("A",) where A is the block itself, the second moment of whole gradients."""

    input_side: Side = "A"
    """The factor that inputs are part of; "G" where the calls are those of a table that is the weight of a linear map.

    There the gradients are part of A, and one-hot vectors are in the place of Theta's rows.
    """

    uses: Sequence[Layer] = ()
    """The calls of other modules that share the weight, each with a forward of its own and this layer's name."""

    last_resort: bool = False
    """Whether the family takes modules of any kind, and so is asked last, and where it is wanted only."""

    trouble: str | None = None
    """Why the layer's calls cannot be recorded, where only a call could tell: it keeps its plain gradient then."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        groups: int = 1,
        weight: str = "weight",
        bias: str = "bias",
        rows: slice | None = None,
    ) -> None:
        self.name = name
        self.module = module
        self.groups = groups
        self.approximation = "expand"
        self._names = (weight, bias)
        self._rows = rows
        trained = [p is not None and p.requires_grad for p in (self._parameter(weight), self._parameter(bias))]
        self.has_weight, self.has_bias = trained
        matrix = self.weight_to_matrix(self.part(self._parameter(weight)))  # type: ignore[arg-type]
        self.output_dim = matrix.shape[1]
        self.input_dim = matrix.shape[2] * self.has_weight + self.has_bias
        self.factors = {side: FactorShape(groups, self._dim(side)) for side in self.sides}

    # -- what a layer family says ---------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """None where this class treats ``module``; else the reason, or "" where it is no module of this kind."""

    @classmethod
    def adapt(cls, name: str, module: nn.Module, options: LayerOptions) -> Sequence[Layer]:
        """The layers of a module that is not refused: one, named like the module, unless a family says otherwise."""
        return [cls(name, module)]

    @classmethod
    def claims(cls, module: nn.Module) -> Sequence[nn.Module]:
        """Submodules that ``module``, of this kind, never calls: it computes with their parameters itself."""
        return ()

    @classmethod
    def left_out(cls, module: nn.Module) -> Sequence[str]:
        """The trained parameters of a module that is not refused which none of its layers holds."""
        return ()

    @abstractmethod
    def input_rows(self, x: Tensor) -> Tensor:
        """The input as rows (groups, R, d_in without bias)."""

    @abstractmethod
    def output_rows(self, g: Tensor) -> Tensor:
        """The output's gradient as rows (groups, R, d_out), in the same order."""

    @abstractmethod
    def forward_with(self, x: Tensor, theta: Tensor) -> Tensor:
        """The layer's own forward with Theta in the place of its parameters; what is frozen is left out.

        ``theta`` may have any number of rows per group, which is the number of outputs then.
        """

    @abstractmethod
    def parameter_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Sum over samples and locations of g a^T, as a Theta."""

    def watch(self, record: Record) -> list[RemovableHandle]:
        """Hook the module, so that ``record`` hears of every call: its input, its output, and whose gradient that is.

        A layer of a module with several layers may leave the hooks to the first of them.
        """
        return watch_calls(self, record)

    def row_weights(self, x: Tensor) -> Tensor | None:
        """Zeros and ones (R,): the rows of a call that reach the parameters; None: all of them."""
        return None

    def leading(self, x: Tensor) -> int:
        """How many dimensions of ``x``, and of g, are samples and locations in any order; 1: the samples come first."""
        return 1

    def shared(self, x: Tensor, samples: int) -> bool:
        """Whether one output serves so many samples at once (positions), so that its gradient is the sum of theirs."""
        return False

    @classmethod
    def use_of(cls, owner: Layer, module: nn.Module) -> Layer | None:
        """The calls of ``module``, which shares its weight with ``owner``, as calls of that layer; None: cannot be.

        Args:
            owner: a layer of any family, with a bias only where the modules of that family share it.
            module: one that this family treats.
        """
        found = list(cls.adapt(owner.name, module, LayerOptions()))
        if len(found) != 1 or type(found[0]) is not type(owner):
            return None
        if not owner.has_bias:
            found[0].leave_bias()
        found[0].factors = owner.factors
        return found[0] if found[0].shape == owner.shape else None

    def weight_to_matrix(self, weight: Tensor) -> Tensor:
        """A tensor shaped like the weight, as (groups, d_out, d_in without bias)."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def matrix_to_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`weight_to_matrix`, for any number of rows per group."""
        return matrix.reshape(-1, *self.weight.shape[1:])

    # -- sizes ----------------------------------------------------------------------------------------------------

    def _dim(self, side: Side) -> int:
        return self.input_dim if side == "A" else self.output_dim

    def configure(self, options: LayerOptions) -> str | None:
        """Take over what the user chose for layers like this one; returns what is to be said of it, or None."""
        for use in (self, *self.uses):
            use.approximation = options.approximation(self.name, type(self.module).__name__)
        cut = []
        for side, shape in self.factors.items():
            if shape.size > options.max_factor_dim:
                limit = options.max_factor_dim if options.large_factors == "blocks" else 1
                self.factors[side] = FactorShape.limited(self.groups, shape.dim, limit)
                form = "diagonal" if self.factors[side].size == 1 else f"{self.factors[side].blocks} diagonal blocks"
                cut.append(f"{side} of order {shape.dim} becomes {form}")
        return ", ".join(cut) or None

    def leave_bias(self) -> None:
        """Leave the bias out of Theta: it keeps its plain gradient. Before :meth:`configure` only."""
        if self.has_bias:
            self.has_bias = False
            self.input_dim -= 1
            self.factors["A"] = FactorShape(self.groups, self.input_dim)

    @property
    def joint(self) -> bool:
        """Whether A is the layer's Fisher block itself, made of whole gradients of samples."""
        return self.sides == ("A",)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of Theta."""
        return self.groups, self.output_dim, self.input_dim

    def rows(self, g: Tensor) -> int:
        """R: samples times locations of an output (or its gradient)."""
        return g.numel() // (self.groups * self.output_dim)

    # -- moments --------------------------------------------------------------------------------------------------

    def input_moment(
        self, x: Tensor, dtype: torch.dtype, weights: Tensor | None = None, samples: int | None = None
    ) -> Tensor:
        """Sum over rows of a a^T with a = [x, 1] where there is a bias; stored as ``factors["A"]`` says.

        Args:
            x: the input.
            dtype: the type of the sums.
            weights: (R,) zeros and ones; rows of weight 0 do not count.
            samples: average the rows of each of so many samples first ("reduce"); None: every row for itself.
        """
        rows = self.input_rows(x).to(dtype)
        if not self.has_weight:
            rows = rows[..., :0]
        if samples is not None:
            rows, weights = average_locations(rows, samples, weights)
        return second_moment_sum(rows, ones=self.has_bias, weights=weights, blocks=self.factors["A"].blocks)

    def output_moment(self, g: Tensor, dtype: torch.dtype, samples: int | None = None) -> Tensor:
        """Sum over rows of g g^T, as ``factors["G"]`` says; with ``samples`` their locations are summed first."""
        rows = self.output_rows(g).to(dtype)
        if samples is not None:
            rows = rows.view(self.groups, samples, -1, self.output_dim).sum(2)
        return second_moment_sum(rows, blocks=self.factors["G"].blocks)

    def gradient_moment(self, x: Tensor, g: Tensor, samples: int, dtype: torch.dtype) -> Tensor:
        """Sum over samples of u u^T, u the gradient of one; only layers with one factor have it."""
        raise TypeError(f"layer {self.name!r} has two factors, not one of whole gradients")

    # -- parameters -----------------------------------------------------------------------------------------------

    def _parameter(self, name: str) -> nn.Parameter | None:
        return self.module._parameters.get(name)

    def part(self, tensor: Tensor) -> Tensor:
        """This layer's rows of a tensor shaped like a parameter."""
        return tensor if self._rows is None else tensor[self._rows]

    @property
    def weight(self) -> nn.Parameter:
        """The weight parameter, trained or not."""
        return self._parameter(self._names[0])  # type: ignore[return-value]

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The trainable parameters of which Theta is made; other layers may own other rows of them."""
        trained = zip(self._names, (self.has_weight, self.has_bias), strict=True)
        return tuple(self._parameter(name) for name, wanted in trained if wanted)  # type: ignore[misc]

    @property
    def views(self) -> tuple[Tensor, ...]:
        """This layer's rows of :attr:`parameters`, detached, in the same memory."""
        return tuple(self.part(parameter.detach()) for parameter in self.parameters)

    @property
    def device(self) -> torch.device:
        """Where the layer lives."""
        return self.parameters[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its parameters."""
        return self.parameters[0].dtype

    def to_matrix(self, *parts: Tensor | None) -> Tensor:
        """[W | b] of tensors shaped like :attr:`views`, in their order; a trailing None is ignored."""
        given = [part for part in parts if part is not None]
        if len(given) < self.has_weight + self.has_bias:
            raise ValueError(f"layer {self.name!r} trains weight and bias: its matrix needs both")
        columns = [self.weight_to_matrix(given[0])] if self.has_weight else []
        if self.has_bias:
            columns.append(given[int(self.has_weight)].reshape(self.groups, -1, 1))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def from_matrix(self, theta: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of a Theta, None for what is not trained: views or copies.

        ``theta`` may have any number of rows per group; the first dimension of the weight follows it.
        """
        split = theta.shape[-1] - self.has_bias
        weight = self.matrix_to_weight(theta[..., :split]) if self.has_weight else None
        return weight, theta[..., split].reshape(-1) if self.has_bias else None

    def parts(self, theta: Tensor) -> list[Tensor]:
        """A Theta as tensors shaped like :attr:`views`, in their order."""
        return [part for part in self.from_matrix(theta) if part is not None]

    def gradient(self) -> Tensor | None:
        """The matrix of ``param.grad``, None where one is missing; a new tensor, since the step overwrites them."""
        gradients = [parameter.grad for parameter in self.parameters]
        if any(gradient is None for gradient in gradients):
            return None
        matrix = self.to_matrix(*(self.part(gradient) for gradient in gradients))  # type: ignore[arg-type]
        return matrix.clone() if len(gradients) == 1 else matrix

    def write_gradient(self, theta: Tensor) -> None:
        """``param.grad.copy_`` of the matrix, in place: gradient buckets stay views."""
        for parameter, value in zip(self.parameters, self.parts(theta), strict=True):
            self.part(parameter.grad).copy_(value)  # type: ignore[arg-type]


def average_locations(rows: Tensor, samples: int, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows (groups, B T, d) averaged over the locations that count: (groups, B, d), and the samples that count (B,)."""
    grouped = rows.view(rows.shape[0], samples, -1, rows.shape[2])
    if weights is None:
        return grouped.mean(2), None
    kept = weights.view(samples, -1).to(rows.dtype)
    counts = kept.sum(1)
    means = torch.einsum("gbtd,bt->gbd", grouped, kept) / counts.clamp_min(1.0)[None, :, None]
    return means, counts > 0


def parameter_refusal(module: nn.Module, weight: str = "weight", bias: str = "bias") -> str | None:
    """Why the module's parameters cannot be seen as a matrix that is trained; None where they can."""
    parameter = module._parameters.get(weight)
    if parameter is None:
        return "its weight is computed from other parameters (a parametrization)"
    others: Any = module._parameters.get(bias)
    if not parameter.requires_grad and (others is None or not others.requires_grad):
        return "its weight is frozen"
    if parameter.is_complex():
        return "its weight is complex"
    return None


layers: Registry[type[Layer]] = Registry("layer")


def claims_of(module: nn.Module) -> list[nn.Module]:
    """The submodules that ``module`` never calls, because it computes with their parameters itself."""
    return [child for key in layers for child in layers[key].claims(module)]


def family_of(module: nn.Module, anything: bool = False) -> tuple[type[Layer] | None, str]:
    """The family that treats a module, and otherwise why none does; ``anything``: ask the last resort too."""
    families = sorted((layers[key] for key in layers), key=lambda cls: cls.last_resort)
    reasons = [(cls, cls.refusal(module)) for cls in families if anything or not cls.last_resort]
    family = next((cls for cls, reason in reasons if reason is None), None)
    specific = next((reason for _, reason in reversed(reasons) if reason), "")
    return family, specific or f"no layer type is registered for {type(module).__name__}"
