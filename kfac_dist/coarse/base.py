"""A coarse space: which vectors per layer, made of what the fine level knows.

Shapes: a vector of a layer has the shape of its Theta, (groups, d_out, d_in), bias last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kfac_dist.config import CoarseConfig
from kfac_dist.inverse import EigenPreconditioner
from kfac_dist.registry import Registry
from kfac_dist.samples import DEFAULT_SAMPLES, Samples


class RankOne(NamedTuple):
    """The vector g a^T of every group, kept as its two sides: g (groups, d_out), a (groups, d_in)."""

    g: Tensor
    a: Tensor

    def dense(self) -> Tensor:
        """The vector itself, (groups, d_out, d_in)."""
        return self.g[:, :, None] * self.a[:, None, :]


Vector = Tensor | RankOne


def dense(vector: Vector) -> Tensor:
    """The vector as a tensor."""
    return vector.dense() if isinstance(vector, RankOne) else vector


def inner(v: Vector, w: Vector) -> Tensor:
    """``<v, w>``, a float64 scalar on the device; rank-one pairs are not multiplied out."""
    if isinstance(v, RankOne) and isinstance(w, RankOne):
        return torch.sum((v.g * w.g).sum(-1).double() * (v.a * w.a).sum(-1).double())
    if isinstance(v, RankOne) or isinstance(w, RankOne):
        one, full = (v, w) if isinstance(v, RankOne) else (w, v)
        return torch.einsum("go,goi,gi->", one.g, full, one.a).double()  # type: ignore[union-attr]
    return torch.dot(v.reshape(-1), w.reshape(-1)).double()


class FineLevel(Protocol):
    """What a space may ask of the level below it. Mappings go from layer names to Theta-shaped tensors."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """Layer -> shape of its Theta, for the layers that take part in this step."""

    @property
    def joint(self) -> Collection[str]:
        """The layers whose block has one factor, of whole gradients; there is no A and G to compare with others."""

    @property
    def factor_updates(self) -> int:
        """How many factor updates there have been: what is made of the factors alone may be kept until the next."""

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """The gradient of the mean loss."""

    @property
    def directions(self) -> Mapping[str, Tensor]:
        """The one-level direction zeta = M^-1 grad."""

    @property
    def momentum(self) -> Mapping[str, Tensor] | None:
        """The direction handed out at the previous step; None at first and after a step that was skipped."""

    def residual(self) -> Mapping[str, Tensor]:
        """The residual grad - F_l zeta: one product with F, so one all-reduce of the parameters' size."""

    def product(self, vectors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """F_l v = F v + lam_c v: one all-reduce of the parameters' size."""

    def precondition(self, vectors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """M^-1 v, with the fine damping; one exchange unless every rank holds every inverse."""

    def where_held(
        self, make: Callable[[str, EigenPreconditioner, float], Sequence[Tensor]], count: int
    ) -> Mapping[str, Sequence[Tensor]]:
        """``make(layer, eigenbases, damping)``, ``count`` vectors, where the eigenbases are held; then on every rank.

        ``count`` exchanges, unless every rank holds every inverse.
        """

    def leading_eigenvectors(self, count: int, largest: bool) -> Mapping[str, Sequence[RankOne]]:
        """Layer -> the eigenvectors q_G (x) q_A of the undamped factors with the largest (smallest) l_G l_A."""


class CoarseSpace(ABC):
    """One family of coarse spaces.

    Args:
        config: the coarse level's configuration.
    """

    variants: tuple[str, ...] = ()
    """Values that ``CoarseConfig.variant`` may take; the first is the default."""

    variable_count = False
    """Whether ``vectors_per_layer`` applies; otherwise the space has a fixed count."""

    fixed_count = 1
    """Vectors per layer of a space that does not take ``vectors_per_layer``."""

    spans_network = False
    """One coefficient per vector for the whole network instead of one per layer."""

    uses_momentum = False
    """Whether the previous direction is a basis vector (the learning-rate-free mode)."""

    uses_eigenbases = False
    """Whether the fine level must hold eigendecompositions rather than inverses."""

    least_samples = DEFAULT_SAMPLES
    """B_c where ``max_samples`` is "auto" and 4 m are fewer; vectors that are made of the samples overfit few."""

    needs_output_factor = False
    """Whether the space is made of G, which ``factor_sides="input"`` does not keep."""

    def __init__(self, config: CoarseConfig) -> None:
        if not self.variable_count and config.vectors_per_layer != 1:
            raise ValueError(
                f"coarse space {config.space!r} has a fixed number of vectors per layer: "
                f"vectors_per_layer={config.vectors_per_layer!r} does not apply; leave it at 1"
            )
        if config.variant is not None and config.variant not in self.variants:
            offered = ", ".join(map(repr, self.variants)) or "none"
            raise ValueError(f"coarse space {config.space!r} has no variant {config.variant!r}; offered: {offered}")
        self.count = config.vectors_per_layer if self.variable_count else self.fixed_count
        self.variant = config.variant or (self.variants[0] if self.variants else None)

    @abstractmethod
    def vectors(self, fine: FineLevel) -> Mapping[str, Sequence[Vector]]:
        """Layer -> its raw basis vectors, the same on every rank; they are made orthonormal by the caller."""

    def samples(self, layers: int) -> int:
        """B_c where ``max_samples`` is "auto"."""
        return max(self.least_samples, 4 * self.count * (1 if self.spans_network else layers))

    def forget(self) -> None:  # noqa: B027 - most spaces keep nothing
        """Drop what was kept of the factors: others have taken their place."""

    def local_moment(self, Y: Tensor, samples: Samples) -> Tensor:
        """What this rank contributes to the operator, to be summed over the ranks: symmetric matrices (c, m, m)."""
        return (Y @ Y.mT)[None]

    def operator(self, moment: Tensor, samples: float) -> Tensor:
        """R_0 F R_0^T, without damping, from the summed moments (c, m, m) and the number of samples B."""
        return moment[0] / samples

    def direction_coefficients(self, count: int) -> tuple[float, ...] | None:
        """The c with zeta = sum_j c_j V_j in every layer, for ``count`` vectors; None where the space lacks zeta.

        A space that has zeta can take the Galerkin form zeta_2 = V E^-1 R_0 grad, which is a descent direction and does
        not depend on the scale of zeta.
        """
        return None


class StepSpace(CoarseSpace):
    """A space whose first vector in every layer is zeta."""

    def direction_coefficients(self, count: int) -> tuple[float, ...]:
        """See :meth:`CoarseSpace.direction_coefficients`."""
        return (1.0,) + (0.0,) * (count - 1)


def constant_vector(shape: tuple[int, int, int], like: Tensor) -> RankOne:
    """The all-ones vector of a layer, in the type and on the device of ``like``."""
    groups, d_out, d_in = shape
    ones_g = torch.ones(groups, d_out, dtype=like.dtype, device=like.device)
    return RankOne(ones_g, torch.ones(groups, d_in, dtype=like.dtype, device=like.device))


coarse_spaces: Registry[type[CoarseSpace]] = Registry("coarse space")
