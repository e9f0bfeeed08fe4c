"""What is remembered of a layer between steps, and how it is saved.

The factors are all-reduced, hence equal on every rank, so a checkpoint needs no collective. Inverses are not saved:
they are rebuilt from the factors of the last inversion, whichever rank owns them at the new world size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfac_dist.factors import decay_weight, moving_average
from kfac_dist.fused import pack_symmetric, triangle_size, unpack_symmetric
from kfac_dist.inverse import FactorInverse, LayerPreconditioner

STATE_VERSION = 1


@dataclass(frozen=True)
class Factors:
    """The Kronecker factors of one layer, packed (:mod:`kfac_dist.fused`), and T locations per sample.

    Never changed in place: a reference stays what it was when it was taken.

    Attributes:
        A: (groups, a (a + 1) / 2).
        G: (groups, g (g + 1) / 2), or None.
        locations: T.
    """

    A: Tensor
    G: Tensor | None
    locations: float

    def taken_into(self, old: Factors, updates: int, decay: float) -> Factors:
        """The moving average after its ``updates``-th update (0, 1, ..) by these, which it overwrites."""
        rho = decay_weight(updates, decay)
        return Factors(
            moving_average(old.A, self.A, updates, decay),
            None if self.G is None else moving_average(old.G, self.G, updates, decay),
            rho * old.locations + (1.0 - rho) * self.locations,
        )

    def sides(self) -> dict[str, Tensor]:
        """Side -> packed factor: "A" and, where there is one, "G"."""
        return {"A": self.A} if self.G is None else {"A": self.A, "G": self.G}

    def copy(self) -> Factors:
        """The same in memory of its own."""
        return Factors(self.A.clone(), None if self.G is None else self.G.clone(), self.locations)

    def to_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers: whole matrices, (groups, a, a) and (groups, g, g)."""
        G = None if self.G is None else unpack_symmetric(self.G)
        return {"A": unpack_symmetric(self.A), "G": G, "locations": self.locations}


@dataclass
class LayerState:
    """Moving averages, the factors that were last inverted, and what became of them on this rank.

    Attributes:
        factors: the moving average; None before the first update.
        updates: how many updates the average has seen.
        inverted: the factors of the last inversion.
        inverses: factor side -> its inverse, on the ranks that precondition this layer.
        preconditioner: made of the inverses; None elsewhere and before the first inversion.
    """

    factors: Factors | None = None
    updates: int = 0
    inverted: Factors | None = None
    inverses: dict[str, FactorInverse] = field(default_factory=dict)
    preconditioner: LayerPreconditioner | None = None

    def update(self, new: Factors, decay: float) -> None:
        """Take one more batch into the moving average."""
        self.factors = new if self.factors is None else new.taken_into(self.factors, self.updates, decay)
        self.updates += 1

    def detach(self) -> None:
        """Give the average memory of its own: it may lie in a buffer that would be kept for it alone."""
        if self.factors is not None:
            own = self.factors.copy()
            self.inverted = own if self.inverted is self.factors else self.inverted
            self.factors = own

    def to_dict(self) -> dict[str, Any]:
        """The part that is saved."""
        factors = None if self.factors is None else self.factors.to_dict()
        if self.inverted is not self.factors:
            inverted = None if self.inverted is None else self.inverted.to_dict()
        else:
            inverted = factors
        return {"updates": self.updates, "factors": factors, "inverted": inverted}


def layer_state_from_dict(
    name: str,
    saved: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    cure: str,
) -> LayerState:
    """A layer's state from its saved form, moved to ``device``.

    Args:
        name: the layer's name, for the message.
        saved: what :meth:`LayerState.to_dict` gave.
        shapes: the expected shape of "A" and, unless only the input side is used, of "G".
        dtype: the type of the factors.
        device: where they go.
        cure: what to do where a shape differs.

    Raises:
        ValueError: a part is missing or damaged, or a shape differs.
    """

    def factors(key: str) -> Factors | None:
        part = saved[key]
        if part is None:
            return None
        sides: dict[str, Tensor | None] = {"A": None, "G": None}
        for side, shape in shapes.items():
            tensor = part[side]
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
            if found != shape:
                raise ValueError(
                    f"K-FAC state of layer {name!r}: factor {side} has shape {found} in the checkpoint and {shape} in "
                    f"this model; {cure}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"K-FAC state of layer {name!r} is damaged: factor {side} is not finite")
            count, dim, _ = shape
            packed = torch.empty(count, triangle_size(dim), device=device, dtype=dtype)
            pack_symmetric(tensor.to(packed), packed)
            sides[side] = packed
        locations = part["locations"]
        if not (isinstance(locations, (int, float)) and 0.0 <= locations < float("inf")):
            raise ValueError(f"K-FAC state of layer {name!r} is damaged: locations={locations!r}")
        return Factors(sides["A"], sides["G"], float(locations))  # type: ignore[arg-type]

    try:
        average = factors("factors")
        same = saved["inverted"] is not None and saved["factors"] is not None
        same = same and saved["inverted"]["A"] is saved["factors"]["A"]
        updates = saved["updates"]
        if not isinstance(updates, int) or updates < 0 or (updates > 0) != (average is not None):
            raise TypeError(f"{updates!r} updates of {'a' if average else 'no'} moving average")
        return LayerState(average, updates, average if same else factors("inverted"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"K-FAC state of layer {name!r} is damaged: {error!r}") from error
