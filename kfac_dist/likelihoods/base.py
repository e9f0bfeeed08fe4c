"""What the Fisher matrix needs of a likelihood p(y | logits).

Shapes: logits (B, ..); a cotangent has the shape of the logits and is the gradient, with respect to them, of the
negative log-likelihood SUMMED over samples and outputs; a mask has the first dimensions of the targets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

from kfac_dist.registry import Registry

MAX_EXACT_COLUMNS = 4096


class Likelihood(ABC):
    """One family of output distributions.

    Args:
        class_dim: where the classes lie in the logits (for a categorical; the others ignore it).
    """

    not_logits: tuple[str, ...] = ()
    """Names of operations that must not stand at the output: what they return are no logits of this likelihood."""

    mean_all_factor = 1.0
    """The usual loss that averages over all targets, over the mean negative log-likelihood of a target."""

    def __init__(self, class_dim: int = 1) -> None:
        self.class_dim = class_dim

    def target_shape(self, logits: Tensor) -> tuple[int, ...]:
        """Shape of the targets of ``logits``."""
        return tuple(logits.shape)

    def elements(self, logits: Tensor) -> int:
        """Number of targets per sample, over which ``loss_reduction="mean_all"`` averages as well."""
        size = 1
        for length in self.target_shape(logits)[1:]:
            size *= length
        return size

    def expand_mask(self, mask: Tensor, logits: Tensor) -> Tensor:
        """``mask``, (B, ..) with the first dimensions of the targets, made to broadcast over the logits."""
        return mask.reshape(*mask.shape, *[1] * (logits.dim() - mask.dim()))

    def check(self, logits: Tensor) -> None:
        """Raise ValueError where the logits cannot belong to this likelihood."""
        if logits.dim() < 1 or not logits.is_floating_point():
            raise ValueError(f"logits of shape {tuple(logits.shape)} and type {logits.dtype}: need a floating (B, ..)")

    @abstractmethod
    def uniforms_per_sample(self, logits: Tensor) -> int:
        """How many random numbers one sample's targets take."""

    @abstractmethod
    def sampled_cotangent(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """The cotangent at targets drawn from the model by ``uniforms`` (B, n) in (0, 1)."""

    @abstractmethod
    def root_columns(self, logits: Tensor) -> Iterator[Tensor]:
        """The columns of a root S of the loss Hessian S S^T at the logits, one cotangent each, for all samples at once.

        The sum over the columns of u u^T is the exact expectation over targets.
        """

    def check_column_count(self, count: int) -> None:
        """Raise ValueError where the exact Fisher would need too many backward passes."""
        if count > MAX_EXACT_COLUMNS:
            raise ValueError(
                f'fisher_samples="exact" needs {count} backward passes for these outputs, at most {MAX_EXACT_COLUMNS} '
                "are sensible: use a number of draws, such as fisher_samples=1"
            )


likelihoods: Registry[type[Likelihood]] = Registry("likelihood")
