"""Damping as a function of the step (0, 1, ..): objects that can be pickled, and named in YAML by their class path."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kfac_dist.config import check_number


@dataclass(frozen=True)
class ExponentialDamping:
    """max(minimum, start * decay^step).

    Attributes:
        start: the damping of step 0.
        decay: factor per step, in (0, 1].
        minimum: where it stays in the end; above 0 and at most ``start``.

    Raises:
        ValueError: a number is out of its bounds.
    """

    start: float
    decay: float
    minimum: float

    def __post_init__(self) -> None:
        check_number("start", self.start, 0.0, open_low=True)
        check_number("decay", self.decay, 0.0, 1.0, open_low=True)
        check_number("minimum", self.minimum, 0.0, self.start, open_low=True)

    def __call__(self, step: int) -> float:
        """The damping of ``step``."""
        return max(self.minimum, self.start * self.decay**step)


@dataclass(frozen=True)
class PiecewiseDamping:
    """``values[i]`` from step ``boundaries[i - 1]`` on, and ``values[0]`` before the first boundary.

    Attributes:
        values: numbers above 0, one more than there are boundaries.
        boundaries: steps, at least 1 and ascending.

    Raises:
        ValueError: the lengths do not match, or a number is out of its bounds.
    """

    values: Sequence[float]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"{len(self.values)} values and {len(self.boundaries)} boundaries: there must be one value more"
            )
        for value in self.values:
            check_number("values", value, 0.0, open_low=True)
        if any(a >= b for a, b in pairwise((0, *self.boundaries))):
            raise ValueError(f"boundaries={list(self.boundaries)} must be at least 1 and ascending")
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "boundaries", tuple(self.boundaries))

    def __call__(self, step: int) -> float:
        """The damping of ``step``."""
        return self.values[bisect_right(self.boundaries, step)]
