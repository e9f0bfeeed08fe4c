"""Search spaces of hyper-parameters, and the quasi-random trials in them: the same number for every method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kfac_dist.config import check_choice, check_positive_int

BASES = (2, 3, 5, 7, 11, 13)
"""Of the Halton sequence, one per hyper-parameter."""


@dataclass(frozen=True)
class Range:
    """The values that one hyper-parameter may take.

    Attributes:
        default: the documented value, which is the first trial.
        low: lower end.
        high: upper end.
        scale: "linear", "log", or "log_to_one": logarithmic in one minus the value, for momenta and decays.

    Raises:
        ValueError: ends that the scale does not allow, or a default outside them.
    """

    default: float
    low: float
    high: float
    scale: Literal["linear", "log", "log_to_one"] = "log"

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, ("linear", "log", "log_to_one"))
        if not self.low <= self.default <= self.high or self.low == self.high:
            raise ValueError(f"default={self.default!r} must lie in [low={self.low!r}, high={self.high!r}], low < high")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low={self.low!r} must be above 0 on the scale 'log'")
        if self.scale == "log_to_one" and self.high >= 1:
            raise ValueError(f"high={self.high!r} must be below 1 on the scale 'log_to_one'")

    def at(self, place: float) -> float:
        """The value at ``place`` in [0, 1], to three significant digits (of the distance to 1 on "log_to_one")."""
        if self.scale == "linear":
            return _rounded(self.low + place * (self.high - self.low))
        if self.scale == "log":
            return _rounded(_between(self.low, self.high, place))
        return round(1 - _rounded(_between(1 - self.low, 1 - self.high, place)), 12)


def _between(low: float, high: float, place: float) -> float:
    return math.exp((1 - place) * math.log(low) + place * math.log(high))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def radical_inverse(index: int, base: int) -> float:
    """The digits of ``index`` in ``base``, mirrored at the point: 1, 2, 3 give 1/2, 1/4, 3/4 in base 2."""
    value, digit = 0.0, 1.0
    while index:
        digit /= base
        index, rest = divmod(index, base)
        value += digit * rest
    return value


def trials(space: Mapping[str, Range], count: int) -> list[dict[str, float]]:
    """The settings to try: the defaults, then the points of Halton's sequence; only the former of an empty space.

    Args:
        space: name of a hyper-parameter -> its range.
        count: how many, the defaults included.

    Raises:
        ValueError: a count below 1, or more hyper-parameters than the sequence has bases.
    """
    check_positive_int("trials", count)
    if len(space) > len(BASES):
        raise ValueError(f"{len(space)} hyper-parameters to search: at most {len(BASES)}; fix the others")
    points = [{name: entry.default for name, entry in space.items()}]
    for index in range(1, count if space else 1):
        places = (radical_inverse(index, base) for base in BASES)
        points.append({name: entry.at(place) for (name, entry), place in zip(space.items(), places, strict=False)})
    return points
